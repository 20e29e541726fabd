"""Windows: the k x k pixels read around a continuous position, by bilinear interpolation.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

Pixel i of an axis with L pixels has its centre at index i. Sample j of a window around p reads the image at index

    p * L + origin + spacing * (j - (k - 1) / 2)

with origin and spacing set by the convention, see `sample_windows`.
"""
from __future__ import annotations

from typing import Any, Tuple

import torch
import torch.nn.functional as F

CONVENTIONS = ('patch', 'spot')


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

    Positions may lie outside [0, 1] (the oracle moves them freely), but must be finite.

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
    # Looking at values would break a graph under compile, export or trace.
    if not (positions.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing()):
        finite = positions.detach().isfinite()
        if not finite.all():
            bad = (~finite).nonzero()[0].tolist()
            raise ValueError(f'positions of shape {shape} hold NaN or infinity, first at index {tuple(bad)}.')


def _patch_windows(images: torch.Tensor, positions: torch.Tensor, window: int) -> torch.Tensor:
    """Windows (B, C, N, k, k) under convention `patch`, at p * L - 0.5 + offset pixels."""
    B, C, H, W = images.shape
    N = positions.shape[1]
    offsets = torch.arange(window, device=positions.device, dtype=positions.dtype) - (window - 1) / 2
    # grid_sample counts the image from -1 to 1, edge to edge: 2 p - 1 is the position itself.
    y = 2. * positions[:, :, 0:1] - 1. + offsets * (2. / H)
    x = 2. * positions[:, :, 1:2] - 1. + offsets * (2. / W)
    grid = torch.stack(
        [x[:, :, None, :].expand(-1, -1, window, -1), y[:, :, :, None].expand(-1, -1, -1, window)], dim=-1)
    out = F.grid_sample(
        images, grid.reshape(B, N * window, window, 2), mode='bilinear', padding_mode='zeros', align_corners=False)
    return out.view(B, C, N, window, window)


