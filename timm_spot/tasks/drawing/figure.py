"""What all pictures share: images of any kind, figures for light and for dark pages, windows (extra `viz`).

Figures are transparent and text is mid-grey. What matters is told apart by lightness and shape as well as by colour;
the colours are Okabe & Ito's for the colour-blind - https://jfly.uni-koeln.de/color/
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, Union

import numpy as np
import torch
from PIL import Image

from ...ops.windows import check_convention, check_sized, split_placement
from ..extras import need
from ..kept import whole_file
from ..pictures.images import to_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = Union[torch.Tensor, np.ndarray, Image.Image]

BLUE, ORANGE, GREY, DARK = '#0072b2', '#e69f00', '#808080', '#1c1c1c'
SIDE = 4.  # inches of a picture's longer side
ROUNDING = 1e-3  # what an image whose normalisation was undone may lie outside [0, 1]
FILM_SUFFIXES = ('.gif', '.mp4')
BLANK = (0.5, 0.5, 0.5, 0.25)  # lets the page show through


def to_picture(image: Picture) -> np.ndarray:
    """Any image that `draw_placement` takes as a float array (H, W, 3) in [0, 1]."""
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(image), dtype=np.float32) / 255
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f'image is an array of {image.dtype}, pass uint8 (or a tensor).')
        tensor = torch.from_numpy(image if image.ndim == 3 else image[..., None]).permute(2, 0, 1)
    elif isinstance(image, torch.Tensor):
        tensor = image.detach().cpu()
        tensor = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
    else:
        raise TypeError(f'image must be a PIL image, a uint8 array or a tensor, got {type(image).__name__}.')
    if tensor.ndim != 3 or len(tensor) not in (1, 3) or tensor.numel() == 0:
        raise ValueError(
            f'image of shape {tuple(image.shape)} is no single picture: expected (3, H, W) or (1, H, W) for a tensor, '
            '(H, W, 3) or (H, W) for an array.')
    tensor = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if not tensor.isfinite().all():
        raise ValueError(f'image of shape {tuple(image.shape)} holds NaN or infinity.')
    low, high = tensor.min(), tensor.max()
    if low < -ROUNDING or high > 1 + ROUNDING:
        tensor = (tensor - low) / (high - low)
    return tensor.clamp(0., 1.).expand(3, -1, -1).permute(1, 2, 0).numpy()


def figure_size(picture: np.ndarray) -> tuple[float, float]:
    """Width and height in inches that keep the aspect; never too narrow for a title."""
    height, width = np.array(picture.shape[:2]) * SIDE / max(picture.shape[:2])
    return max(width, 1.8), height


def new_figure(width: float, height: float) -> Figure:
    need('matplotlib')
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height + 0.3), layout='constrained')
    figure.patch.set_alpha(0.)
    return figure


def new_axes(picture: np.ndarray) -> Axes:
    return new_figure(*figure_size(picture)).subplots()


def check_figure(path: Path) -> None:
    """Raise ValueError where matplotlib writes no picture of this name, before any work."""
    need('matplotlib')
    from matplotlib.backend_bases import FigureCanvasBase

    suffixes = sorted(f'.{name}' for name in FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower() not in suffixes:
        raise ValueError(f'path={str(path)!r} must end in one of {", ".join(suffixes)}.')


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, and close it."""
    import matplotlib.pyplot as plt

    try:
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=150)
    finally:
        plt.close(figure)


def check_film(path: Path) -> None:
    """Raise ValueError or RuntimeError where a film of this name cannot be written, before any work."""
    need('matplotlib')
    from matplotlib.animation import FFMpegWriter

    if path.suffix not in FILM_SUFFIXES:
        raise ValueError(f'path={str(path)!r} must end in {" or ".join(FILM_SUFFIXES)}.')
    if path.suffix == '.mp4' and not FFMpegWriter.isAvailable():
        raise RuntimeError(f'{path} needs the program ffmpeg, which is not installed: install it, or write a .gif.')


