"""Pictures of placements (extra `viz`).

Drawn for light and for dark pages: figures are transparent and text is mid-grey. What matters is told apart by
lightness and shape as well as by colour; the colours are Okabe & Ito's for the colour-blind -
https://jfly.uni-koeln.de/color/
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image

from ..ops.saliency import spectral_residual
from ..ops.samplers import sample_positions
from ..ops.windows import sample_windows
from .predict import to_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..models.spot_mae import Reconstruction
    from .oracle import OracleResult

Picture = Union[torch.Tensor, np.ndarray, Image.Image]

BLUE, ORANGE, GREY = '#0072b2', '#e69f00', '#808080'
_SIDE = 4.  # inches of a picture's longer side
_DARK = '#1c1c1c'
_ROUNDING = 1e-3  # what an image whose normalisation was undone may lie outside [0, 1]
_BLANK = (0.5, 0.5, 0.5, 0.25)  # lets the page show through


def draw_placement(
        image: Picture,
        positions: torch.Tensor,
        window: int,
        ax: Optional[Axes] = None,
        convention: str = 'patch',
) -> Axes:
    """Draw an image with the windows of a placement on it, their centres, and the share of the image they cover.

    Args:
        image: PIL image, uint8 array (H, W[, C]) or tensor (C, H, W) or (1, C, H, W). A float tensor with values
            outside [0, 1] is taken for a normalised one and stretched from its smallest to its largest value.
        positions: (N, 2) or (1, N, 2) of (y, x).
        window: Side of a window in pixels.
        ax: Where to draw; a new figure by default.
        convention: Geometry of the windows, see `timm_spot.sample_windows`.

    Raises:
        TypeError: `image` is none of these.
        ValueError: `image` or `positions` has the wrong shape or is not finite.
    """
    picture = to_picture(image)
    centres, sides = _rectangles(positions, window, picture, convention)
    ax = _new_axes(picture) if ax is None else ax
    _show(ax, picture)
    _add_windows(ax, centres, sides)
    share = _covered(centres, sides, picture).mean()
    ax.set_title(f'{len(centres)} tokens cover {share:.0%}', color=GREY, fontsize='medium')
    return ax


def draw_seen(
        image: Picture,
        positions: torch.Tensor,
        window: int,
        ax: Optional[Axes] = None,
        convention: str = 'patch',
) -> Axes:
    """Draw only the pixels inside windows; arguments and errors are those of `draw_placement`."""
    picture = to_picture(image)
    covered = _covered(*_rectangles(positions, window, picture, convention), picture)
    ax = _new_axes(picture) if ax is None else ax
    seen = np.full((*covered.shape, 4), _BLANK)
    seen[covered, :3], seen[covered, 3] = picture[covered], 1.
    _show(ax, seen)
    ax.set_title(f'{covered.mean():.0%} of the pixels', color=GREY, fontsize='medium')
    return ax


def draw_pruning(
        image: Picture,
        positions: torch.Tensor,
        kept: Sequence[torch.Tensor],
        window: int,
        ax: Optional[Axes] = None,
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
    from matplotlib import patheffects
    from matplotlib.patches import Rectangle

    picture = to_picture(image)
    centres, sides = _rectangles(positions, window, picture, convention)
    if not kept:
        raise ValueError('kept is empty: it must hold the tokens left at each stage, see `kept_tokens`.')
    fell_at = np.zeros(len(centres), dtype=int)
    for index in kept:
        index = index.detach().cpu().flatten()
        if len(index) and not 0 <= index.min() <= index.max() < len(centres):
            raise ValueError(f'kept holds index {index.max().item()}, positions only {len(centres)} tokens.')
        fell_at[index.numpy()] += 1  # the stage after which it falls, or all of them

    ax = _new_axes(picture) if ax is None else ax
    _show(ax, picture)
    casing = [patheffects.withStroke(linewidth=2, foreground=_DARK)]
    for (y, x), stage in zip(centres, fell_at):
        corner = (x - sides[1] / 2, y - sides[0] / 2)
        if stage == len(kept):
            ax.add_patch(Rectangle(corner, sides[1], sides[0], fill=False, edgecolor=ORANGE, linewidth=1.5, zorder=3))
            continue
        shade = 0.85 * (1 - stage / len(kept))
        ax.add_patch(Rectangle(corner, sides[1], sides[0], facecolor=_DARK, alpha=shade, linewidth=0))
        ax.text(x, y, str(stage + 1), color='white', fontsize='x-small', ha='center', va='center', path_effects=casing)
    counts = ' → '.join(str(n) for n in [len(centres), *(index.numel() for index in kept)])
    ax.set_title(f'{counts} tokens', color=GREY, fontsize='medium')
    return ax


def draw_regions(image: Picture, segmentation: torch.Tensor, ax: Optional[Axes] = None) -> Axes:
    """Draw an image with the borders of its regions.

    Args:
        image: See `draw_placement`.
        segmentation: (H, W), a number for each region.
        ax: Where to draw; a new figure by default.

    Raises:
        TypeError: `image` is of no known kind.
        ValueError: The segmentation has another size than the image.
    """
    picture = to_picture(image).copy()
    ids = _region_ids(segmentation, picture)
    border = np.zeros(ids.shape, dtype=bool)
    border[1:] |= ids[1:] != ids[:-1]
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    picture[border] = _rgb(ORANGE)
    ax = _new_axes(picture) if ax is None else ax
    _show(ax, picture)
    ax.set_title(f'{len(np.unique(ids))} regions', color=GREY, fontsize='medium')
    return ax


def draw_region_means(image: Picture, segmentation: torch.Tensor, ax: Optional[Axes] = None) -> Axes:
    """Draw an image from nothing but the mean colour of each region, as `draw_regions`; the title says how well."""
    picture = to_picture(image)
    ids = np.unique(_region_ids(segmentation, picture), return_inverse=True)[1].reshape(picture.shape[:2])
    sums = np.stack([np.bincount(ids.ravel(), channel.ravel()) for channel in picture.transpose(2, 0, 1)], axis=1)
    means = (sums / np.bincount(ids.ravel())[:, None])[ids]
    error = np.square(means - picture).mean()
    ax = _new_axes(picture) if ax is None else ax
    _show(ax, means)
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
    width, height = _figure_size(picture)
    axes = _new_figure(width * len(levels), 2 * height).subplots(2, len(levels), squeeze=False)
    for column, segmentation in zip(axes.T, levels):
        draw_regions(image, segmentation, column[0])
        draw_region_means(image, segmentation, column[1])
    return axes


def draw_trajectory(
        image: Picture,
        result: OracleResult,
        index: int = 0,
        axes: Optional[Sequence[Axes]] = None,
) -> np.ndarray:
    """Draw where a search moved every token (start, path and end), and beside it the loss at each step.

    Args:
        image: The image searched, see `draw_placement`.
        result: Of `timm_spot.optimize_positions`: its `trajectory` (B, steps + 1, N, 2) and `losses` (B, steps + 1).
        index: Which image of the result.
        axes: Two axes, for the picture and for the loss; a new figure by default.

    Returns:
        The two axes.

    Raises:
        TypeError: `image` is of no known kind.
        ValueError: The result has no trajectory or no such image.
    """
    from matplotlib import patheffects

    picture = to_picture(image)
    trajectory, losses = _trajectory(result, index)
    points = trajectory.numpy() * picture.shape[:2] - 0.5  # steps + 1, N, 2
    if axes is None:
        width, height = _figure_size(picture)
        figure = _new_figure(width + 0.8 * _SIDE, max(height, 0.7 * _SIDE))
        axes = figure.subplots(1, 2, width_ratios=(width, 0.8 * _SIDE))
    image_ax, loss_ax = axes
    _show(image_ax, picture)
    # A dark casing under a light line shows on any photograph.
    casing = [patheffects.Stroke(linewidth=3, foreground=_DARK), patheffects.Normal()]
    image_ax.plot(points[:, :, 1], points[:, :, 0], color='white', linewidth=1.5, path_effects=casing, zorder=2,
                  clip_on=False)
    image_ax.scatter(points[0, :, 1], points[0, :, 0], s=28, color=BLUE, edgecolors='white', linewidths=0.8,
                     marker='s', zorder=3, clip_on=False, label='start')
    image_ax.scatter(points[-1, :, 1], points[-1, :, 0], s=28, color=ORANGE, edgecolors=_DARK, linewidths=0.8,
                     marker='o', zorder=4, clip_on=False, label='end')
    _include(image_ax, points, picture)
    image_ax.legend(
        loc='upper center', bbox_to_anchor=(0.5, 0.), ncols=2, frameon=False, labelcolor=GREY, fontsize='medium')

    loss_ax.plot(losses, color=BLUE, linewidth=2, marker='o', markersize=4 if len(losses) <= 30 else 0)
    loss_ax.set_box_aspect(0.75)
    loss_ax.set_facecolor('none')
    loss_ax.set_xlabel('step', color=GREY)
    loss_ax.set_title('loss', color=GREY, fontsize='medium')
    loss_ax.xaxis.get_major_locator().set_params(integer=True)
    loss_ax.tick_params(colors=GREY)
    loss_ax.spines[['top', 'right']].set_visible(False)
    loss_ax.spines[['bottom', 'left']].set_color(GREY)
    return np.array([image_ax, loss_ax])


def draw_reconstruction(
        image: torch.Tensor,
        result: Reconstruction,
        index: int = 0,
        axes: Optional[Sequence[Axes]] = None,
) -> np.ndarray:
    """Draw an image, the windows that a masked autoencoder saw of it, and what it made of the dropped ones.

    The autoencoder predicts normalised pixels: each dropped window is drawn with the true mean and contrast. Where
    windows overlap, their average is drawn; each lies at the nearest whole pixel.

    Args:
        image: (C, H, W) or (1, C, H, W), as the model saw it.
        result: Of a `spot_mae_vit_*` model.
        index: Which image of the result.
        axes: Three axes; a new figure by default.

    Returns:
        The three axes.

    Raises:
        ValueError: The result holds no such image, or one of other channels.
    """
    image = image.detach().cpu().float()
    image = image[0] if image.ndim == 4 and len(image) == 1 else image
    if not 0 <= index < len(result.predicted):
        raise ValueError(f'index={index} does not exist, the result holds {len(result.predicted)} images.')
    pixels = result.predicted.shape[-1]
    window = round((pixels / len(image)) ** 0.5)
    if image.ndim != 3 or len(image) * window ** 2 != pixels:
        raise ValueError(f'image of shape {tuple(image.shape)} has other channels than windows of {pixels} values.')
    kept, dropped = (p[index:index + 1].detach().cpu() for p in (result.kept, result.dropped))
    truth = sample_windows(image[None], dropped, window)[0].flatten(1)  # M, C k k
    predicted = result.predicted[index].detach().cpu().float()
    predicted = predicted * truth.std(dim=1, keepdim=True) + truth.mean(dim=1, keepdim=True)
    seen = sample_windows(image[None], kept, window)[0]

    # One scale for all three: a picture's own, so that equal values look equal.
    low, high = image.min(), image.max()
    picture = ((image - low) / (high - low).clamp(min=_ROUNDING)).clamp(0, 1)
    axes = _new_figure(3 * _SIDE / 2, _SIDE / 2).subplots(1, 3) if axes is None else axes
    titles = ('image', f'{kept.shape[1]} windows seen', f'{dropped.shape[1]} windows reconstructed')
    panels = (
        to_picture(picture),
        _paste(seen, kept[0], image, low, high),
        _paste(predicted.view(-1, len(image), window, window), dropped[0], image, low, high),
    )
    for ax, panel, title in zip(axes, panels, titles):
        _show(ax, panel)
        ax.set_title(title, color=GREY, fontsize='medium')
    return np.asarray(axes)


def _paste(
        windows: torch.Tensor,
        positions: torch.Tensor,
        image: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
) -> np.ndarray:
    """Windows (N, C, k, k) at positions (N, 2) as a picture (H, W, 4), averaged, with nothing where no window lies."""
    C, H, W = image.shape
    k = windows.shape[-1]
    total, count = torch.zeros(C, H + 2 * k, W + 2 * k), torch.zeros(H + 2 * k, W + 2 * k)  # a frame for those outside
    corners = (positions * torch.tensor([H, W]) - k / 2).round().long() + k
    for window, (y, x) in zip(windows, corners.clamp(0, None).tolist()):
        total[:, y:y + k, x:x + k] += window
        count[y:y + k, x:x + k] += 1
    total, count = total[:, k:-k, k:-k], count[k:-k, k:-k]
    mean = (total / count.clamp(min=1) - low) / (high - low).clamp(min=_ROUNDING)
    picture = np.full((H, W, 4), _BLANK)
    picture[count > 0, :3] = mean.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)[count > 0]
    picture[count > 0, 3] = 1.
    return picture


def draw_priors(image: Optional[Picture] = None, n_tokens: int = 25, window: int = 16) -> np.ndarray:
    """Draw the spatial priors side by side, each with its placement for seed 0.

    Args:
        image: See `draw_placement`. With one, its spectral residual and the salient priors are drawn as well; by
            default a blank square of 224 pixels.
        n_tokens: Budget.
        window: Side of a window in pixels.

    Returns:
        Axes (rows, columns).

    Raises:
        TypeError: `image` is of no known kind.
        ValueError: A budget that the patch grid of the image cannot serve.
    """
    names = ['uniform', 'gaussian', 'sobol', 'isotropic', 'center', 'grid']
    saliency = None
    if image is None:
        picture = np.full((224, 224, 4), _BLANK)
    else:
        picture = to_picture(image)
        saliency = spectral_residual(torch.from_numpy(picture).permute(2, 0, 1)[None])
        names += ['salient', 'salient_sobol', 'salient_inverse']
    panels = len(names) + (saliency is not None)
    width, height = (0.6 * side for side in _figure_size(picture))
    width = max(width, 1.3)  # room for the longest title
    columns = panels // 2 if width < 2 * height else 2
    rows = panels // columns
    axes = _new_figure(columns * width, rows * (height + 0.3)).subplots(rows, columns)
    for ax, name in zip(axes.flat, names):
        positions = sample_positions(
            name, n_tokens, picture.shape[:2], saliency=saliency, generator=torch.Generator().manual_seed(0),
            window=window)
        _show(ax, picture)
        _add_windows(ax, *_rectangles(positions, window, picture, 'patch'))
        ax.set_title(name, color=GREY, fontsize='medium')
    if saliency is not None:
        ax = axes.flat[-1]
        ax.imshow(saliency[0].numpy(), cmap='cividis')
        _hide_frame(ax)
        ax.set_title('spectral residual', color=GREY, fontsize='medium')
    return axes


def animate(
        image: Picture,
        result: OracleResult,
        window: int,
        path: Union[str, Path],
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
    import matplotlib.pyplot as plt
    from matplotlib.animation import FFMpegWriter, PillowWriter

    path = Path(path)
    if path.suffix not in ('.gif', '.mp4'):
        raise ValueError(f'path={str(path)!r} must end in .gif or .mp4.')
    if path.suffix == '.mp4' and not FFMpegWriter.isAvailable():
        raise RuntimeError(f'{path} needs the program ffmpeg, which is not installed: install it, or write a .gif.')
    picture = to_picture(image)
    trajectory, losses = _trajectory(result, index)
    centres, sides = _rectangles(trajectory.flatten(0, 1), window, picture, convention)
    centres = centres.reshape(trajectory.shape)
    figure = _new_figure(*_figure_size(picture))
    # Films know no transparency: a dark frame with light text stands on any page. Codecs want an even size.
    figure.patch.set(facecolor=_DARK, alpha=1.)
    figure.set_size_inches(np.ceil(figure.get_size_inches() * 50) / 50)
    ax = figure.subplots()
    writer = PillowWriter(fps) if path.suffix == '.gif' else FFMpegWriter(fps)
    with writer.saving(figure, path, dpi=100):
        for step, loss in enumerate(losses):
            ax.clear()
            _show(ax, picture)
            _add_windows(ax, centres[step], sides)
            _include(ax, centres, picture)
            ax.set_title(f'step {step}, loss {loss:.3f}', color='#d0d0d0', fontsize='medium')
            writer.grab_frame(facecolor=_DARK)
    plt.close(figure)
    return path


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
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        tensor = (tensor - low) / (high - low)
    return tensor.clamp(0., 1.).expand(3, -1, -1).permute(1, 2, 0).numpy()


def _rectangles(
        positions: torch.Tensor,
        window: int,
        picture: np.ndarray,
        convention: str,
) -> Tuple[np.ndarray, np.ndarray]:
    """Centres (N, 2) of windows in the pixel coordinates of imshow, and their sides (2,), both as (y, x)."""
    positions = positions.detach().cpu()
    positions = positions[0] if positions.ndim == 3 and len(positions) == 1 else positions
    if positions.ndim != 2 or positions.shape[-1] != 2:
        raise ValueError(f'positions must have shape (N, 2), one placement, got {tuple(positions.shape)}.')
    size = np.array(picture.shape[:2])
    if convention == 'spot':
        return positions.numpy() * size, window * 2 * size / size.sum()
    return positions.numpy() * size - 0.5, np.array([window, window])


def _covered(centres: np.ndarray, sides: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Pixels (H, W) whose centre lies in a window."""
    y, x = (np.abs(np.arange(length) - centres[:, i:i + 1]) < sides[i] / 2
            for i, length in enumerate(picture.shape[:2]))
    return (y[:, :, None] & x[:, None, :]).any(axis=0)