class _SymmetricWindows(torch.autograd.Function):
    """`_patch_windows` with the symmetric derivative f(x + 1/2) - f(x - 1/2) to the positions.

    Bilinear interpolation has a kink on every pixel centre and a position on the patch grid puts all k * k samples
    there, so automatic differentiation would return the slope of one side only.

    All samples of a window lie equally far from the pixels, so value and derivative are weighted sums of three shifted
    views along each axis of the (k + 2) x (k + 2) pixels around it, read once.
    """

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, positions: torch.Tensor, window: int) -> torch.Tensor:
        first = torch.stack([p * L - window / 2 for p, L in zip(positions.unbind(-1), images.shape[-2:])], dim=-1)
        corner = (first - 0.5).floor()
        offset = first - corner  # of the first sample from the first pixel, in [0.5, 1.5]
        pixels = _read_pixels(images, corner, window + 2)
        ctx.save_for_backward(images if ctx.needs_input_grad[0] else None, positions, pixels, offset)
        ctx.window, ctx.size = window, images.shape[-2:]
        values_y, values_x = _value_weights(offset).unbind(dim=2)
        return _weigh(_weigh(pixels, values_x, -1), values_y, -2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[torch.Tensor | None, torch.Tensor | None, None]:
        images, positions, pixels, offset = ctx.saved_tensors
        H, W = ctx.size
        grad_images = grad_positions = None
        if ctx.needs_input_grad[0]:
            with torch.enable_grad():
                leaf = images.detach().requires_grad_()
                windows = _patch_windows(leaf, positions.detach(), ctx.window)
            grad_images = torch.autograd.grad(windows, leaf, grad)[0]
        if ctx.needs_input_grad[1]:
            values_y, values_x = _value_weights(offset).unbind(dim=2)
            # The same tent functions half a pixel ahead minus half a pixel behind.
            slopes_y, slopes_x = torch.stack([offset - 1.5, 2. - 2. * offset, offset - 0.5], dim=-1).unbind(dim=2)
            dy = _weigh(_weigh(pixels, values_x, -1), slopes_y, -2)
            dx = _weigh(_weigh(pixels, values_y, -2), slopes_x, -1)
            grad_positions = torch.stack([(grad * dy).sum((1, 3, 4)) * H, (grad * dx).sum((1, 3, 4)) * W], dim=-1)
        return grad_images, grad_positions, None


def _read_pixels(images: torch.Tensor, corner: torch.Tensor, side: int) -> torch.Tensor:
    """Blocks (B, C, N, side, side) of pixels from whole-numbered corners (B, N, 2), zero outside the image."""
    B, C, H, W = images.shape
    N = corner.shape[1]
    steps = torch.arange(side, device=corner.device, dtype=corner.dtype)
    y = (2. * (corner[:, :, 0:1] + steps) + 1.) / H - 1.
    x = (2. * (corner[:, :, 1:2] + steps) + 1.) / W - 1.
    grid = torch.stack([x[:, :, None, :].expand(-1, -1, side, -1), y[:, :, :, None].expand(-1, -1, -1, side)], dim=-1)
    out = F.grid_sample(
        images, grid.reshape(B, N * side, side, 2), mode='nearest', padding_mode='zeros', align_corners=False)
    return out.view(B, C, N, side, side)


def _value_weights(offset: torch.Tensor) -> torch.Tensor:
    """Tent functions at the three pixels from which the first sample is `offset`, `offset - 1`, `offset - 2` away."""
    return torch.stack([(1. - offset).clamp(min=0.), 1. - (offset - 1.).abs(), (offset - 1.).clamp(min=0.)], dim=-1)


def _weigh(x: torch.Tensor, weights: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum of three shifted views of (B, C, N, h, w) along `dim`, by weights (B, N, 3); shortens `dim` by 2."""
    first, second, third = weights[:, None, :, :, None, None].unbind(dim=3)
    length = x.shape[dim] - 2
    out = x.narrow(dim, 0, length) * first
    return out.addcmul_(x.narrow(dim, 1, length), second).addcmul_(x.narrow(dim, 2, length), third)


def _spot_windows(images: torch.Tensor, positions: torch.Tensor, window: int) -> torch.Tensor:
    B, C, H, W = images.shape
    N = positions.shape[1]
    # As the authors round: the sum in fractions of the image, the index from it. Each other order is some 1e-5 px off.
    offsets = torch.linspace(-1., 1., window, device=positions.device, dtype=positions.dtype) * (window / (H + W))
    y, x = (positions[:, :, 0:1] + offsets) * H, (positions[:, :, 1:2] + offsets) * W
    inside = ((y >= 0) & (y < H - 1))[:, :, :, None] & ((x >= 0) & (x < W - 1))[:, :, None, :]
    y, x = 2. * y / (H - 1) - 1., 2. * x / (W - 1) - 1.
    grid = torch.stack(
        [x[:, :, None, :].expand(-1, -1, window, -1), y[:, :, :, None].expand(-1, -1, -1, window)], dim=-1)
    grid = grid.reshape(B, N * window, window, 2)
    out = F.grid_sample(images, grid, mode='bilinear', padding_mode='border', align_corners=True)
    return out.view(B, C, N, window, window) * inside[:, None].to(out.dtype)


def read_windows(images: torch.Tensor, positions: torch.Tensor, window: int, convention: str) -> torch.Tensor:
    """`sample_windows` without its checks: positions (B, N, 2), any convention string but 'spot' is 'patch'.

    Scriptable (a scripted graph uses the plain derivative).
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    images, positions = images.to(dtype), positions.to(dtype)
    if convention == 'spot':
        out = _spot_windows(images, positions, window)
    elif torch.jit.is_scripting():
        out = _patch_windows(images, positions, window)
    elif torch.is_grad_enabled() and positions.requires_grad:
        out = _SymmetricWindows.apply(images, positions, window)
    else:
        out = _patch_windows(images, positions, window)
    return out.transpose(1, 2)


def gather_blocks(
        images: torch.Tensor,
        positions: torch.Tensor,
        window: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
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
