"""Windows: the k x k pixels read around a continuous position, by bilinear interpolation.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

Pixel i of an axis with L pixels has its centre at index i. Sample j of a window around p reads the image at index

    p * L + origin + spacing * (j - (k - 1) / 2)

with origin set by the convention, and spacing by it or, under `patch`, by the caller: see `sample_windows`.
"""
from __future__ import annotations

from typing import Any

import torch

from .bilinear import check_derivatives, patch_windows, read_lattice, symmetric_windows, transformed
from .pyramid import level_count, levels_between, sized_windows

CONVENTIONS = ('patch', 'spot')
_FARTHEST = 5  # image sides that a position may lie outside the image: no search gets there, pixels do


def check_convention(convention: str, window: int) -> None:
    """Raise ValueError unless `convention` is known and a window of `window` pixels exists under it."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is unknown, use one of {', '.join(map(repr, CONVENTIONS))}.")
    smallest = 2 if convention == 'spot' else 1  # the spacing of `spot` is a multiple of k / (k - 1)
    if window < smallest:
        raise ValueError(f'window={window} is too small, convention={convention!r} needs at least {smallest} pixels.')


def check_sized(convention: str, what: str) -> None:
    """Raise ValueError unless windows have sizes under `convention`; `what` asks for them, and begins the message."""
    if convention != 'patch':
        raise ValueError(
            f"{what}, but under convention={convention!r} windows have one size, which follows from that of the image "
            "as in the released checkpoints: sizes need convention='patch'.")


def check_images(images: torch.Tensor, window: int, channels: int | None = None) -> None:
    """Raise TypeError or ValueError unless `images` is (B, C, H, W), of `channels`, with room for one window."""
    if not isinstance(images, torch.Tensor):
        raise TypeError(f'images must be a tensor of shape (B, C, H, W), got {type(images).__name__}.')
    if images.ndim != 4:
        raise ValueError(f'images must have shape (B, C, H, W), got {tuple(images.shape)}.')
    if channels not in (None, images.shape[1]):
        raise ValueError(
            f'images of shape {tuple(images.shape)} have {images.shape[1]} channels, the model takes {channels}: '
            'convert them, or make the model with another in_chans.')
    # A captured graph keeps its batch free: no guard on it.
    if not torch.compiler.is_compiling() and images.shape[0] < 1:
        raise ValueError(f'images of shape {tuple(images.shape)} hold no image: give at least one.')
    if min(images.shape[-2:]) < window:
        raise ValueError(
            f'images of {images.shape[-2]} x {images.shape[-1]} px are smaller than one window of {window} x {window}.'
        )


def _values_hidden(t: torch.Tensor) -> bool:
    """Whether values cannot be looked at: on the meta device, in a graph that is captured, under torch.func."""
    return t.is_meta or torch.compiler.is_compiling() or torch._C._is_tracing() or transformed()


def check_placement(placement: torch.Tensor, images: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless `placement` is one for `images`.

    Positions may lie outside [0, 1] (the oracle moves them freely), but no more than five image sides, where no window
    sees anything: such values are pixels taken for fractions.

    Args:
        placement: (B, N, 2), (B, N, 3), (B, N, 4), or the same without B: positions and, from the third column on,
            spacings; float32 or float64, on the device of `images`.
        images: (B, C, H, W).
    """
    if not isinstance(placement, torch.Tensor):
        raise TypeError(f'positions must be a tensor of shape (B, N, 2) or (N, 2), got {type(placement).__name__}.')
    if placement.dtype not in (torch.float32, torch.float64):
        raise TypeError(f'positions must be float32 (lower precision misplaces windows), got {placement.dtype}.')
    batch = images.shape[0]
    shape = tuple(placement.shape)
    if len(shape) not in (2, 3) or shape[-1] not in (2, 3, 4) or shape[-2] < 1 or shape[:-2] not in ((), (batch,)):
        raise ValueError(
            f'positions must have shape ({batch}, N, 2) or (N, 2) with N >= 1 (3 or 4 columns with one spacing or '
            f'two), got {shape}.')
    if placement.device != images.device:
        raise ValueError(f'positions are on {placement.device}, images on {images.device}: move one to the other.')
    if _values_hidden(placement):
        return
    positions = placement[..., :2]
    if shape[-1] > 2:
        _check_spacing(placement[..., 2:], images)
    near = (positions.detach() - 0.5).abs() <= 0.5 + _FARTHEST  # NaN is not
    if not near.all():
        finite = positions.detach().isfinite()
        index = tuple((~(near if finite.all() else finite)).nonzero()[0].tolist())
        if not finite.all():
            raise ValueError(f'positions of shape {shape} hold NaN or infinity, first at index {index}.')
        H, W = images.shape[-2:]
        raise ValueError(
            f'positions of shape {shape} hold {positions[index].item():.5g} at index {index}: (y, x) are fractions of '
            f'the image, 0 to 1 from edge to edge and never beyond {-_FARTHEST} to {1 + _FARTHEST}; divide pixels by '
            f'({H}, {W}).')