def _region_ids(segmentation: torch.Tensor, picture: np.ndarray) -> np.ndarray:
    if tuple(segmentation.shape) != picture.shape[:2]:
        raise ValueError(
            f'segmentation of shape {tuple(segmentation.shape)} must match the image, {picture.shape[:2]}.')
    return segmentation.cpu().numpy()


def _trajectory(result: OracleResult, index: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Positions (steps + 1, N, 2) and losses (steps + 1,) of one image of a result."""
    if result.trajectory is None:
        raise ValueError('result has no trajectory: search with optimize_positions(..., record=True).')
    if not 0 <= index < len(result.losses):
        raise ValueError(f'index={index} does not exist, the result holds {len(result.losses)} images.')
    return result.trajectory[index].detach().cpu(), result.losses[index].detach().cpu()


def _figure_size(picture: np.ndarray) -> Tuple[float, float]:
    """Width and height in inches that keep the aspect; never too narrow for a title."""
    height, width = np.array(picture.shape[:2]) * _SIDE / max(picture.shape[:2])
    return max(width, 1.8), height


def _new_figure(width: float, height: float) -> Figure:
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height + 0.3), layout='constrained')
    figure.patch.set_alpha(0.)
    return figure


def _new_axes(picture: np.ndarray) -> Axes:
    return _new_figure(*_figure_size(picture)).subplots()


def _show(ax: Axes, picture: np.ndarray) -> None:
    H, W = picture.shape[:2]
    ax.imshow(picture, extent=(-0.5, W - 0.5, H - 0.5, -0.5))
    _hide_frame(ax)
    ax.set(xlim=(-0.5, W - 0.5), ylim=(H - 0.5, -0.5))


def _rgb(color: str) -> Tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(color)


def _hide_frame(ax: Axes) -> None:
    """Hide all but a label that the caller may add."""
    ax.set(xticks=[], yticks=[], facecolor='none')
    ax.spines[:].set_visible(False)


def _include(ax: Axes, points: np.ndarray, picture: np.ndarray) -> None:
    """Widen the view where a search left the image."""
    (top, left), (bottom, right) = points.min(axis=(0, 1)), points.max(axis=(0, 1))
    H, W = picture.shape[:2]
    ax.set(xlim=(min(-0.5, left), max(W - 0.5, right)), ylim=(max(H - 0.5, bottom), min(-0.5, top)))


def _add_windows(ax: Axes, centres: np.ndarray, sides: np.ndarray) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    height, width = sides
    windows = [Rectangle((x - width / 2, y - height / 2), width, height) for y, x in centres]
    ax.add_collection(PatchCollection(windows, facecolor=to_rgba(ORANGE, 0.3), edgecolor=ORANGE, linewidth=1.))
    ax.scatter(centres[:, 1], centres[:, 0], s=9, color='white', edgecolors=_DARK, linewidths=0.6, zorder=3)
