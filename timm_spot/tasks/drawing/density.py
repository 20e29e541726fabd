"""Pictures of a density that places tokens, and of its placements from few tokens to many (extra `viz`)."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Sequence

import numpy as np
import torch

from ...ops.density import place_by_density
from .figure import (
    DARK,
    GREY,
    ORANGE,
    Picture,
    add_windows,
    check_film,
    figure_size,
    new_figure,
    rectangles,
    show,
    to_picture,
    write_film,
)
from .placements import draw_placement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES, _POINTS = 12, 64  # of the lattice that is drawn: lines each way, points of each


def draw_density(
        image: Picture,
        density: torch.Tensor,
        positions: torch.Tensor,
        window: int,
        convention: str = 'patch',
) -> np.ndarray:
    """Draw a density over an image, the lattice that it carries, and the windows of a placement, side by side.

    Args:
        image: See `draw_placement`.
        density: (h, w), summing to one, as `model.placer.density(images)[0]`.
        positions: (N, 2) or (1, N, 2), with sizes in two more columns.
        window: Side of a window in pixels.
        convention: Geometry of the windows, see `timm_spot.sample_windows`.

    Returns:
        The three axes.

    Raises:
        TypeError: `image` is of no known kind.
        ValueError: `density` is no map, or `positions` no placement.
    """
    if density.ndim != 2:
        raise ValueError(f'density must have shape (h, w), got {tuple(density.shape)}.')
    picture = to_picture(image)
    H, W = picture.shape[:2]
    width, height = figure_size(picture)
    axes: np.ndarray = new_figure(3 * width, height).subplots(1, 3)
    grey = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2)
    for ax in axes[:2]:
        show(ax, grey)
    density = density.detach().cpu().float()
    axes[0].imshow(
        density.numpy(), cmap='cividis', alpha=0.75, extent=(-0.5, W - 0.5, H - 0.5, -0.5), interpolation='bilinear')
    axes[0].set_title(f'density, {density.shape[0]} x {density.shape[1]}', color=GREY, fontsize='medium')

    lines = place_by_density(_mesh(), density[None])[0].unflatten(0, (2 * _LINES, _POINTS)) * torch.tensor([H, W]) - 0.5
    for line in lines:
        axes[1].plot(line[:, 1], line[:, 0], color=DARK, linewidth=2.2)
        axes[1].plot(line[:, 1], line[:, 0], color=ORANGE, linewidth=1.)
    axes[1].set_title('the even lattice, carried', color=GREY, fontsize='medium')
    draw_placement(image, positions, window, axes[2], convention)
    return axes


def animate_budgets(
        image: Picture,
        placements: Sequence[torch.Tensor],
        window: int,
        path: str | Path,
        fps: int = 10,
        convention: str = 'patch',
) -> Path:
    """Write placements of one image as a film, one frame for each: the windows and their count.

    Args:
        image: See `draw_placement`.
        placements: (N, 2) each, of any budgets; with sizes in two more columns.
        window: Side of a window in pixels.
        path: A .gif, or a .mp4 where ffmpeg is installed.
        fps: Frames a second.
        convention: Geometry of the windows, see `timm_spot.sample_windows`.

    Returns:
        The path.

    Raises:
        TypeError: `image` is of no known kind.
        ValueError: Another suffix, or what is no placement.
        RuntimeError: A .mp4 without ffmpeg.
    """
    path = Path(path)
    check_film(path)
    picture = to_picture(image)
    drawn = [rectangles(placement, window, picture, convention) for placement in placements]

    def frames(ax: Axes) -> Iterator[str]:
        for centres, sides in drawn:
            add_windows(ax, centres, sides)
            yield f'{len(centres)} tokens'

    return write_film(picture, frames, path, fps)


def _mesh() -> torch.Tensor:
    """Points of evenly spaced horizontal and vertical lines, (2 * lines * points, 2)."""
    line, point = (torch.arange(_LINES) + 0.5) / _LINES, torch.linspace(0, 1, _POINTS)
    across = torch.stack(torch.meshgrid(line, point, indexing='ij'), dim=-1)
    return torch.cat([across, across.flip(-1)]).flatten(0, 1)
