"""Windows: the k x k pixels read around a continuous position, by bilinear interpolation.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

Pixel i of an axis with L pixels has its centre at index i. Sample j of a window around p reads the image at index

    p * L + origin + spacing * (j - (k - 1) / 2)

with origin and spacing set by the convention, see `sample_windows`.
"""
from __future__ import annotations

import torch

from .bilinear import patch_windows, read_lattice, symmetric_windows, transformed

CONVENTIONS = ('patch', 'spot')
_FARTHEST = 5  # image sides that a position may lie outside the image: no search gets there, pixels do


def check_convention(convention: str, window: int) -> None:
    """Raise ValueError unless `convention` is known and a window of `window` pixels exists under it."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is unknown, use one of {', '.join(map(repr, CONVENTIONS))}.")
    smallest = 2 if convention == 'spot' else 1  # the spacing of `spot` is a multiple of k / (k - 1)
    if window < smallest:
        raise ValueError(f'window={window} is too small, convention={convention!r} needs at least {smallest} pixels.')


def check_images(images: torch.Tensor, window: int) -> None:
    """Raise TypeError or ValueError unless `images` is (B, C, H, W) with room for one window."""
    if not isinstance(images, torch.Tensor):
        raise TypeError(f'images must be a tensor of shape (B, C, H, W), got {type(images).__name__}.')
    if images.ndim != 4:
        raise ValueError(f'images must have shape (B, C, H, W), got {tuple(images.shape)}.')
    if min(images.shape[-2:]) < window:
        raise ValueError(
            f'images of {images.shape[-2]} x {images.shape[-1]} px are smaller than one window of {window} x {window}.'
        )


def check_positions(positions: torch.Tensor, images: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless `positions` is a placement for `images`.

    Positions may lie outside [0, 1] (the oracle moves them freely), but no more than five image sides, where no window
    sees anything: such values are pixels taken for fractions.

    Args:
        positions: (B, N, 2) or (N, 2), float32 or float64, on the device of `images`.
        images: (B, C, H, W).
    """
    if not isinstance(positions, torch.Tensor):
        raise TypeError(f'positions must be a tensor of shape (B, N, 2) or (N, 2), got {type(positions).__name__}.')
    if positions.dtype not in (torch.float32, torch.float64):
        raise TypeError(f'positions must be float32 (lower precision misplaces windows), got {positions.dtype}.')
    batch = images.shape[0]
    shape = tuple(positions.shape)
    if len(shape) not in (2, 3) or shape[-1] != 2 or shape[-2] < 1 or (len(shape) == 3 and shape[0] != batch):
        raise ValueError(f'positions must have shape ({batch}, N, 2) or (N, 2) with N >= 1, got {shape}.')
    if positions.device != images.device:
        raise ValueError(f'positions are on {positions.device}, images on {images.device}: move one to the other.')
    # Values cannot be looked at on the meta device, in a graph that is captured, or under torch.func.
    if positions.is_meta or torch.compiler.is_compiling() or torch._C._is_tracing() or transformed():
        return
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


def read_windows(images: torch.Tensor, positions: torch.Tensor, window: int, convention: str) -> torch.Tensor:
    """`sample_windows` without its checks: positions (B, N, 2), any convention string but 'spot' is 'patch'."""
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
) -> torch.Tensor:
    """Read a k x k window around every position by bilinear interpolation.

    Two conventions (L = pixels of the axis, p = position along it):

    * `patch`: 0 and 1 are the image's outer edges, samples lie one pixel apart, values fade to zero over the last
      pixel. A window centred on a ViT patch is that patch. The gradient to the positions is the symmetric
      difference f(x + 1/2 px) - f(x - 1/2 px), defined at pixel centres too.
    * `spot`: that of the released SPoT checkpoints. p = 0 is the first pixel's centre, samples lie
      (2 L / (H + W)) * k / (k - 1) apart, a sample is 0 unless 0 <= index < L - 1. Plain gradient.

    Args:
        images: (B, C, H, W). Sampling happens in float32 (float64 for float64 images).
        positions: (B, N, 2) or (N, 2) of (y, x), fractions of the image; may lie outside [0, 1].
        window: Side k of the window in pixels.
        convention: 'patch' or 'spot'.

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
    """
    check_convention(convention, window)
    check_images(images, window)
    check_positions(positions, images)
    if positions.ndim == 2:
        positions = positions.expand(images.shape[0], -1, -1)
    out = read_windows(images, positions, window, convention)
    return out.to(images.dtype) if images.is_floating_point() else out
