"""Saliency of an image from its spectrum alone, without weights.

Paper: `Saliency Detection: A Spectral Residual Approach` - https://doi.org/10.1109/CVPR.2007.383267

What is unexpected in an image is what its log amplitude spectrum has beyond its own local average:

    map = g * | F^-1 [ exp(log|F| - box * log|F|) F / |F| ] |^2
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

_SIDE = 64  # the paper's scale: the spectrum is taken of a copy whose longer side has this many pixels
_SIGMA = 2.5  # of the Gaussian g, in pixels of that copy, as in the authors' code
_FLOOR = 0.05  # of the mean amplitude, added to all: a coefficient of zero (a square has many) has no logarithm


def normalize_saliency(maps: torch.Tensor) -> torch.Tensor:
    """Scale non-negative maps (B, H, W) to sum to one each; a map of zeros becomes uniform."""
    total = maps.sum(dim=(1, 2), keepdim=True)
    return torch.where(total > 0, maps / total, 1. / maps[0].numel())


def spectral_residual(images: torch.Tensor) -> torch.Tensor:
    """Spectral residual saliency (Hou & Zhang, CVPR 2007).

    Computed on a copy of the image whose longer side has 64 pixels, mirrored at its edges. Brightness and contrast
    drop out, so that images may be normalised or not; an image without structure gives a uniform map. Each map
    depends on its own image only.

    Args:
        images: (B, C, H, W) of any size and dtype.

    Returns:
        Maps (B, H, W), float32, not negative, each summing to one.

    Raises:
        TypeError: `images` is no tensor.
        ValueError: `images` is not (B, C, H, W), or holds NaN or infinity.

    Example:
        >>> import torch
        >>> image = torch.zeros(1, 3, 64, 64)
        >>> image[:, :, 40:45, 20:25] = 1.
        >>> divmod(spectral_residual(image).argmax().item(), 64)
        (42, 22)
    """
    if not isinstance(images, torch.Tensor):
        raise TypeError(f'images must be a tensor of shape (B, C, H, W), got {type(images).__name__}.')
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f'images must have shape (B, C, H, W), got {tuple(images.shape)}.')
    H, W = images.shape[-2:]
    grey = images.to(torch.promote_types(images.dtype, torch.float32)).mean(dim=1, keepdim=True)
    if not grey.isfinite().all():
        raise ValueError(f'images of shape {tuple(images.shape)} hold NaN or infinity.')
    scale = min(1., _SIDE / max(H, W))
    size = (max(1, round(scale * H)), max(1, round(scale * W)))
    # Float64 at this size costs little, and autocast leaves it alone.
    small = F.interpolate(grey, size, mode='bilinear', antialias=True)[:, 0].double()

    structure = small - small.mean(dim=(1, 2), keepdim=True)
    rounding = 1e-5 * small.abs().amax(dim=(1, 2), keepdim=True)
    structure = torch.where(structure.abs().amax(dim=(1, 2), keepdim=True) > rounding, structure, 0.)
    # Mirrored, or else the seam between opposite edges, which the periodic transform sees, would be salient.
    for dim in (1, 2):
        structure = torch.cat([structure, structure.flip(dim)], dim=dim)
    spectrum = torch.fft.fft2(structure)
    amplitude = spectrum.abs()
    amplitude = amplitude + _FLOOR * amplitude.mean(dim=(1, 2), keepdim=True)
    amplitude = amplitude.clamp(min=torch.finfo(amplitude.dtype).tiny)  # an image without structure: 0 / tiny
    residual = amplitude.log() - _box(amplitude.log())
    energy = torch.fft.ifft2(residual.exp() * spectrum / amplitude).abs().square()[:, :size[0], :size[1]]

    maps = _gaussian(size[0], energy) @ energy @ _gaussian(size[1], energy).T
    return normalize_saliency(F.interpolate(maps[:, None].float(), (H, W), mode='bilinear')[:, 0])


def _box(x: torch.Tensor) -> torch.Tensor:
    """Average over 3 x 3 neighbours of (B, H, W); a spectrum is periodic."""
    for dim in (1, 2):
        x = (x.roll(-1, dim) + x + x.roll(1, dim)) / 3
    return x


def _gaussian(length: int, like: torch.Tensor) -> torch.Tensor:
    """Matrix (length, length) that smooths an axis; at the border, over the pixels that exist."""
    pixel = torch.arange(length, device=like.device, dtype=like.dtype)
    weight = torch.exp(-(pixel[:, None] - pixel).square() / (2 * _SIGMA ** 2))
    return weight / weight.sum(dim=1, keepdim=True)
