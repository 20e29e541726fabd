"""The kinds of drawing, by name: what `timm-spot draw` makes of an image and a model.

    KINDS['mine'] = Kind(draw, 'what it shows')

A family of models names the kinds that can be drawn of it.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Literal, NamedTuple

import torch
from torch import nn

from ...models.density_placer import DensityPlacer
from ...models.placing import place_images
from ...models.pruning import TokenPruning
from ...models.pruning_scorers import get_scorer
from ...models.pruning_vit import sparsify
from ..pictures.images import denormalize
from ..search.optimize import optimize_positions
from .density import animate_budgets, draw_density
from .figure import check_figure, check_film, save_figure
from .placements import draw_placement, draw_priors, draw_seen
from .pruning import draw_pruning
from .regions import draw_hierarchy, draw_region_means, draw_regions
from .search import animate, draw_trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRIOR_TOKENS = 25  # of each prior, where nobody says
FILM_BUDGETS = range(4, 101)


@dataclass(frozen=True)
class Subject:
    """An image and the model that it is drawn with.

    Attributes:
        model: In eval mode, with the placement that is to be drawn.
        images: The image as the model takes it, a batch of one (1, C, H, W).
    """

    model: nn.Module
    images: torch.Tensor

    @property
    def picture(self) -> torch.Tensor:
        """The image as a person sees it, (3, H, W) or (1, H, W) in [0, 1]."""
        return denormalize(self.model, self.images[0])

    @property
    def windows(self) -> dict[str, Any]:
        """Side and convention of the model's windows."""
        embed = self.model.patch_embed
        return dict(window=embed.window, convention=embed.convention)


@dataclass(frozen=True)
class Settings:
    """What some kinds have to know besides.

    Attributes:
        n_tokens: Budget of each prior, `PRIOR_TOKENS` by default.
        steps: Of a search.
        lr: Its learning rate.
        scorer: What a model that drops no tokens is pruned by.
        keep_rate: Share of the tokens that each stage of a pruning keeps.
        amp_dtype: Run the model under autocast to this type.
    """

    n_tokens: int | None = None
    steps: int = 30
    lr: float = 1e-2
    scorer: str = 'cls-attention'
    keep_rate: float = 0.7
    amp_dtype: torch.dtype | None = None


class Kind(NamedTuple):
    """A kind of drawing.

    Attributes:
        write: Draws a subject into a file, which appears whole or not at all.
        about: What it shows, for the help.
        alone: What it draws where no model is named: even 'windows' on the image, which need no weights, or the
            'regions' of the tokenizer in the package; None where it needs the weights of a model.
        check: Raises ValueError or RuntimeError where a file of this name cannot be written, before any work.
    """

    write: Callable[[Subject, Settings, Path], Any]
    about: str
    alone: Literal['windows', 'regions'] | None = None
    check: Callable[[Path], None] = check_figure


def _saved(draw: Callable[[Subject, Settings], Figure]) -> Callable[[Subject, Settings, Path], None]:
    """Save what a function draws."""
    def write(subject: Subject, settings: Settings, path: Path) -> None:
        save_figure(draw(subject, settings), path)

    return write


def _draw_placement(subject: Subject, settings: Settings) -> Figure:
    return draw_placement(subject.picture, subject.model.place(subject.images), **subject.windows).figure


def _draw_seen(subject: Subject, settings: Settings) -> Figure:
    return draw_seen(subject.picture, subject.model.place(subject.images), **subject.windows).figure


def _draw_priors(subject: Subject, settings: Settings) -> Figure:
    n_tokens = PRIOR_TOKENS if settings.n_tokens is None else settings.n_tokens
    return draw_priors(subject.picture, n_tokens, subject.windows['window'])[0, 0].figure


@torch.no_grad()
def _draw_density(subject: Subject, settings: Settings) -> Figure:
    placer = subject.model.placer
    if not isinstance(placer, DensityPlacer):
        raise ValueError(
            f"{placer.source} has no density: draw a model with placer='density', as "
            'spot_vit_pico_patch8_64.digits_placed.')
    images = subject.model.patch_embed.normalize(subject.images)
    return draw_density(
        subject.picture, placer.density(images)[0], subject.model.place(images), **subject.windows)[0].figure


