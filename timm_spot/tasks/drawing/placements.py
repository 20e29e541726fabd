"""Pictures of placements, and of what models make of them (extra `viz`)."""
from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Sequence

import numpy as np
import torch

from ...ops.saliency import spectral_residual
from ...ops.samplers import sample_positions
from ...ops.windows import sample_windows
from .figure import (
    BLANK,
    DARK,
    GREY,
    ORANGE,
    ROUNDING,
    SIDE,
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

    from ...models.spot_mae import Reconstruction


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
        ax: Optional[Axes] = None,
        convention: str = 'patch',
) -> Axes:
    """Draw only the pixels inside windows; arguments and errors are those of `draw_placement`."""
    picture = to_picture(image)
    covered = _covered(*rectangles(positions, window, picture, convention), picture)
    ax = new_axes(picture) if ax is None else ax
    seen = np.full((*covered.shape, 4), BLANK)
    seen[covered, :3], seen[covered, 3] = picture[covered], 1.
    show(ax, seen)
    ax.set_title(f'{covered.mean():.0%} of the pixels', color=GREY, fontsize='medium')
    return ax


def _covered(centres: np.ndarray, sides: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Pixels (H, W) whose centre lies in a window."""
    y, x = (np.abs(np.arange(length) - centres[:, i:i + 1]) < sides[i] / 2
            for i, length in enumerate(picture.shape[:2]))
    return (y[:, :, None] & x[:, None, :]).any(axis=0)


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
        picture = np.full((224, 224, 4), BLANK)
    else:
        picture = to_picture(image)
        saliency = spectral_residual(torch.from_numpy(picture).permute(2, 0, 1)[None])
        names += ['salient', 'salient_sobol', 'salient_inverse']
    panels = len(names) + (saliency is not None)
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
    if saliency is not None:
        ax = axes.flat[-1]
        ax.imshow(saliency[0].numpy(), cmap='cividis')
        hide_frame(ax)
        ax.set_title('spectral residual', color=GREY, fontsize='medium')
    return axes


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
    centres, sides = rectangles(positions, window, picture, convention)
    if not kept:
        raise ValueError('kept is empty: it must hold the tokens left at each stage, see `kept_tokens`.')
    fell_at = np.zeros(len(centres), dtype=int)
    for index in kept:
        index = index.detach().cpu().flatten()
        if len(index) and not 0 <= index.min() <= index.max() < len(centres):
            raise ValueError(f'kept holds index {index.max().item()}, positions only {len(centres)} tokens.')
        fell_at[index.numpy()] += 1  # the stage after which it falls, or all of them

    ax = new_axes(picture) if ax is None else ax
    show(ax, picture)
    casing = [patheffects.withStroke(linewidth=2, foreground=DARK)]
    for (y, x), stage in zip(centres, fell_at):
        corner = (x - sides[1] / 2, y - sides[0] / 2)
        if stage == len(kept):
            ax.add_patch(Rectangle(corner, sides[1], sides[0], fill=False, edgecolor=ORANGE, linewidth=1.5, zorder=3))
            continue
        shade = 0.85 * (1 - stage / len(kept))
        ax.add_patch(Rectangle(corner, sides[1], sides[0], facecolor=DARK, alpha=shade, linewidth=0))
        ax.text(x, y, str(stage + 1), color='white', fontsize='x-small', ha='center', va='center', path_effects=casing)
    counts = ' → '.join(str(n) for n in [len(centres), *(index.numel() for index in kept)])
    ax.set_title(f'{counts} tokens', color=GREY, fontsize='medium')
    return ax


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
    picture = ((image - low) / (high - low).clamp(min=ROUNDING)).clamp(0, 1)
    axes = new_figure(3 * SIDE / 2, SIDE / 2).subplots(1, 3) if axes is None else axes
    titles = ('image', f'{kept.shape[1]} windows seen', f'{dropped.shape[1]} windows reconstructed')
    panels = (
        to_picture(picture),
        _paste(seen, kept[0], image, low, high),
        _paste(predicted.view(-1, len(image), window, window), dropped[0], image, low, high),
    )
    for ax, panel, title in zip(axes, panels, titles):
        show(ax, panel)
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
    mean = (total / count.clamp(min=1) - low) / (high - low).clamp(min=ROUNDING)
    picture = np.full((H, W, 4), BLANK)
    picture[count > 0, :3] = mean.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)[count > 0]
    picture[count > 0, 3] = 1.
    return picture
