"""The four case studies of the SPoT page as experiments on digit canvases, for one model or several.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

All compare the same canvases, one of each held-out digit, under two conditions: a difference is a mean over canvases of
paired differences, with a 95 % confidence interval of its mean. The oracle sees the labels, see `oracle.py`; what it
found is kept in the study's folder, for the other studies.
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import nn

from ...ops.saliency import spectral_residual
from ...ops.samplers import sample_positions
from ..kept import weights_digest
from ..pictures.digits import draw_canvases, load_digits, to_input
from ..search.draws import draw_placements, image_generator
from ..search.optimize import optimize_positions
from ..search.result import OracleResult
from .baselines import random_patches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGETS = (9, 16, 25)
_SEARCH = dict(steps=20, lr=1e-2, record=False, chunk_size=128)  # what docs/oracle.md measures
_PERMUTATIONS = 10_000
_Z = 1.96


class Comparison(NamedTuple):
    """One line of a study: what differs, at which budget, by how much.

    Attributes:
        model: Name of the model.
        what: 'A - B'.
        n_tokens: Budget.
        difference: Mean of A - B, in percentage points.
        interval: Half the width of its 95 % confidence interval.
        p: Of the permutation test, where one was made.
    """

    model: str
    what: str
    n_tokens: int
    difference: float
    interval: float
    p: Optional[float] = None

    @property
    def finding(self) -> str:
        """'A', 'B' or 'neither': whose mean is larger beyond the interval."""
        if abs(self.difference) <= self.interval:
            return 'neither'
        return self.what.split(' - ')[self.difference < 0]


class Canvases(NamedTuple):
    """Canvases of held-out digits: uint8 (B, 64, 64), and labels (B,)."""

    pixels: torch.Tensor
    labels: torch.Tensor


def draw_study_canvases(count: int) -> Canvases:
    """One canvas of each of the first `count` held-out digits."""
    digits, labels = load_digits('held_out')
    return Canvases(draw_canvases(digits[:count], torch.Generator().manual_seed(3)), labels[:count])


def study_grids(models: Dict[str, nn.Module], canvases: Canvases, folder: Path) -> List[Comparison]:
    """Off the grid against on it, at equal budgets: evenly, at random, and where an oracle put the tokens."""
    found = []
    for name, model in models.items():
        images, grid = to_input(canvases.pixels, model), model.patch_embed.grid_size
        for n in BUDGETS:
            searched = _search(model, canvases, n, folder)
            snapped = searched.snap(grid)
            scores = {
                'isotropic': searched.correct_before,
                'grid': _correct(model, canvases, _sampled(model, images, 'grid', n)),
                'uniform': _correct(model, canvases, _sampled(model, images, 'uniform', n)),
                'random patches': _correct(model, canvases, _random_patches(model, len(images), n)),
                'oracle': searched.correct_after,
                'oracle snapped': _correct(model, canvases, snapped),
            }
            for what in ('isotropic - grid', 'uniform - random patches', 'oracle - oracle snapped',
                         'oracle snapped - grid'):
                found.append(_compare(name, what, n, scores))
    return found


def study_priors(models: Dict[str, nn.Module], canvases: Canvases, folder: Path) -> List[Comparison]:
    """Object-centric priors against even ones: lattices, and random draws."""
    found = []
    for name, model in models.items():
        images = to_input(canvases.pixels, model)
        for n in BUDGETS:
            scores = {
                sampler: _correct(model, canvases, _sampled(model, images, sampler, n))
                for sampler in ('center', 'isotropic', 'gaussian', 'uniform', 'salient', 'salient_sobol', 'sobol')}
            for what in ('center - isotropic', 'gaussian - uniform', 'salient - uniform', 'salient_sobol - sobol'):
                found.append(_compare(name, what, n, scores))
    return found


def study_saliency(models: Dict[str, nn.Module], canvases: Canvases, folder: Path) -> List[Comparison]:
    """Saliency under the tokens, as its percentile in the image, before and after the oracle."""
    found = []
    for name, model in models.items():
        percentiles = saliency_percentiles(spectral_residual(to_input(canvases.pixels, model)))
        for n in BUDGETS:
            start = sample_positions('isotropic', n, canvases.pixels.shape[-2:]).expand(len(canvases.labels), -1, -1)
            scores = {
                'before': _under(percentiles, start),
                'after': _under(percentiles, _search(model, canvases, n, folder).positions),
            }
            found.append(_compare(name, 'after - before', n, scores, permute=True))
    return found


def study_transfer(models: Dict[str, nn.Module], canvases: Canvases, folder: Path) -> List[Comparison]:
    """Placements that an oracle found with one model, used by another that was trained independently.

    Raises:
        ValueError: There is one model only.
    """
    if len(models) < 2:
        raise ValueError('transfer needs a second, independently trained model: give its --weights.')
    found = []
    for n in BUDGETS:
        searched = {name: _search(model, canvases, n, folder) for name, model in models.items()}
        for name, model in models.items():
            scores = {'own start': searched[name].correct_before, 'own oracle': searched[name].correct_after}
            for other in models:
                if other != name:
                    scores["other's oracle"] = _correct(model, canvases, searched[other].positions)
                    found.append(_compare(name, "other's oracle - own start", n, scores))
                    found.append(_compare(name, "own oracle - other's oracle", n, scores))
    return found


STUDIES: Dict[str, Callable[[Dict[str, nn.Module], Canvases, Path], List[Comparison]]] = dict(
    grids=study_grids, priors=study_priors, saliency=study_saliency, transfer=study_transfer)


def saliency_percentiles(maps: torch.Tensor) -> torch.Tensor:
    """For each pixel of maps (B, H, W) the percentage of its map's pixels that are less salient; ties count half."""
    B, H, W = maps.shape
    flat = maps.flatten(1)
    ordered = flat.sort(dim=1).values.contiguous()
    below = torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True)
    return (50. * below / (H * W)).view(B, H, W)


