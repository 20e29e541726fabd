"""Bilinear reading of windows, and its derivatives.

`grid_sample` reads fast, but its derivative to the positions is one-sided on pixel centres, and has none itself.
Under convention `patch` the derivative is f(x + 1/2 px) - f(x - 1/2 px) instead, written out here.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp) is at work, under which a tensor's values cannot be seen."""
    # The question that autograd.Function itself asks.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def check_derivatives(*tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError where one of these carries a tangent: windows have no derivatives in forward mode."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    forward = {one.level() for one in stack if one.key() == functorch.TransformType.Jvp}
    for t in tensors:
        inside = t
        while inside is not None:
            # That of another transform's tensor (hessian, say) cannot be looked at.
            hidden = inside is not t and functorch.maybe_get_level(inside) in forward
            if hidden or forward_ad.unpack_dual(inside).tangent is not None:  # type: ignore[no-untyped-call]
                raise RuntimeError(
                    'windows have no derivatives in forward mode (torch.func.jvp, jacfwd, hessian, '
                    'forward_ad): take those in reverse (torch.func.vjp, jacrev, grad).')
            inside = functorch.get_unwrapped(inside) if functorch.is_functorch_wrapped_tensor(inside) else None


def read_lattice(images: torch.Tensor, y: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
    """Read images (B, C, H, W) where rows y (B, N, k) meet columns x (B, N, k), as (B, C, N, k, k).

    y and x count the image from -1 to 1, as `grid_sample` does, which takes the other options.
    """
    return F.grid_sample(images, meet(y, x), **options).view(images.shape[0], images.shape[1], *x.shape[1:], -1)


def meet(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Points (x, y) where rows y (B, N, k) meet columns x (B, N, k), in `grid_sample`'s shape (B, N * k, k, 2)."""
    k = x.shape[2]
    grid = torch.stack([x[:, :, None, :].expand(-1, -1, k, -1), y[:, :, :, None].expand(-1, -1, -1, k)], dim=-1)
    return grid.flatten(1, 2)


def _patch_rows_and_columns(
        positions: torch.Tensor,
        window: int,
        size: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples at p * L - 0.5 + offset pixels; with the image counted from -1 to 1, 2 p - 1 is the position itself."""
    offsets = torch.arange(window, device=positions.device, dtype=positions.dtype) - (window - 1) / 2
    H, W = size
    return 2. * positions[:, :, 0:1] - 1. + offsets * (2. / H), 2. * positions[:, :, 1:2] - 1. + offsets * (2. / W)


def patch_windows(images: torch.Tensor, positions: torch.Tensor, window: int) -> torch.Tensor:
    """Windows (B, C, N, k, k) under convention `patch`."""
    y, x = _patch_rows_and_columns(positions, window, images.shape[-2:])
    return read_lattice(images, y, x, mode='bilinear', padding_mode='zeros', align_corners=False)


class _SymmetricWindows(torch.autograd.Function):
    """`patch_windows` with the symmetric derivative f(x + 1/2) - f(x - 1/2) to the positions.

    Bilinear interpolation has a kink on every pixel centre and a position on the patch grid puts all k * k samples
    there, so automatic differentiation would return the slope of one side only.

    All samples of a window lie equally far from the pixels, so value and derivative are weighted sums of three shifted
    views along each axis of the (k + 2) x (k + 2) pixels around it, read once.

    Second derivatives to the images (and to weights, through `grad`) are exact. To the positions they are refused: the
    first is no derivative of the windows' values, so that no chain rule gives what finite differences of it give.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
            images: torch.Tensor,
            positions: torch.Tensor,
            window: int,
            follow: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Windows, and what their derivative to the positions needs: where `follow`, or else nothing."""
        if not follow:
            return patch_windows(images, positions, window), positions.new_empty(0), positions.new_empty(0)
        corner, offset = _locate(positions, window, images.shape[-2:])
        pixels = _read_pixels(images, corner, window + 2)
        return _weigh_pixels(pixels, *_value_weights(offset).unbind(dim=2)), pixels, offset

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        images, positions, ctx.window, _ = inputs
        _, pixels, offset = output
        ctx.size = images.shape[-2:]
        ctx.mark_non_differentiable(pixels, offset)
        ctx.set_materialize_grads(False)  # zeros of the size of `pixels`
        ctx.save_for_backward(images, positions, pixels, offset)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        images, positions, pixels, offset = ctx.saved_tensors
        follow_images, follow_positions = ctx.needs_input_grad[:2]
        # A derivative of this one may be wanted: from the inputs, by operations that have derivatives themselves.
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if again:
            corner, offset = _locate(positions, ctx.window, ctx.size)
            offset = NotAgain.apply(offset)
            index, inside = _pixel_index(corner, ctx.window + 2, ctx.size)
            pixels = _gather_pixels(images, index, inside)
        grad_images = grad_positions = None
        if follow_images and again:
            grad_images = _scatter_pixels(
                _spread(grad, *_value_weights(offset).unbind(dim=2)), index, inside, ctx.size)
        elif follow_images:
            grid = meet(*_patch_rows_and_columns(positions, ctx.window, ctx.size))
            grad_images, _ = torch.ops.aten.grid_sampler_2d_backward(
                grad.flatten(2, 3), images, grid, 0, 0, False, (True, False))
        if follow_positions:
            slopes = _slopes(pixels, offset, ctx.size)
            grad_positions = torch.stack([(grad * slope).sum((1, 3, 4)) for slope in slopes], dim=-1)
        return grad_images, grad_positions, None, None


class NotAgain(torch.autograd.Function):
    """The same tensor, of which no derivative is taken: it would be a second one to positions or sizes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(offset: torch.Tensor) -> torch.Tensor:
        return offset.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> NoReturn:
        raise RuntimeError(
            "second derivatives to positions do not exist under convention='patch', nor any of windows with a spacing, "
            'whose first one is the symmetric difference over a pixel: take finite differences of the gradient, or '
            'name the other inputs to derive by (torch.autograd.grad(..., inputs=)).')


def symmetric_windows(images: torch.Tensor, positions: torch.Tensor, window: int, follow: bool) -> torch.Tensor:
    """`patch_windows` whose derivative to the positions is the symmetric difference.

    Args:
        images: (B, C, H, W), in float32 or float64.
        positions: (B, N, 2), in the same dtype.
        window: Side k of the window in pixels.
        follow: Whether a derivative to the positions is wanted, for which pixels are kept.
    """
    windows: torch.Tensor = _SymmetricWindows.apply(images, positions, window, follow)[0]
    return windows


def _locate(positions: torch.Tensor, window: int, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """First pixels (B, N, 2) of the blocks around windows, and by how much, in [0.5, 1.5], samples lie behind them."""
    first = torch.stack([p * L - window / 2 for p, L in zip(positions.unbind(-1), size)], dim=-1)
    corner = (first.detach() - 0.5).floor()
    return corner, first - corner


def _read_pixels(images: torch.Tensor, corner: torch.Tensor, side: int) -> torch.Tensor:
    """Blocks (B, C, N, side, side) of pixels from whole-numbered corners (B, N, 2), zero outside the image."""
    H, W = images.shape[-2:]
    steps = torch.arange(side, device=corner.device, dtype=corner.dtype)
    y = (2. * (corner[:, :, 0:1] + steps) + 1.) / H - 1.
    x = (2. * (corner[:, :, 1:2] + steps) + 1.) / W - 1.
    return read_lattice(images, y, x, mode='nearest', padding_mode='zeros', align_corners=False)


def _value_weights(offset: torch.Tensor) -> torch.Tensor:
    """Tent functions at the three pixels from which the first sample is `offset`, `offset - 1`, `offset - 2` away."""
    return torch.stack([(1. - offset).clamp(min=0.), 1. - (offset - 1.).abs(), (offset - 1.).clamp(min=0.)], dim=-1)


def _slopes(pixels: torch.Tensor, offset: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives (B, C, N, k, k) of windows to y and to x."""
    values_y, values_x = _value_weights(offset).unbind(dim=2)
    # The same tent functions half a pixel ahead minus half a pixel behind.
    slopes_y, slopes_x = torch.stack([offset - 1.5, 2. - 2. * offset, offset - 0.5], dim=-1).unbind(dim=2)
    H, W = size
    return _weigh_pixels(pixels, H * slopes_y, values_x), _weigh_pixels(pixels, values_y, W * slopes_x)


def _weigh_pixels(pixels: torch.Tensor, weights_y: torch.Tensor, weights_x: torch.Tensor) -> torch.Tensor:
    """Windows (B, C, N, k, k) of blocks (B, C, N, k + 2, k + 2), by weights (B, N, 3) for each axis."""
    return _weigh(_weigh(pixels, weights_x, -1), weights_y, -2)


def _weigh(x: torch.Tensor, weights: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum of three shifted views of (B, C, N, h, w) along `dim`, by weights (B, N, 3); shortens `dim` by 2."""
    first, second, third = weights[:, None, :, :, None, None].unbind(dim=3)
    length = x.shape[dim] - 2
    out = x.narrow(dim, 0, length) * first
    if transformed():  # vmap knows no addcmul
        return out + x.narrow(dim, 1, length) * second + x.narrow(dim, 2, length) * third
    return out.addcmul_(x.narrow(dim, 1, length), second).addcmul_(x.narrow(dim, 2, length), third)


# What follows is slower than reading by `grid_sample`, but has derivatives of every order.


def _pixel_index(corner: torch.Tensor, side: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the pixels of blocks lie in a flattened image, and whether they lie inside it, (B, 1, N, side, side)."""
    H, W = size
    steps = torch.arange(side, device=corner.device)
    y, x = (corner.long()[..., None] + steps)[:, None].unbind(dim=3)  # B 1 N side
    inside = ((y >= 0) & (y < H))[..., :, None] & ((x >= 0) & (x < W))[..., None, :]
    return y.clamp(0, H - 1)[..., :, None] * W + x.clamp(0, W - 1)[..., None, :], inside


def _gather_pixels(images: torch.Tensor, index: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """`_read_pixels` by index."""
    blocks = images.flatten(2).gather(2, index.flatten(2).expand(-1, images.shape[1], -1))
    return blocks.view(*images.shape[:2], *index.shape[2:]) * inside


def _scatter_pixels(
        blocks: torch.Tensor,
        index: torch.Tensor,
        inside: torch.Tensor,
        size: tuple[int, int],
) -> torch.Tensor:
    """Transpose of `_gather_pixels`: images (B, C, H, W) that hold the sum of all blocks."""
    B, C = blocks.shape[:2]
    empty = blocks.new_zeros((B, C, size[0] * size[1]))
    return empty.scatter_add(2, index.flatten(2).expand(-1, C, -1), (blocks * inside).flatten(2)).view(B, C, *size)


def _spread(windows: torch.Tensor, weights_y: torch.Tensor, weights_x: torch.Tensor) -> torch.Tensor:
    """Transpose of `_weigh_pixels`: blocks (B, C, N, k + 2, k + 2) of windows (B, C, N, k, k)."""
    rows = weights_y[:, None, :, :, None, None].unbind(dim=3)
    columns = weights_x[:, None, :, :, None, None].unbind(dim=3)
    tall = torch.stack([F.pad(windows * weight, (0, 0, i, 2 - i)) for i, weight in enumerate(rows)]).sum(dim=0)
    return torch.stack([F.pad(tall * weight, (i, 2 - i)) for i, weight in enumerate(columns)]).sum(dim=0)
