"""The four case studies of the SPoT page as experiments, and one of placers, for subpixel ViTs on any pictures.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

All compare the same pictures under two conditions: a difference is a mean over pictures of paired differences, with a
95 % confidence interval of its mean and the p of a permutation test, which is then corrected for the number of
comparisons. The oracle sees the labels; what it found is kept in the study's folder, for the other studies. A study of
one's own is one function:

    @register_study('corners')
    def study_corners(trials: Sequence[Trial]) -> List[Comparison]:
        return [
            trial.compare('isotropic - center', n, {
                name: trial.correct(trial.placed(name, n)) for name in ('isotropic', 'center')})
            for trial in trials for n in trial.budgets]
"""
from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn

from ...models.placement import SampledPlacer
from ...models.placing import at_budget
from ...ops.placements import sample_positions
from ...ops.saliency import energy, spectral_residual
from ...ops.samplers import check_n_tokens, get_sampler
from ...ops.sizes import add_sizes
from ..kept import weights_digest
from ..search.draws import draw_placements, image_generator
from ..search.optimize import optimize_positions
from ..search.result import OracleResult
from .baselines import random_patches
from .comparisons import Comparison, compare, saliency_percentiles
from .families import family_of
from .study_pictures import StudyPictures

BUDGETS = (9, 16, 25)  # of the digits
SEARCH = dict(steps=20, lr=1e-2, record=False, chunk_size=128)  # what docs/oracle.md measures


@dataclass(frozen=True)
class Trial:
    """One model on the pictures of a study.

    Attributes:
        name: Of the model.
        model: A subpixel ViT in eval mode.
        pictures: That all models see.
        budgets: Numbers of tokens.
        folder: Where searches are kept.
        search: Settings of the oracle, see `optimize_positions`.
    """

    name: str
    model: nn.Module
    pictures: StudyPictures
    budgets: Tuple[int, ...]
    folder: Path
    search: Dict[str, object]

    @property
    def images(self) -> torch.Tensor:
        """(B, C, H, W), normalised, on the model's device."""
        return self.pictures.images(self.model).to(next(self.model.parameters()).device)

    @property
    def grid(self) -> Tuple[int, int]:
        """Rows and columns of whole patches in an image."""
        window = self.model.patch_embed.window
        height, width = self.images.shape[-2:]
        return height // window, width // window

    def placed(
            self,
            sampler: str,
            n_tokens: int,
            saliency: Callable[[torch.Tensor], torch.Tensor] = spectral_residual,
    ) -> torch.Tensor:
        """Placements (B, N, 2) by a sampler, drawn for each image; salient ones by the maps of `saliency`.

        With sizes (B, N, 4), by the coverage of the model.
        """
        images = self.images
        maps = saliency(images) if 'saliency' in get_sampler(sampler).keywords else None
        return draw_placements(self.model, images, sampler, n_tokens, maps, torch.arange(len(images)), seed=0)

    @torch.inference_mode()
    def self_placed(self, n_tokens: int) -> torch.Tensor:
        """Placements (B, N, 2) by the model's own placer; with sizes (B, N, 4), by the coverage of the model."""
        model = at_budget(self.model, n_tokens, self.model.placer.coverage())
        return torch.cat([model.place(images) for images in self.images.split(128)])

    def random_patches(self, n_tokens: int) -> torch.Tensor:
        """Placements (B, N, 2) on centres of patches, drawn for each image; with sizes (B, N, 4), by distances."""
        images, (rows, columns), window = self.images, self.grid, self.model.patch_embed.window
        size = tuple(images.shape[-2:])
        centres = sample_positions('grid', rows * columns, size, window=window)[0]
        positions = torch.stack([
            centres[random_patches(len(centres), n_tokens, image_generator(0, i))] for i in range(len(images))])
        return add_sizes(positions, size, window, self.model.placer.coverage())

    def searched(self, n_tokens: int) -> OracleResult:
        """SPoT-ON from the isotropic lattice; kept in a file, since three of the studies need the same search."""
        key = f'{weights_digest(self.model)} {self.model.patch_embed.convention} {self.pictures.digest} {self.search}'
        coverage = self.model.placer.coverage()
        key += f' coverage={coverage}' if coverage else ''
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        file = self.folder / f'oracle-{digest}-{n_tokens}-{len(self.pictures)}.safetensors'
        if file.exists():
            return OracleResult.from_safetensors(file)
        images = self.images
        result = optimize_positions(
            self.model, images, self.pictures.labels.to(images.device), n_tokens=n_tokens, init='isotropic',
            **self.search)
        result.to_safetensors(file)
        return OracleResult.from_safetensors(file)

    def taken_over(self, other: Trial, n_tokens: int) -> torch.Tensor:
        """What another trial's search found, its windows on the same parts of this model's images."""
        found = other.searched(n_tokens).positions
        positions, sizes = found[..., :2], found[..., 2:]
        own, its = (
            torch.tensor(trial.images.shape[-2:]) / trial.model.patch_embed.window for trial in (self, other))
        return torch.cat([positions, sizes * (own / its)], dim=-1) if sizes.shape[-1] else positions

    @torch.inference_mode()
    def correct(self, positions: torch.Tensor) -> torch.Tensor:
        """Whether each picture is named rightly, placed so, (B,)."""
        images = self.images
        positions = positions.to(images.device)
        named = [self.model(x, p).argmax(dim=1).cpu() for x, p in zip(images.split(128), positions.split(128))]
        return torch.cat(named) == self.pictures.labels

    def compare(self, what: str, n_tokens: int, scores: Dict[str, torch.Tensor]) -> Comparison:
        """'A - B' of scores (B,), by their names; see `compare`."""
        return compare(self.name, what, n_tokens, scores)


