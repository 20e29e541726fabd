"""Pictures of a search for better placements, SPoT-ON (extra `viz`)."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Sequence

import numpy as np
import torch

from ..extras import need
from .figure import (
    BLUE,
    DARK,
    GREY,
    ORANGE,
    SIDE,
    Picture,
    add_windows,
    check_film,
    figure_size,
    new_figure,
    rectangles,
    show,
    to_picture,
    to_pixels,
    write_film,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..search.result import OracleResult

def draw_trajectory(
        image: Picture,
        result: OracleResult,
        index: int = 0,
        axes: Sequence[Axes] | None = None,
        convention: str = 'patch',
        objective: str = '',
) -> np.ndarray:
    """Draw where a search moved every token (start, path and end), and beside it the loss at each step.

    Args:
        image: The image searched, see `draw_placement`.
        result: Of `timm_spot.optimize_positions`: its `trajectory` (B, steps + 1, N, 2) and `losses` (B, steps + 1).
        index: Which image of the result.
        axes: Two axes, for the picture and for the loss; a new figure by default.
        convention: Where positions lie, see `timm_spot.sample_windows`.
        objective: Name of what the loss is, for its title.

    Returns:
        The two axes.

    Raises:
        TypeError: `image` is of no known kind.
        ValueError: The result has no trajectory or no such image.
    """
    need('matplotlib')
    from matplotlib import patheffects

    picture = to_picture(image)
    trajectory, losses = _trajectory(result, index)
    points = to_pixels(trajectory[..., :2].numpy(), picture, convention)  # steps + 1, N, 2
    if axes is None:
        width, height = figure_size(picture)
        beside = max(width, 0.8 * SIDE)
        figure = new_figure(width + beside + 0.5, max(height, 0.7 * SIDE) + 0.6)
        axes = figure.subplots(1, 2, width_ratios=(width, beside))
    image_ax, loss_ax = axes
    show(image_ax, picture)
    # A dark casing under a light line shows on any photograph.
    casing = [patheffects.Stroke(linewidth=3, foreground=DARK), patheffects.Normal()]
    image_ax.plot(points[:, :, 1], points[:, :, 0], color='white', linewidth=1.5, path_effects=casing, zorder=2,
                  clip_on=False)
    image_ax.scatter(points[0, :, 1], points[0, :, 0], s=28, color=BLUE, edgecolors='white', linewidths=0.8,
                     marker='s', zorder=3, clip_on=False, label='start')
    image_ax.scatter(points[-1, :, 1], points[-1, :, 0], s=28, color=ORANGE, edgecolors=DARK, linewidths=0.8,
                     marker='o', zorder=4, clip_on=False, label='end')
    _include(image_ax, points, picture)
    image_ax.set_title(f'{points.shape[1]} tokens, {len(points) - 1} steps', color=GREY, fontsize='medium')
    image_ax.legend(
        loc='upper center', bbox_to_anchor=(0.5, 0.), ncols=2, frameon=False, labelcolor=GREY, fontsize='medium')

    _draw_losses(loss_ax, losses, picture, objective)
    return np.array([image_ax, loss_ax])


def _draw_losses(ax: Axes, losses: torch.Tensor, picture: np.ndarray, objective: str) -> None:
    ax.plot(losses, color=BLUE, linewidth=2, marker='o', markersize=4 if len(losses) <= 30 else 0)
    # As high as the picture beside it, unless that is a strip.
    ax.set_box_aspect(min(max(picture.shape[0] / picture.shape[1], 0.6), 1.2))
    ax.set_facecolor('none')
    ax.set_xlabel('step', color=GREY)
    ax.set_title(f'loss: {objective}' if objective else 'loss', color=GREY, fontsize='medium')
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # of a MaxNLocator
    ax.tick_params(colors=GREY)
    ax.spines[['top', 'right']].set_visible(False)
    ax.spines[['bottom', 'left']].set_color(GREY)


def animate(
        image: Picture,
        result: OracleResult,
        window: int,
        path: str | Path,
        index: int = 0,
        fps: int = 5,
        convention: str = 'patch',
) -> Path:
    """Write a search as a film, one frame for each step: the windows as they move, the step and the loss.

    Args:
        image: The image searched, see `draw_placement`.
        result: Of `timm_spot.optimize_positions`, see `draw_trajectory`.
        window: Side of a window in pixels.
        path: A .gif, or a .mp4 where ffmpeg is installed.
        index: Which image of the result.
        fps: Frames a second.
        convention: Geometry of the windows, see `timm_spot.sample_windows`.

    Returns:
        The path.

    Raises:
        TypeError: `image` is of no known kind.
        ValueError: Another suffix; the result has no trajectory or no such image.
        RuntimeError: A .mp4 without ffmpeg.
    """
    path = Path(path)
    check_film(path)
    picture = to_picture(image)
    trajectory, losses = _trajectory(result, index)
    centres, sides = rectangles(trajectory.flatten(0, 1), window, picture, convention)
    centres, sides = (a.reshape(*trajectory.shape[:2], 2) for a in (centres, sides))

    def frames(ax: Axes) -> Iterator[str]:
        for step, loss in enumerate(losses):
            add_windows(ax, centres[step], sides[step])
            _include(ax, centres, picture)
            yield f'step {step}, loss {loss:.3f}'

    return write_film(picture, frames, path, fps)


def _trajectory(result: OracleResult, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Placements (steps + 1, N, 2), with sizes (steps + 1, N, 4), and losses (steps + 1,) of one image of a result."""
    if result.trajectory is None:
        raise ValueError('result has no trajectory: search with optimize_positions(..., record=True).')
    if not 0 <= index < len(result.losses):
        raise ValueError(f'index={index} does not exist, the result holds {len(result.losses)} images.')
    return result.trajectory[index].detach().cpu(), result.losses[index].detach().cpu()


def _include(ax: Axes, points: np.ndarray, picture: np.ndarray) -> None:
    """Widen the view where a search left the image."""
    (top, left), (bottom, right) = points.min(axis=(0, 1)), points.max(axis=(0, 1))
    H, W = picture.shape[:2]
    ax.set(xlim=(min(-0.5, left), max(W - 0.5, right)), ylim=(max(H - 0.5, bottom), min(-0.5, top)))