def _check_spacing(spacing: torch.Tensor, images: torch.Tensor) -> None:
    """Raise ValueError for spacings that are no distance, or larger than the image."""
    largest = max(images.shape[-2:])
    good = (spacing.detach() > 0.) & (spacing.detach() <= largest)  # NaN is neither
    if not good.all():
        index = tuple((~good).nonzero()[0].tolist())
        raise ValueError(
            f'spacing of shape {tuple(spacing.shape)} is {spacing[index].item():.5g} at index {index}: the distance of '
            f"a window's samples in pixels lies above 0 and is at most the longer side of the image, {largest}.")


def split_placement(placement: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Positions (..., N, 2), and spacings (..., N, 2) along y and x where the placement holds any, else None.

    Example:
        >>> split_placement(torch.tensor([[0.25, 0.75, 3.]]))
        (tensor([[0.2500, 0.7500]]), tensor([[3., 3.]]))
    """
    if placement.shape[-1] == 2:
        return placement, None
    return placement[..., :2], placement[..., 2:].expand(*placement.shape[:-1], 2)


def _spot_windows(images: torch.Tensor, positions: torch.Tensor, window: int) -> torch.Tensor:
    """Windows (B, C, N, k, k) under convention `spot`."""
    H, W = images.shape[-2:]
    # As the authors round: the sum in fractions of the image, the index from it. Each other order is some 1e-5 px off.
    offsets = torch.linspace(-1., 1., window, device=positions.device, dtype=positions.dtype) * (window / (H + W))
    y, x = (positions[:, :, 0:1] + offsets) * H, (positions[:, :, 1:2] + offsets) * W
    inside = ((y >= 0) & (y < H - 1))[:, :, :, None] & ((x >= 0) & (x < W - 1))[:, :, None, :]
    y, x = 2. * y / (H - 1) - 1., 2. * x / (W - 1) - 1.
    out = read_lattice(images, y, x, mode='bilinear', padding_mode='border', align_corners=True)
    return out * inside[:, None].to(out.dtype)


def read_windows(
        images: torch.Tensor,
        positions: torch.Tensor,
        window: int,
        convention: str,
        spacing: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sample_windows` without its checks: positions and spacing (B, N, 2), any convention but 'spot' is 'patch'."""
    check_derivatives(images, positions, spacing)
    if spacing is not None:
        return _read_sized(images, positions, spacing, window)
    dtype = torch.promote_types(images.dtype, torch.float32)
    images, positions = images.to(dtype), positions.to(dtype)
    follow = positions.requires_grad or transformed()
    if convention == 'spot':
        out = _spot_windows(images, positions, window)
    elif torch.is_grad_enabled() and (follow or images.requires_grad):
        out = symmetric_windows(images, positions, window, follow)
    else:
        out = patch_windows(images, positions, window)
    return out.transpose(1, 2)


def _read_sized(
        images: torch.Tensor,
        positions: torch.Tensor,
        spacing: torch.Tensor,
        window: int,
) -> torch.Tensor:
    """Windows (B, N, C, k, k) with spacings; those of spacing 1 are what they are without one, to the last bit."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    images, positions, spacing = images.to(dtype), positions.to(dtype), spacing.to(dtype)
    size = (images.shape[-2], images.shape[-1])
    if _values_hidden(spacing):  # which have spacing 1 cannot be seen: they are so up to rounding
        return sized_windows(images, positions, spacing, window, range(level_count(size, window))).transpose(1, 2)
    plain = (spacing.detach() == 1.).all(dim=-1)
    today = read_windows(images, positions, window, 'patch') if plain.any() else None
    if today is not None and plain.all() and not spacing.requires_grad:
        return today
    levels = levels_between(spacing, size, window)
    sized = sized_windows(images, positions, spacing, window, levels).transpose(1, 2)
    if today is None:
        return sized
    mixed: torch.Tensor = torch.where(plain[..., None, None, None], today.detach(), sized.detach())
    if not sized.requires_grad:
        return mixed
    out: torch.Tensor = _WithValue.apply(sized, mixed)
    return out


class _WithValue(torch.autograd.Function):
    """Another value for a tensor, with the tensor's derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def gather_blocks(
        images: torch.Tensor,
        positions: torch.Tensor,
        window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels that each window reads (convention `patch`), in the dtype of the images, as small images.

    Reading a window from its block gives what the whole image gives, border and gradient included: a block ends either
    beyond all pixels of the window and its derivative, or at the image's edge.

    Args:
        images: (B, C, H, W), at least window + 2 pixels a side.
        positions: (B, N, 2).
        window: Side k of the window in pixels.

    Returns:
        Blocks (B * N, C, k + 2, k + 2), and the positions inside them (B * N, 1, 2).
    """
    B, _, H, W = images.shape
    side = window + 2
    corner = positions * torch.tensor([H, W], device=positions.device, dtype=positions.dtype)  # in pixels, of the edge
    start = (corner.detach() - (window + 1) / 2).floor().clamp_(min=0.)
    start = start.minimum(torch.tensor([H - side, W - side], device=start.device, dtype=start.dtype))
    y, x = start.long().unbind(dim=-1)
    every = images.unfold(2, side, 1).unfold(3, side, 1).permute(0, 2, 3, 1, 4, 5)  # views, nothing is copied
    blocks = every[torch.arange(B, device=images.device)[:, None], y, x]  # B N C side side
    return blocks.flatten(0, 1), ((corner - start) / side).flatten(0, 1)[:, None]


def sample_windows(
        images: torch.Tensor,
        positions: torch.Tensor,
        window: int,
        convention: str = 'patch',
        spacing: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Read a k x k window around every position by bilinear interpolation.

    Two conventions (L = pixels of the axis, p = position along it):

    * `patch`: 0 and 1 are the image's outer edges, samples lie one pixel apart, values fade to zero over the last
      pixel. A window centred on a ViT patch is that patch. The gradient to the positions is the symmetric
      difference f(x + 1/2 px) - f(x - 1/2 px), defined at pixel centres too.
    * `spot`: that of the released SPoT checkpoints. p = 0 is the first pixel's centre, samples lie
      (2 L / (H + W)) * k / (k - 1) apart, a sample is 0 unless 0 <= index < L - 1. Plain gradient.

    Under `patch` a window may have a size: samples `spacing` pixels apart, of the picture blurred to that scale (see
    `timm_spot.ops.pyramid`). Spacing 1 is the window above, to the last bit; there is a derivative to the spacing.

    Args:
        images: (B, C, H, W). Sampling happens in float32 (float64 for float64 images).
        positions: (B, N, 2) or (N, 2) of (y, x), fractions of the image; may lie outside [0, 1].
        window: Side k of the window in pixels.
        convention: 'patch' or 'spot'.
        spacing: Distance of a window's samples in pixels of the image, above 0: one number for all, (B, N) for each
            window, or (B, N, 2) along y and x; without B where all images share it. `patch` only.

    Returns:
        Windows of shape (B, N, C, k, k), in the dtype of `images` (float32 for integer images).

    Raises:
        TypeError: `images` or `positions` is no tensor, or the dtype of `positions` is too coarse.
        ValueError: Wrong shape, device or value, an unknown convention, an image smaller than a window.

    Example:
        >>> import torch
        >>> image = torch.arange(16.).view(1, 1, 4, 4)
        >>> sample_windows(image, torch.tensor([[0.25, 0.75]]), window=2)[0, 0, 0]  # the upper right patch
        tensor([[2., 3.],
                [6., 7.]])
        >>> sample_windows(image, torch.tensor([[0.25, 0.625]]), window=2)[0, 0, 0]  # half a pixel to the left
        tensor([[1.5000, 2.5000],
                [5.5000, 6.5000]])
        >>> sample_windows(image, torch.tensor([[0.5, 0.5]]), window=2, spacing=2.)[0, 0, 0]  # all, at half the size
        tensor([[ 2.5000,  4.5000],
                [10.5000, 12.5000]])
    """
    check_convention(convention, window)
    check_images(images, window)
    if isinstance(positions, torch.Tensor) and positions.shape[-1:] != (2,):
        raise ValueError(
            f'positions must have shape ({images.shape[0]}, N, 2) or (N, 2), got {tuple(positions.shape)}: spacings '
            'are given by spacing=.')
    check_placement(positions, images)
    positions = positions.expand(images.shape[0], -1, -1)
    if spacing is not None:
        spacing = _expand_spacing(spacing, positions, convention, images)
    out = read_windows(images, positions, window, convention, spacing)
    return out.to(images.dtype) if images.is_floating_point() else out


def _expand_spacing(
        spacing: float | torch.Tensor,
        positions: torch.Tensor,
        convention: str,
        images: torch.Tensor,
) -> torch.Tensor:
    """The argument of `sample_windows` as (B, N, 2)."""
    check_sized(convention, f'spacing={spacing!r} sizes windows')
    if not isinstance(spacing, torch.Tensor):
        spacing = torch.tensor(spacing, dtype=positions.dtype, device=positions.device)
    shape, full = tuple(spacing.shape), tuple(positions.shape)
    if shape in ((), full[1:2], full[:2]):
        spacing = spacing[..., None]
    elif shape not in (full[1:], full):
        raise ValueError(
            f'spacing must be a number or have shape {full[:2]} or {full}, as positions of shape {full}, got {shape}.')
    if spacing.dtype not in (torch.float32, torch.float64):
        raise TypeError(f'spacing must be float32 (lower precision misplaces samples), got {spacing.dtype}.')
    if spacing.device != positions.device:
        raise ValueError(f'spacing is on {spacing.device}, positions on {positions.device}: move one to the other.')
    spacing = spacing.expand(full)
    if not _values_hidden(spacing):
        _check_spacing(spacing, images)
    return spacing