Study = Callable[[Sequence[Trial]], List[Comparison]]
STUDIES: Dict[str, Study] = {}


def register_study(name: str) -> Callable[[Study], Study]:
    """Decorator that registers a study: a function from the trials, one for each model, to its comparisons.

    Raises:
        ValueError: The name is taken.
    """
    if name in STUDIES:
        raise ValueError(f'name={name!r} is already a study, choose another name.')

    def decorator(study: Study) -> Study:
        STUDIES[name] = study
        return study

    return decorator


def check_study(name: str) -> Study:
    """A study by its name.

    Raises:
        ValueError: There is none of this name; lists those that are.
    """
    if name not in STUDIES:
        close = difflib.get_close_matches(name, STUDIES, n=1)
        hint = f' (did you mean {close[0]!r}?)' if close else ''
        raise ValueError(f"name={name!r} is no study{hint}: {', '.join(STUDIES)}.")
    return STUDIES[name]


def run_study(
        name: str,
        models: Dict[str, nn.Module],
        pictures: StudyPictures,
        budgets: Sequence[int],
        folder: Path,
        search: Optional[Dict[str, object]] = None,
) -> List[Comparison]:
    """Run a registered study.

    Args:
        name: Of the study.
        models: Subpixel ViTs in eval mode, by name.
        pictures: That they see.
        budgets: Numbers of tokens.
        folder: Of the study, made if it is not there; searches are kept in it.
        search: Settings of the oracle, by default `SEARCH`.

    Raises:
        ValueError: An unknown study, a model that is no subpixel ViT or has other classes, or a budget above its
            number of patches.
    """
    study = check_study(name)
    trials = [
        Trial(title, model, pictures, tuple(dict.fromkeys(budgets)), folder, SEARCH if search is None else search)
        for title, model in models.items()]
    for trial in trials:
        if not family_of(trial.model).has_samplers:
            raise ValueError(f'{trial.name} is no subpixel ViT: studies are about where tokens lie.')
        rows, columns = trial.grid
        if pictures.labels.max() >= trial.model.num_classes:
            raise ValueError(
                f'labels reach up to {pictures.labels.max()}, {trial.name} has {trial.model.num_classes} classes.')
        for n in trial.budgets:
            check_n_tokens(n)
            if n > rows * columns:
                raise ValueError(f'n_tokens={n} exceeds the {rows} x {columns} patches of an image of {trial.name}.')
    folder.mkdir(parents=True, exist_ok=True)
    return study(trials)


