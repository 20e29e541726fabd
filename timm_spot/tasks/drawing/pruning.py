"""Pictures of what pruning leaves of an image (extra `viz`)."""
from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

import numpy as np
import torch

from ..extras import need
from .figure import DARK, GREY, ORANGE, Picture, new_axes, rectangles, show, to_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_pruning(
        image: Picture,
        positions: torch.Tensor,
        kept: Sequence[torch.Tensor],
        window: int,
        ax: Axes | None = None,
        convention: str = 'patch',
) -> Axes:
    """Draw which tokens a model dropped at which stage: their windows are the darker the sooner they fell.

    Args:
        image: See `draw_placement`.
        positions: (N, 2) or (1, N, 2) of (y, x), where all tokens lie.
        kept: For each stage the indices (n,) or (1, n) of the tokens left, as `kept_tokens` of a model of
            `timm_spot.sparsify` gives them.
        window: Side of a window in pixels.
        ax: Where to draw; a new figure by default.
        convention: Geometry of the windows, see `timm_spot.sample_windows`.

    Raises:
        TypeError: `image` is of no known kind.
        ValueError: `image` or `positions` has the wrong shape or is not finite; `kept` is empty or holds an index that
            `positions` has not.
    """
    need('matplotlib')
    from matplotlib import patheffects
    from matplotlib.patches import Patch, Rectangle

    picture = to_picture(image)
    centres, sides = rectangles(positions, window, picture, convention)
    if not kept:
        raise ValueError('kept is empty: it must hold the tokens left at each stage, see `kept_tokens`.')
    fell_at = np.zeros(len(centres), dtype=int)
    for index in kept:
        index = index.detach().cpu().flatten()
        if len(index) and not 0 <= index.min() <= index.max() < len(centres):
            wrong = index.min() if index.min() < 0 else index.max()
            raise ValueError(f'kept holds index {wrong.item()}, positions only {len(centres)} tokens.')
        fell_at[index.numpy()] += 1  # the stage after which it falls, or all of them

    ax = new_axes(picture) if ax is None else ax
    show(ax, picture)
    casing = [patheffects.withStroke(linewidth=2, foreground=DARK)]
    for (y, x), (height, width), stage in zip(centres, sides, fell_at):
        corner = (x - width / 2, y - height / 2)
        if stage == len(kept):
            ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=ORANGE, linewidth=1.5, zorder=3))
            continue
        shade = 0.85 * (1 - stage / len(kept))
        ax.add_patch(Rectangle(corner, width, height, facecolor=DARK, alpha=shade, linewidth=0))
        ax.text(x, y, str(stage + 1), color='white', fontsize='x-small', ha='center', va='center', path_effects=casing)
    shades = [0.85 * (1 - stage / len(kept)) for stage in range(len(kept))]
    ax.legend(
        handles=[
            *(Patch(facecolor=DARK, alpha=shade, label=f'falls at stage {i + 1}') for i, shade in enumerate(shades)),
            Patch(facecolor='none', edgecolor=ORANGE, linewidth=1.5, label='stays')],
        loc='upper center', bbox_to_anchor=(0.5, 0.), ncols=2, frameon=False, labelcolor=GREY, fontsize='small')
    counts = ' → '.join(str(n) for n in [len(centres), *(index.numel() for index in kept)])
    ax.set_title(f'{counts} tokens', color=GREY, fontsize='medium')
    return ax