def permutation_test(differences: torch.Tensor) -> float:
    """Two-sided p that paired differences (B,) have mean zero: their signs are drawn anew 10,000 times."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (_PERMUTATIONS, len(differences)), generator=generator, dtype=torch.int8)
    means = (2. * signs.double() - 1) @ differences.double() / len(differences)
    # The observed signs are one of the permutations, so p is never 0.
    extreme = (means.abs() >= differences.double().mean().abs() - 1e-12).sum().item()
    return (extreme + 1) / (_PERMUTATIONS + 1)


def format_study(found: Sequence[Comparison]) -> str:
    """A table in Markdown."""
    lines = ['| model | difference | tokens | points, 95 % interval | larger |', '|---' * 5 + '|']
    for c in found:
        p = '' if c.p is None else f' (p = {c.p:.4f})'
        lines.append(
            f'| {c.model} | {c.what} | {c.n_tokens} | {c.difference:+.1f} ± {c.interval:.1f}{p} | {c.finding} |')
    return '\n'.join(lines)


def draw_study(found: Sequence[Comparison]) -> Figure:
    """Differences by budget with their intervals, a panel for each kind of difference."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(c.what for c in found))
    models = list(dict.fromkeys(c.model for c in found))
    columns = min(2, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows + 0.4), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for ax, what in zip(axes.flat, kinds):
        for i, model in enumerate(models):
            own = [c for c in found if (c.what, c.model) == (what, model)]
            at = [j + 0.12 * (i - (len(models) - 1) / 2) for j in range(len(own))]
            ax.errorbar(at, [c.difference for c in own], [c.interval for c in own], label=model, capsize=3,
                        marker='os^D'[i % 4], linestyle='', color=('#0072b2', '#e69f00', '#009e73', '#cc79a7')[i % 4])
            ax.set_xticks(range(len(own)), [str(c.n_tokens) for c in own])
        ax.axhline(0, color='#808080', linewidth=1)
        ax.set_title(what, fontsize='medium')
        ax.set_xlabel('tokens')
    axes[0, 0].set_ylabel('points')
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=2, frameon=False)
    return figure


def _search(model: nn.Module, canvases: Canvases, n_tokens: int, folder: Path) -> OracleResult:
    """SPoT-ON from the isotropic lattice; kept in a file, since three of the studies need the same search."""
    file = folder / f'oracle-{weights_digest(model)[:12]}-{n_tokens}-{len(canvases.labels)}.safetensors'
    if file.exists():
        return OracleResult.from_safetensors(file)
    result = optimize_positions(
        model, to_input(canvases.pixels, model), canvases.labels, n_tokens=n_tokens, init='isotropic', **_SEARCH)
    result.to_safetensors(file)
    return result


def _sampled(model: nn.Module, images: torch.Tensor, sampler: str, n_tokens: int) -> torch.Tensor:
    return draw_placements(
        model, images, sampler, n_tokens, spectral_residual(images), torch.arange(len(images)), seed=0)


def _random_patches(model: nn.Module, count: int, n_tokens: int) -> torch.Tensor:
    rows, columns = model.patch_embed.grid_size
    centres = sample_positions('grid', rows * columns, model.patch_embed.img_size, window=model.patch_embed.window)[0]
    return torch.stack([
        centres[random_patches(len(centres), n_tokens, image_generator(0, i))] for i in range(count)])


@torch.inference_mode()
def _correct(model: nn.Module, canvases: Canvases, positions: torch.Tensor) -> torch.Tensor:
    images = to_input(canvases.pixels, model)
    named = [model(x, p).argmax(dim=1) for x, p in zip(images.split(128), positions.split(128))]
    return torch.cat(named) == canvases.labels


def _under(percentiles: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Mean over an image's tokens of the percentile at their pixel, as a share of 1, (B,)."""
    B, H, W = percentiles.shape
    size = torch.tensor([H, W])
    pixel = (positions * size).floor().long().clamp(min=0).minimum(size - 1)
    return percentiles[torch.arange(B)[:, None], pixel[..., 0], pixel[..., 1]].mean(dim=1) / 100


def _compare(
        model: str,
        what: str,
        n_tokens: int,
        scores: Dict[str, torch.Tensor],
        permute: bool = False,
) -> Comparison:
    a, b = what.split(' - ')
    differences = scores[a].double() - scores[b].double()
    interval = _Z * (differences.std() / math.sqrt(len(differences))).item()
    p = permutation_test(differences) if permute else None
    return Comparison(model, what, n_tokens, 100 * differences.mean().item(), 100 * interval, p)