@register_study('grids')
def study_grids(trials: Sequence[Trial]) -> List[Comparison]:
    """Off the grid against on it, at equal budgets: evenly, at random, and where an oracle put the tokens."""
    found = []
    for trial in trials:
        for n in trial.budgets:
            searched = trial.searched(n)
            scores = {
                'isotropic': searched.correct_before,
                'grid': trial.correct(trial.placed('grid', n)),
                'uniform': trial.correct(trial.placed('uniform', n)),
                'random patches': trial.correct(trial.random_patches(n)),
                'oracle': searched.correct_after,
                'oracle snapped': trial.correct(searched.snap(trial.grid)),
            }
            for what in ('isotropic - grid', 'uniform - random patches', 'oracle - oracle snapped',
                         'oracle snapped - grid'):
                found.append(trial.compare(what, n, scores))
    return found


@register_study('priors')
def study_priors(trials: Sequence[Trial]) -> List[Comparison]:
    """Object-centric priors against even ones: lattices, and random draws."""
    found = []
    for trial in trials:
        for n in trial.budgets:
            scores = {
                sampler: trial.correct(trial.placed(sampler, n))
                for sampler in ('center', 'isotropic', 'gaussian', 'uniform', 'salient', 'salient_sobol', 'sobol')}
            for what in ('center - isotropic', 'gaussian - uniform', 'salient - uniform', 'salient_sobol - sobol'):
                found.append(trial.compare(what, n, scores))
    return found


@register_study('placers')
def study_placers(trials: Sequence[Trial]) -> List[Comparison]:
    """What looks at the image against the even lattice, and what is left to the oracle and to the full budget."""
    found = []
    for trial in trials:
        rows, columns = trial.grid
        full = trial.correct(trial.placed('isotropic', rows * columns))
        for n in trial.budgets:
            searched = trial.searched(n)
            scores = {
                'isotropic': searched.correct_before,
                'residual lattice': trial.correct(trial.placed('salient_lattice', n)),
                'energy lattice': trial.correct(trial.placed('salient_lattice', n, energy)),
            }
            best = 'energy lattice'
            if not isinstance(trial.model.placer, SampledPlacer):
                scores[best := 'placer'] = trial.correct(trial.self_placed(n))
            what = [f'{name} - isotropic' for name in scores if name != 'isotropic']
            if best == 'placer':
                what.append('placer - energy lattice')
            scores.update({'oracle': searched.correct_after, 'full budget': full})
            for pair in (*what, f'oracle - {best}', f'full budget - {best}'):
                found.append(trial.compare(pair, n, scores))
    return found


@register_study('saliency')
def study_saliency(trials: Sequence[Trial]) -> List[Comparison]:
    """Saliency under the tokens, as its percentile in the image, before and after the oracle."""
    found = []
    for trial in trials:
        percentiles = saliency_percentiles(spectral_residual(trial.images).cpu())
        for n in trial.budgets:
            start = sample_positions('isotropic', n, tuple(percentiles.shape[-2:])).expand(len(percentiles), -1, -1)
            scores = {
                'before': _under(percentiles, start),
                'after': _under(percentiles, trial.searched(n).positions),
            }
            found.append(trial.compare('after - before', n, scores))
    return found


@register_study('transfer')
def study_transfer(trials: Sequence[Trial]) -> List[Comparison]:
    """Placements that an oracle found with one model, used by another that was trained independently.

    Raises:
        ValueError: There is one model only.
    """
    if len(trials) < 2:
        raise ValueError('transfer needs a second, independently trained model: give its --weights, or --model.')
    found = []
    for n in trials[0].budgets:
        for trial in trials:
            own = trial.searched(n)
            scores = {'own start': own.correct_before, 'own oracle': own.correct_after}
            for other in trials:
                if other is not trial:
                    scores["other's oracle"] = trial.correct(trial.taken_over(other, n))
                    found.append(trial.compare("other's oracle - own start", n, scores))
                    found.append(trial.compare("own oracle - other's oracle", n, scores))
    return found


def _under(percentiles: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Mean over an image's tokens of the percentile at their pixel, as a share of 1, (B,)."""
    B, H, W = percentiles.shape
    size = torch.tensor([H, W])
    pixel = (positions[..., :2] * size).floor().long().clamp(min=0).minimum(size - 1)
    return percentiles[torch.arange(B)[:, None], pixel[..., 0], pixel[..., 1]].mean(dim=1) / 100
