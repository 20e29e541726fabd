"""Pictures of placements, and of the priors that draw them (extra `viz`)."""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ...ops.placements import sample_positions
from ...ops.saliency import energy, spectral_residual
from ...ops.windows import sample_windows, split_placement
from .figure import (
    BLANK,
    GREY,
    Picture,
    add_windows,
    figure_size,
    hide_frame,
    new_axes,
    new_figure,
    rectangles,
    show,
    to_picture,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_placement(
        image: Picture,
        positions: torch.Tensor,
        window: int,
        ax: Axes | None = None,
        convention: str = 'patch',
) -> Axes:
    """Draw an image with the windows of a placement on it, their centres, and the share of the image they cover.

    Args:
        image: PIL image, uint8 array (H, W[, C]) or tensor (C, H, W) or (1, C, H, W). A float tensor with values
            outside [0, 1] is taken for a normalised one and stretched from its smallest to its largest value.
        positions: (N, 2) or (1, N, 2) of (y, x); with sizes (N, 3) or (N, 4), the spacing of each window in pixels
            behind it, one or along (y, x).
        window: Side of a window in pixels.
        ax: Where to draw; a new figure by default.
        convention: Geometry of the windows, see `timm_spot.sample_windows`.

    Raises:
        TypeError: `image` is none of these.
        ValueError: `image` or `positions` has the wrong shape or is not finite.
    """
    picture = to_picture(image)
    centres, sides = rectangles(positions, window, picture, convention)
    ax = new_axes(picture) if ax is None else ax
    show(ax, picture)
    add_windows(ax, centres, sides)
    share = _covered(centres, sides, picture).mean()
    ax.set_title(f'{len(centres)} tokens cover {share:.0%}', color=GREY, fontsize='medium')
    return ax


def draw_seen(
        image: Picture,
        positions: torch.Tensor,
        window: int,
        ax: Axes | None = None,
        convention: str = 'patch',
) -> Axes:
    """Draw only what windows read, coarse ones as coarse as they are; arguments and errors of `draw_placement`."""
    picture = to_picture(image)
    centres, sides = rectangles(positions, window, picture, convention)
    covered = _covered(centres, sides, picture)
    ax = new_axes(picture) if ax is None else ax
    seen = np.full((*covered.shape, 4), BLANK)
    seen[covered, :3], seen[covered, 3] = picture[covered], 1.
    if positions.shape[-1] > 2:
        seen[covered, :3] = _read_back(positions, window, centres, sides, picture)[covered]
    show(ax, seen)
    ax.set_title(f'{covered.mean():.0%} of the pixels', color=GREY, fontsize='medium')
    return ax


def _covered(centres: np.ndarray, sides: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Pixels (H, W) whose centre lies in a window."""
    y, x = (np.abs(np.arange(length) - centres[:, i:i + 1]) < sides[:, i:i + 1] / 2
            for i, length in enumerate(picture.shape[:2]))
    return (y[:, :, None] & x[:, None, :]).any(axis=0)


def _read_back(
        placement: torch.Tensor,
        window: int,
        centres: np.ndarray,
        sides: np.ndarray,
        picture: np.ndarray,
) -> np.ndarray:
    """The picture (H, W, 3) from the samples of its windows, those of the finest on top."""
    positions, spacing = split_placement(placement.detach().cpu().float().view(1, -1, placement.shape[-1]))
    # Around grey: outside of the image a model sees zeros, which are the mean of its pixels.
    pixels = torch.from_numpy(picture).float().permute(2, 0, 1)[None] - 0.5
    windows = sample_windows(pixels, positions, window, spacing=spacing)[0] + 0.5
    painted = np.zeros_like(picture)
    for i in np.argsort(-sides.prod(axis=1)):
        inside = [np.flatnonzero(np.abs(np.arange(length) - c) < side / 2)
                  for length, c, side in zip(picture.shape[:2], centres[i], sides[i])]
        if (sides[i] <= window).all():  # all that there is to see
            painted[np.ix_(*inside)] = picture[np.ix_(*inside)]
            continue
        # Samples lie at the centres of k equal parts of the window, as pixels of a small picture do.
        y, x = (torch.from_numpy(2 * (at - c) / side) for at, c, side in zip(inside, centres[i], sides[i]))
        grid = torch.stack(torch.meshgrid(y, x, indexing='ij')[::-1], dim=-1).float()[None]
        patch = F.grid_sample(windows[i:i + 1], grid, padding_mode='border', align_corners=False)[0]
        painted[np.ix_(*inside)] = patch.permute(1, 2, 0).clamp(0, 1)
    return painted


def draw_priors(image: Picture | None = None, n_tokens: int = 25, window: int = 16) -> np.ndarray:
    """Draw the spatial priors side by side, each with its placement for seed 0.

    Args:
        image: See `draw_placement`. With one, its spectral residual and the salient priors on it are drawn as well,
            and its energy; by default a blank square of 224 pixels.
        n_tokens: Budget.
        window: Side of a window in pixels.

    Returns:
        Axes (rows, columns).

    Raises:
        TypeError: `image` is of no known kind.
        ValueError: A budget that the patch grid of the image cannot serve.
    """
    names = ['uniform', 'gaussian', 'sobol', 'isotropic', 'center', 'grid']
    saliency, maps = None, {}
    if image is None:
        picture = np.full((224, 224, 4), BLANK)
    else:
        picture = to_picture(image)
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
        saliency = spectral_residual(pixels)
        names += ['salient', 'salient_sobol', 'salient_inverse', 'salient_lattice']
        maps = {'spectral residual': saliency, 'energy': energy(pixels)}
    panels = len(names) + len(maps)
    width, height = (0.6 * side for side in figure_size(picture))
    width = max(width, 1.3)  # room for the longest title
    columns = panels // 2 if width < 2 * height else 2
    rows = panels // columns
    axes = new_figure(columns * width, rows * (height + 0.3)).subplots(rows, columns)
    for ax, name in zip(axes.flat, names):
        positions = sample_positions(
            name, n_tokens, picture.shape[:2], saliency=saliency, generator=torch.Generator().manual_seed(0),
            window=window)
        show(ax, picture)
        add_windows(ax, *rectangles(positions, window, picture, 'patch'))
        ax.set_title(name, color=GREY, fontsize='medium')
    for ax, (name, one) in zip(axes.flat[len(names):], maps.items()):
        ax.imshow(one[0].numpy(), cmap='cividis')
        hide_frame(ax)
        ax.set_title(name, color=GREY, fontsize='medium')
    return axes
