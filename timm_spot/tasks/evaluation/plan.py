"""Which rows an evaluation has; everything that can be refused is refused here, before any work."""
from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from timm.data import resolve_model_data_config
from timm.models import get_model_args
from torch import nn

from ...ops.samplers import check_n_tokens, get_sampler
from ...ops.sizes import check_coverage
from ..kept import weights_digest
from ..pictures.classes import check_same_classes
from ..pictures.datasets import Pictures, check_classes
from ..pictures.saliency_maps import attention_model
from .families import family_of
from .prunings import check_prunings
from .request import Knn, Request
from .rows import Row
from .ways import BASELINES, ImageBatch, Way, image_size

_LARGEST_SEED = 2 ** 31 - 1  # times the numbers of the images, it is still a seed for torch


@dataclass(frozen=True)
class PlannedRow:
    """A row to be computed."""

    row: Row
    model: nn.Module
    way: Way
    seeds: Tuple[int, ...]

    def model_at(self, seed: int) -> nn.Module:
        """The model that is given tokens for a seed; it shares the weights of `model`."""
        return self.way.pruning.model_at(seed) if self.way.pruning else self.model

    def tokens(self, model: nn.Module, batch: ImageBatch) -> Any:
        """What `model_at(batch.seed)` makes of a batch, up to its head."""
        return self.way.tokens(model, batch)


def plan_rows(models: Dict[str, nn.Module], pictures: Pictures, request: Request) -> List[PlannedRow]:
    """The rows that an evaluation has, in order, each once; nothing is computed yet.

    What rows a model has, its family says. Where tokens are dropped (`scorers`, or a model that does it by itself),
    each but the baselines is a row for each scorer and keep rate.

    Raises:
        ValueError: Something unknown or out of range, or that a model or its image size does not allow.
    """
    _check(models, pictures, request)
    digest_maps = functools.cache(_digest_maps)
    planned: Dict[Row, PlannedRow] = {}
    for name, model in models.items():
        check_classes(pictures, model)
        if not model.num_classes and request.knn is None:
            raise ValueError(f'{name} has no classifier: give --knn, to classify by nearest neighbours.')
        height, width = image_size(model)
        for n in request.budgets:
            if n > height * width:
                raise ValueError(f'n_tokens={n} exceeds the {height} x {width} pixels of an image of {name}.')
        common = dict(
            data=_printable(pictures.source), data_sha=pictures.digest(), split=_printable(request.split),
            model=_printable(name), weights=weights_digest(model)[:12], amp=request.amp or '')
        for way in family_of(model).ways(model, request):
            one = _plan(common, model, way, request, digest_maps(way.saliency))
            planned.setdefault(one.row, one)
    return list(planned.values())


def _plan(
        common: Dict[str, str],
        model: nn.Module,
        way: Way,
        request: Request,
        maps: Optional[str],
) -> PlannedRow:
    seeds = tuple(dict.fromkeys(request.seeds)) if way.stochastic else (0,)
    pruning = way.pruning
    dropped: Dict[str, Any] = {}
    if pruning is not None:
        dropped = dict(
            scorer=pruning.scorer, keep_rate=None if pruning.keep_rate is None else float(pruning.keep_rate),
            stages=tuple(pruning.model.stages), r=pruning.r, share=pruning.share,
            similarity=None if pruning.similarity is None else float(pruning.similarity))
    row = Row(
        kind=way.kind, sampler=_printable(way.sampler), n_tokens=way.n_tokens, seeds=seeds if way.stochastic else (),
        saliency=_printable(way.saliency), knn=_printable(request.knn.key) if request.knn and way.has_knn else '',
        settings=_settings(model, maps), coverage=way.coverage or None, **common, **dropped)
    return PlannedRow(row, pruning.model if pruning else model, way, seeds)


def _check(models: Dict[str, nn.Module], pictures: Pictures, request: Request) -> None:
    unknown = [name for name in request.baselines if name not in BASELINES]
    if unknown:
        raise ValueError(
            f"baselines={','.join(request.baselines)} has the unknown {unknown[0]!r}: {', '.join(BASELINES)}.")
    for name in (*request.samplers, *filter(None, [request.oracle])):
        get_sampler(name)
    for n in request.budgets:
        check_n_tokens(n)
    for coverage in request.coverages:
        check_coverage(coverage)
    for seed in request.seeds:
        if not 0 <= seed <= _LARGEST_SEED:
            raise ValueError(f'seeds={_listed(request.seeds)}: {seed} must lie between 0 and {_LARGEST_SEED}.')
    if not request.seeds:
        raise ValueError('seeds is empty: give one at least.')
    check_prunings(models, request.scorers, request.keep_rates, request.flops)
    if request.knn is not None:
        _check_knn(request.knn)
        check_same_classes(pictures, request.knn.train)


def _check_knn(knn: Knn) -> None:
    if not 0 < knn.temperature < float('inf'):
        raise ValueError(f'temperature={knn.temperature} of the nearest neighbours must be above 0.')
    if not knn.train.is_stream and knn.k > len(knn.train):
        raise ValueError(f'k={knn.k} must lie between 1 and the {len(knn.train)} images of the bank.')


def _settings(model: nn.Module, maps: Optional[str]) -> str:
    """Digest of what determines a row beside what its columns say."""
    config, arguments = resolve_model_data_config(model), get_model_args(model)
    said = dict(
        model=type(model).__name__, config=config, arguments=arguments,
        convention=getattr(getattr(model, 'patch_embed', None), 'convention', ''), maps=maps)
    text = json.dumps(said, sort_keys=True, default=_name)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _name(value: Any) -> str:
    """What stands for an argument that JSON has no word for; never an address, which the next run has not."""
    return getattr(value, '__qualname__', type(value).__qualname__)


def _digest_maps(source: str) -> Optional[str]:
    """Names, sizes and times of change of a folder of maps, weights of a ViT; else the name says it all."""
    vit = attention_model(source)
    if vit is not None:
        return weights_digest(vit)
    folder = Path(source)
    if not source or not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        status = file.stat()
        digest.update(f'{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n'.encode(errors='surrogateescape'))
    return digest.hexdigest()


def _printable(name: str) -> str:
    """A name as a line of UTF-8 can hold it."""
    return name.encode('utf-8', 'backslashreplace').decode().replace('\r', '\\r').replace('\n', '\\n')


def _listed(values: Sequence[Any]) -> str:
    return ','.join(map(str, values))