def write_film(picture: np.ndarray, frames: Callable[[Axes], Iterator[str]], path: Path, fps: int) -> Path:
    """Write a film of what is drawn on a picture, whole or not at all.

    Args:
        picture: (H, W, 3), already shown on the axes that each frame begins with.
        frames: Draws one frame after the other on the axes it is given, and yields the title of each.
        path: A .gif, or a .mp4 where ffmpeg is installed; it comes back.
        fps: Frames a second.
    """
    import matplotlib.pyplot as plt
    from matplotlib.animation import FFMpegWriter, PillowWriter

    figure = new_figure(*figure_size(picture))
    # Films know no transparency. Codecs want an even size.
    figure.patch.set(facecolor='white', alpha=1.)
    figure.set_size_inches(np.ceil(figure.get_size_inches() * 50) / 50)
    ax = figure.subplots()
    writer = PillowWriter(fps) if path.suffix == '.gif' else FFMpegWriter(fps)
    try:
        with whole_file(path) as partial, writer.saving(figure, partial, dpi=100):
            show(ax, picture)
            for title in frames(ax):
                ax.set_title(title, color=DARK, fontsize='medium')
                writer.grab_frame(facecolor='white')
                ax.clear()
                show(ax, picture)
    finally:
        plt.close(figure)
    return path


def show(ax: Axes, picture: np.ndarray) -> None:
    H, W = picture.shape[:2]
    ax.imshow(picture, extent=(-0.5, W - 0.5, H - 0.5, -0.5))
    hide_frame(ax)
    ax.set(xlim=(-0.5, W - 0.5), ylim=(H - 0.5, -0.5))


def hide_frame(ax: Axes) -> None:
    """Hide all but a label that the caller may add."""
    ax.set(xticks=[], yticks=[], facecolor='none')
    ax.spines[:].set_visible(False)


def rectangles(
        positions: torch.Tensor,
        window: int,
        picture: np.ndarray,
        convention: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Centres (N, 2) of windows in the pixel coordinates of imshow, and their sides (N, 2), both as (y, x).

    `positions` is a placement (N, 2), (N, 3) or (N, 4), see `timm_spot.ops.windows.split_placement`.
    """
    check_convention(convention, window)
    positions = positions.detach().cpu()
    positions = positions[0] if positions.ndim == 3 and len(positions) == 1 else positions
    if positions.ndim != 2 or positions.shape[-1] not in (2, 3, 4):
        raise ValueError(
            f'positions must have shape (N, 2), one placement, got {tuple(positions.shape)}; sizes lie in one or '
            'two more columns.')
    if not positions.isfinite().all():
        raise ValueError(f'positions of shape {tuple(positions.shape)} hold NaN or infinity.')
    size = np.array(picture.shape[:2])
    positions, spacing = split_placement(positions)
    if spacing is not None:
        check_sized(convention, 'positions hold spacings')
    sides = window * 2 * size / size.sum() if convention == 'spot' else np.array([window, window])
    sides = np.broadcast_to(sides, positions.shape) if spacing is None else window * spacing.numpy()
    return to_pixels(positions.numpy(), picture, convention), sides


def to_pixels(positions: np.ndarray, picture: np.ndarray, convention: str) -> np.ndarray:
    """Positions (..., 2) in the pixel coordinates of imshow, where pixel i has its centre at i."""
    return positions * picture.shape[:2] - (0. if convention == 'spot' else 0.5)


def add_windows(ax: Axes, centres: np.ndarray, sides: np.ndarray) -> None:
    from matplotlib import patheffects
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    windows = [
        Rectangle((x - width / 2, y - height / 2), width, height) for (y, x), (height, width) in zip(centres, sides)]
    # Outlines, so that what a window reads is seen; the dark casing shows them on any ground.
    casing = [patheffects.withStroke(linewidth=2.6, foreground=DARK)]
    ax.add_collection(PatchCollection(
        windows, facecolor='none', edgecolor=ORANGE, linewidth=1.2, path_effects=casing))
    ax.scatter(centres[:, 1], centres[:, 0], s=9, color='white', edgecolors=DARK, linewidths=0.6, zorder=3)