@torch.no_grad()
def _write_budgets(subject: Subject, settings: Settings, path: Path) -> None:
    size = (subject.images.shape[-2], subject.images.shape[-1])
    budgets = [n for n in FILM_BUDGETS if n <= size[0] * size[1]]
    model = subject.model
    placements = [
        place_images(model.placer.replaced(n_tokens=n), model.patch_embed, subject.images)[0] for n in budgets]
    animate_budgets(subject.picture, placements, path=path, **subject.windows)


def _draw_trajectory(subject: Subject, settings: Settings) -> Figure:
    result = _search(subject, settings)
    return draw_trajectory(
        subject.picture, result, convention=subject.windows['convention'], objective='entropy')[0].figure


def _write_film(subject: Subject, settings: Settings, path: Path) -> None:
    animate(subject.picture, _search(subject, settings), path=path, **subject.windows)


def _search(subject: Subject, settings: Settings) -> Any:
    return optimize_positions(
        subject.model, subject.images, init=subject.model.place(subject.images), objective='entropy',
        steps=settings.steps, lr=settings.lr, bounds='clamp', amp_dtype=settings.amp_dtype)


def _draw_pruning(subject: Subject, settings: Settings) -> Figure:
    model, images = subject.model, subject.images
    positions = model.place(images)
    if isinstance(model, TokenPruning):
        model = model.pruned(settings.keep_rate)
    elif get_scorer(settings.scorer).needs_training:
        raise ValueError(
            f'scorer={settings.scorer!r} needs trained predictors: draw a model that has them (relevance_*).')
    else:
        model = sparsify(model, settings.keep_rate, scorer=settings.scorer)
    amp = settings.amp_dtype
    with torch.no_grad(), torch.autocast(images.device.type, amp, enabled=amp is not None):
        kept = [index[0] for index in model.kept_tokens(images, positions=positions)]
    return draw_pruning(subject.picture, positions, kept, **subject.windows).figure


def _draw_regions(subject: Subject, settings: Settings) -> Figure:
    return draw_regions(subject.picture, _regions(subject).segmentation[0]).figure


def _draw_means(subject: Subject, settings: Settings) -> Figure:
    return draw_region_means(subject.picture, _regions(subject).segmentation[0]).figure


def _draw_hierarchy(subject: Subject, settings: Settings) -> Figure:
    return draw_hierarchy(subject.picture, [level[0] for level in _regions(subject).levels])[0, 0].figure


@torch.no_grad()
def _regions(subject: Subject) -> Any:
    return subject.model.segment(subject.images)


KINDS = {
    'placement': Kind(
        _saved(_draw_placement), 'the windows, their centres and the share of the image they cover', alone='windows'),
    'seen': Kind(_saved(_draw_seen), 'only what the model reads', alone='windows'),
    'priors': Kind(_saved(_draw_priors), 'the spatial priors side by side', alone='windows'),
    'trajectory': Kind(
        _saved(_draw_trajectory),
        'a search for the placement of least entropy: start, path and end of every token, and the loss'),
    'film': Kind(_write_film, 'the same as a .gif, or .mp4 with ffmpeg', check=check_film),
    'density': Kind(
        _saved(_draw_density), 'the density of a placer, the lattice that it carries, and the windows'),
    'budgets': Kind(
        _write_budgets, 'a .gif or .mp4 of the windows at 4 to 100 tokens', alone='windows', check=check_film),
    'pruning': Kind(
        _saved(_draw_pruning),
        'which tokens the model drops at which stage; one that drops none is pruned by --scorer'),
    'regions': Kind(_saved(_draw_regions), 'borders of the regions that are the tokens of dHT', alone='regions'),
    'means': Kind(_saved(_draw_means), 'each of them filled with its mean colour', alone='regions'),
    'hierarchy': Kind(_saved(_draw_hierarchy), 'its levels, one by one', alone='regions'),
}
