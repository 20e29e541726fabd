"""Saliency of an image without weights: from its spectrum, or from its contrast.

Paper: `Saliency Detection: A Spectral Residual Approach` - https://doi.org/10.1109/CVPR.2007.383267

What is unexpected in an image is what its log amplitude spectrum has beyond its own local average:

    map = g * | F^-1 [ exp(log|F| - box * log|F|) F / |F| ] |^2

Its energy is what differs from its surroundings, in the mean of the channels:

    map = g * (image - l * image)^2
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

_SIDE = 64  # the paper's scale: the spectrum is taken of a copy whose longer side has this many pixels
_SIGMA = 2.5  # of the Gaussian g, in pixels of that copy, as in the authors' code
_LOCAL = 6.  # of the Gaussian l
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
        ValueError: `images` is not (B, C, H, W), or holds NaN or infinity (the first such image is named).

    Example:
        >>> import torch
        >>> image = torch.zeros(1, 3, 64, 64)
        >>> image[:, :, 40:45, 20:25] = 1.
        >>> divmod(spectral_residual(image).argmax().item(), 64)
        (42, 22)
    """
    small = _shrink(images).mean(dim=1)
    size, (H, W) = small.shape[-2:], images.shape[-2:]
    structure = _without_rounding(small - small.mean(dim=(1, 2), keepdim=True), small)
    # Mirrored, or else the seam between opposite edges, which the periodic transform sees, would be salient.
    for dim in (1, 2):
        structure = torch.cat([structure, structure.flip(dim)], dim=dim)
    spectrum = torch.fft.fft2(structure)
    amplitude = spectrum.abs()
    amplitude = amplitude + _FLOOR * amplitude.mean(dim=(1, 2), keepdim=True)
    amplitude = amplitude.clamp(min=torch.finfo(amplitude.dtype).tiny)  # an image without structure: 0 / tiny
    residual = amplitude.log() - _box(amplitude.log())
    energy = torch.fft.ifft2(residual.exp() * spectrum / amplitude).abs().square()[:, :size[0], :size[1]]

    return _enlarge(_blur(energy, _SIGMA), H, W)


def energy(images: torch.Tensor) -> torch.Tensor:
    """Local energy: squares of what differs from the surroundings, blurred, in the mean of the channels.

    Computed on a copy of the image whose longer side has 64 pixels. Brightness drops out and contrast is a factor, so
    that images may be normalised or not; an image without structure gives a uniform map. Each map depends on its own
    image only.

    Args:
        images: (B, C, H, W) of any size and dtype.

    Returns:
        Maps (B, H, W), float32, not negative, each summing to one.

    Raises:
        TypeError, ValueError: As `spectral_residual`.

    Example:
        >>> import torch
        >>> image = torch.zeros(1, 3, 64, 64)
        >>> image[:, :, 40:45, 20:25] = 1.
        >>> divmod(energy(image).argmax().item(), 64)
        (42, 22)
    """
    small = _shrink(images)
    structure = _without_rounding(small - _blur(small, _LOCAL), small)
    return _enlarge(_blur(structure.square().mean(dim=1), _SIGMA), *images.shape[-2:])


def _shrink(images: torch.Tensor) -> torch.Tensor:
    """Copies of checked images whose longer side has at most 64 pixels, (B, C, h, w), in float64.

    At this size float64 costs little, and autocast leaves it alone.
    """
    if not isinstance(images, torch.Tensor):
        raise TypeError(f'images must be a tensor of shape (B, C, H, W), got {type(images).__name__}.')
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f'images must have shape (B, C, H, W), got {tuple(images.shape)}.')
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    bad = (~images.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f'images of shape {tuple(images.shape)} hold NaN or infinity, first in image {bad[0]}.')
    H, W = images.shape[-2:]
    scale = min(1., _SIDE / max(H, W))
    size = (max(1, round(scale * H)), max(1, round(scale * W)))
    return F.interpolate(images, size, mode='bilinear', antialias=True).double()


def _without_rounding(structure: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """What differs in images (..., h, w), 0 where all of it is rounding."""
    rounding = 1e-5 * images.abs().amax(dim=(-2, -1), keepdim=True)
    return torch.where(structure.abs().amax(dim=(-2, -1), keepdim=True) > rounding, structure, 0.)


def _enlarge(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Maps (B, h, w) at the images' size, normalised."""
    return normalize_saliency(F.interpolate(maps[:, None].float(), (height, width), mode='bilinear')[:, 0])


def _blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A Gaussian over the last two axes."""
    return _gaussian(x.shape[-2], sigma, x) @ x @ _gaussian(x.shape[-1], sigma, x).T


def _box(x: torch.Tensor) -> torch.Tensor:
    """Average over 3 x 3 neighbours of (B, H, W); a spectrum is periodic."""
    for dim in (1, 2):
        x = (x.roll(-1, dim) + x + x.roll(1, dim)) / 3
    return x


def _gaussian(length: int, sigma: float, like: torch.Tensor) -> torch.Tensor:
    """Matrix (length, length) that smooths an axis; at the border, over the pixels that exist."""
    pixel = torch.arange(length, device=like.device, dtype=like.dtype)
    weight = torch.exp(-(pixel[:, None] - pixel).square() / (2 * sigma ** 2))
    return weight / weight.sum(dim=1, keepdim=True)
