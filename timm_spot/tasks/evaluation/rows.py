"""Rows of an evaluation, typed, and the line of CSV that each of them is."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, Mapping, Optional, Tuple

from .metrics import Estimate

# Kinds of rows. A family may have kinds of its own beside these.
SAMPLER = 'sampler'  # tokens where a spatial prior puts them
PLACER = 'placer'  # where the model's own placer does
ORACLE = 'oracle'  # where a search that sees the labels does: an upper bound, out of competition
REGIONS = 'regions'  # tokens that are regions of the image
AS_IT_IS = 'as it is'  # a model without a budget
BASELINE = 'baseline'  # other ways to spend fewer tokens on the same weights

METRICS = ('top1', 'top5', 'nll', 'ece', 'knn_top1')
KEY = (
    'data', 'data_sha', 'split', 'model', 'weights', 'sampler', 'n_tokens', 'scorer', 'keep_rate', 'stages', 'seeds',
    'saliency', 'knn', 'amp', 'kind', 'settings', 'coverage', 'r', 'share', 'similarity')
COLUMNS = (
    *KEY, 'images', 'skipped', *(f'{m}{suffix}' for m in METRICS for suffix in ('', '_se', '_se_seeds')), 'gflops')
SPEED_COLUMNS = (*KEY, 'images_per_s')
NEW_COLUMNS = ('kind', 'settings', 'coverage', 'r', 'share', 'similarity')  # files of earlier versions lack some

_BASELINES_BEFORE = ('patch-drop', 'low-res', 'top-k')  # those of version 0.1


@dataclass(frozen=True)
class Row:
    """What a row was measured on: all that determines its figures.

    Attributes:
        kind: How the tokens came about, such as `SAMPLER`.
        data: Source of the pictures.
        data_sha: Digest of the pictures and their labels.
        split: Part of the data set.
        model: Name.
        weights: Digest of its weights.
        sampler: Name in the table of how the tokens came about: a sampler, a baseline, 'oracle isotropic', ...
        n_tokens: Budget, where there is one.
        scorer: What tokens were dropped or merged by; '' where none were.
        keep_rate: Share that each stage kept; None where `r` or `similarity` alone say how many were merged.
        stages: Blocks in front of which tokens fell.
        seeds: Of what was drawn; none where nothing was.
        saliency: Where maps came from, where there were any.
        knn: Bank and settings of nearest neighbours, where they were asked.
        amp: Data type of autocast, or ''.
        settings: Digest of what else determines the figures: the model's configuration, a folder of maps. '' in a row
            of version 0.1, which does not say.
        coverage: Share of its cell that a window covers; None for windows of single pixels.
        r: How many tokens each block merged, one number where it is the same for all; '' where the keep rate said it.
        share: Of the dense model's multiply-adds, where the keep rate or `r` were found for it.
        similarity: Least cosine of keys at which tokens were merged; None where it did not count.
    """

    kind: str
    data: str
    data_sha: str
    split: str
    model: str
    weights: str
    sampler: str
    n_tokens: Optional[int] = None
    scorer: str = ''
    keep_rate: Optional[float] = None
    stages: Tuple[int, ...] = ()
    seeds: Tuple[int, ...] = ()
    saliency: str = ''
    knn: str = ''
    amp: str = ''
    settings: str = ''
    coverage: Optional[float] = None
    r: str = ''
    share: Optional[float] = None
    similarity: Optional[float] = None

    @property
    def competes(self) -> bool:
        """Whether it may be the best of a table: an oracle sees the labels."""
        return self.kind != ORACLE

    @property
    def placement(self) -> str:
        """How the tokens came about, and how large they are."""
        return self.sampler if self.coverage is None else f'{self.sampler}, coverage {self.coverage:g}'

    @property
    def title(self) -> str:
        """What people call it."""
        parts = [self.model, self.placement, f'{self.n_tokens} tokens' if self.n_tokens is not None else '']
        rate = '' if self.keep_rate is None else f' at {self.keep_rate}'
        return ', '.join(filter(None, [*parts, f'{self.scorer_name}{rate}']))

    @property
    def scorer_name(self) -> str:
        """The scorer, and what fixes how many tokens each block merged."""
        if self.similarity is not None:
            return f'{self.scorer}, similarity {self.similarity:g}'
        return f'{self.scorer}, r {self.r}' if self.r else self.scorer

    def to_cells(self) -> Dict[str, str]:
        """Values of `KEY`."""
        return {name: _to_cell(getattr(self, name)) for name in KEY}

    @classmethod
    def from_cells(cls, cells: Mapping[str, str]) -> Row:
        """What `to_cells` wrote, or version 0.1.

        Raises:
            ValueError: A number that is none.
        """
        values = dict(
            {name: cells[name] for name in KEY if name not in NEW_COLUMNS},
            kind=cells.get('kind') or _kind_of(cells['sampler']),
            **{name: cells.get(name, '') for name in ('settings', 'r')})
        return cls(**dict(
            values,
            n_tokens=int(cells['n_tokens']) if cells['n_tokens'] else None,
            keep_rate=float(cells['keep_rate']) if cells['keep_rate'] else None,
            **{name: float(cells[name]) if cells.get(name) else None for name in ('coverage', 'share', 'similarity')},
            stages=tuple(int(stage) for stage in cells['stages'].split()),
            seeds=tuple(int(seed) for seed in cells['seeds'].split())))


@dataclass(frozen=True)
class Result:
    """What was measured of a row.

    Attributes:
        row: On what.
        images: Pictures counted.
        skipped: Pictures that could not be read.
        estimates: By metric, in percent; `nll` in nats. Those without classifier or neighbours are missing.
        gflops: Of one image.
        images_per_s: None where it is not known.
    """

    row: Row
    images: int
    skipped: int
    gflops: float
    estimates: Dict[str, Estimate] = field(default_factory=dict)
    images_per_s: Optional[float] = None

    def to_cells(self) -> Dict[str, str]:
        """Values of `COLUMNS`."""
        cells = dict(
            self.row.to_cells(), images=str(self.images), skipped=str(self.skipped), gflops=f'{self.gflops:.4f}')
        for name, estimate in self.estimates.items():
            for suffix, value in zip(('', '_se', '_se_seeds'), estimate):
                cells[name + suffix] = '' if value is None else f'{value:.4f}'
        return cells

    @classmethod
    def from_cells(cls, cells: Mapping[str, str]) -> Result:
        """What `to_cells` wrote, or version 0.1.

        Raises:
            ValueError: A number that is none.
        """
        estimates = {
            name: Estimate(
                float(cells[name]), float(cells[f'{name}_se']),
                float(cells[f'{name}_se_seeds']) if cells[f'{name}_se_seeds'] else None)
            for name in METRICS if cells[name]}
        return cls(
            Row.from_cells(cells), int(cells['images']), int(cells['skipped']), float(cells['gflops']), estimates)


def _to_cell(value: object) -> str:
    if isinstance(value, tuple):
        return ' '.join(map(str, value))
    return '' if value is None else str(value)


def _kind_of(sampler: str) -> str:
    """The kind that version 0.1 told by the name alone."""
    if sampler.startswith('oracle '):
        return ORACLE
    if sampler in _BASELINES_BEFORE:
        return BASELINE
    return sampler if sampler in (REGIONS, AS_IT_IS) else SAMPLER
