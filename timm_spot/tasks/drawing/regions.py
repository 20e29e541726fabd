"""Pictures of regions and their hierarchy, the tokens of dHT (extra `viz`)."""
from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

import numpy as np
import torch

from .figure import GREY, ORANGE, Picture, figure_size, new_axes, new_figure, show, to_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_regions(image: Picture, segmentation: torch.Tensor, ax: Axes | None = None) -> Axes:
    """Draw an image with the borders of its regions.

    Args:
        image: See `draw_placement`.
        segmentation: (H, W), a number for each region.
        ax: Where to draw; a new figure by default.

    Raises:
        TypeError: `image` is of no known kind.
        ValueError: The segmentation has another size than the image.
    """
    from matplotlib.colors import to_rgb

    picture = to_picture(image).copy()
    ids = _region_ids(segmentation, picture)
    border = np.zeros(ids.shape, dtype=bool)
    border[1:] |= ids[1:] != ids[:-1]
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    picture[border] = to_rgb(ORANGE)
    ax = new_axes(picture) if ax is None else ax
    show(ax, picture)
    ax.set_title(f'{len(np.unique(ids))} regions', color=GREY, fontsize='medium')
    return ax


def draw_region_means(image: Picture, segmentation: torch.Tensor, ax: Axes | None = None) -> Axes:
    """Draw an image from nothing but the mean colour of each region, as `draw_regions`; the title says how well."""
    picture = to_picture(image)
    ids = np.unique(_region_ids(segmentation, picture), return_inverse=True)[1].reshape(picture.shape[:2])
    sums = np.stack([np.bincount(ids.ravel(), channel.ravel()) for channel in picture.transpose(2, 0, 1)], axis=1)
    means = (sums / np.bincount(ids.ravel())[:, None])[ids]
    error = np.square(means - picture).mean()
    ax = new_axes(picture) if ax is None else ax
    show(ax, means)
    psnr = '∞' if error == 0 else f'{-10 * np.log10(error):.1f}'
    ax.set_title(f'{ids.max() + 1} means, PSNR {psnr} dB', color=GREY, fontsize='medium')
    return ax


def draw_hierarchy(image: Picture, levels: Sequence[torch.Tensor]) -> np.ndarray:
    """Draw the levels of a hierarchy, `regions.levels` of one image: borders above, means below.

    Returns:
        Axes (2, levels).
    """
    picture = to_picture(image)
    if not levels:
        raise ValueError('levels is empty: an image of so few pixels has no hierarchy.')
    width, height = figure_size(picture)
    # Small panels, beside which titles are large enough to be read where the whole is shown as wide as a page.
    axes = new_figure(0.6 * width * len(levels), 1.2 * height + 0.3).subplots(2, len(levels), squeeze=False)
    for column, segmentation in zip(axes.T, levels):
        draw_regions(image, segmentation, column[0])
        draw_region_means(image, segmentation, column[1])
    return axes


def _region_ids(segmentation: torch.Tensor, picture: np.ndarray) -> np.ndarray:
    if tuple(segmentation.shape) != picture.shape[:2]:
        raise ValueError(
            f'segmentation of shape {tuple(segmentation.shape)} must match the image, {picture.shape[:2]}.')
    return segmentation.cpu().numpy()
