"""Pictures of what a masked autoencoder makes of the windows that it did not see (extra `viz`)."""
from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

import numpy as np
import torch

from ...ops.windows import sample_windows
from .figure import BLANK, GREY, ROUNDING, SIDE, new_figure, show, to_picture, to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ...models.spot_mae import Reconstruction


def draw_reconstruction(
        image: torch.Tensor,
        result: Reconstruction,
        index: int = 0,
        axes: Sequence[Axes] | None = None,
        convention: str = 'patch',
) -> np.ndarray:
    """Draw an image, the windows that a masked autoencoder saw of it, and these with what it made of the dropped ones.

    The autoencoder predicts normalised pixels: each dropped window is drawn with the true mean and contrast. Where
    windows overlap, their average is drawn; each lies at the nearest whole pixel.

    Args:
        image: (C, H, W) or (1, C, H, W), as the model saw it.
        result: Of a `spot_mae_vit_*` model.
        index: Which image of the result.
        axes: Three axes; a new figure by default.
        convention: Geometry of the model's windows, see `timm_spot.sample_windows`.

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
    truth = sample_windows(image[None], dropped, window, convention)[0].flatten(1)  # M, C k k
    predicted = result.predicted[index].detach().cpu().float()
    predicted = predicted * truth.std(dim=1, keepdim=True) + truth.mean(dim=1, keepdim=True)
    seen = sample_windows(image[None], kept, window, convention)[0]

    # One scale for all three: a picture's own, so that equal values look equal.
    low, high = image.min(), image.max()
    picture = ((image - low) / (high - low).clamp(min=ROUNDING)).clamp(0, 1)
    axes = new_figure(3 * SIDE / 2, SIDE / 2).subplots(1, 3) if axes is None else axes
    titles = ('image', f'{kept.shape[1]} windows seen', f'and {dropped.shape[1]} reconstructed')
    read = _paste(seen, kept[0], image, low, high, convention)
    made = _paste(predicted.view(-1, len(image), window, window), dropped[0], image, low, high, convention)
    panels = (to_picture(picture), read, np.where(read[..., 3:] == 1., read, made))
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
        convention: str,
) -> np.ndarray:
    """Windows (N, C, k, k) at positions (N, 2) as a picture (H, W, 4), averaged, with nothing where no window lies."""
    C, H, W = image.shape
    k = windows.shape[-1]
    total, count = torch.zeros(C, H + 2 * k, W + 2 * k), torch.zeros(H + 2 * k, W + 2 * k)  # a frame for those outside
    centres = torch.from_numpy(to_pixels(positions.numpy(), image.permute(1, 2, 0), convention))
    corners = (centres - (k - 1) / 2).round().long() + k
    corners = corners.clamp(min=0).minimum(torch.tensor([H + k, W + k]))
    for window, (y, x) in zip(windows, corners.tolist()):
        total[:, y:y + k, x:x + k] += window
        count[y:y + k, x:x + k] += 1
    total, count = total[:, k:-k, k:-k], count[k:-k, k:-k]
    mean = (total / count.clamp(min=1) - low) / (high - low).clamp(min=ROUNDING)
    picture = np.full((H, W, 4), BLANK)
    picture[count > 0, :3] = mean.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)[count > 0]
    picture[count > 0, 3] = 1.
    return picture
