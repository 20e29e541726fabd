"""Windows of any size: read from a pyramid, so that a coarse window sees the picture blurred to its own scale.

A window of spacing s has its samples s pixels apart. Read from the picture itself it would miss what lies between them;
it is read from copies of the picture whose pixels are averages over 1, 2, 4, ... pixels, interpolated within a copy and
between the two copies nearest to s (trilinear, as the texture units of graphics cards do; Williams, `Pyramidal
Parametrics`, SIGGRAPH 1983). Each axis has its own scale, so that windows may be taller than wide.
"""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .bilinear import NotAgain, meet, read_lattice, transformed

_GAP = 2  # lines of zeros behind each copy: interpolation and its derivative never see the next one


def level_count(image_size: tuple[int, int], window: int) -> int:
    """Copies of an image of (H, W) pixels that windows need which are at most as large as the image.

    Example:
        >>> level_count((224, 224), 14)  # 1, 2, 4, 8 and 16 pixels
        5
    """
    return 1 + max(0, math.ceil(math.log2(max(image_size) / window)))


def build_pyramid(images: torch.Tensor, levels: range) -> torch.Tensor:
    """Copies of images (B, C, H, W) in one picture: averages over 2^a rows and 2^b columns, a and b in `levels`.

    Blocks of rows follow each other from the finest to the coarsest, as do blocks of columns; each has two lines of
    zeros behind it. Pixels outside the image are zeros, in averages too.

    Example:
        >>> build_pyramid(torch.tensor([[[[1., 3.], [5., 7.]]]]), range(2))[0, 0]
        tensor([[1., 3., 0., 0., 2., 0., 0.],
                [5., 7., 0., 0., 6., 0., 0.],
                [0., 0., 0., 0., 0., 0., 0.],
                [0., 0., 0., 0., 0., 0., 0.],
                [3., 5., 0., 0., 4., 0., 0.],
                [0., 0., 0., 0., 0., 0., 0.],
                [0., 0., 0., 0., 0., 0., 0.]])
    """
    H, W = images.shape[-2:]
    if _padded(H, levels) > H or _padded(W, levels) > W:
        images = F.pad(images, (0, _padded(W, levels) - W, 0, _padded(H, levels) - H))
    for _ in range(levels.start):
        images = _halve(_halve(images, -2), -1)
    return _stack(_stack(images, -2, len(levels)), -1, len(levels))


@torch.library.custom_op('timm_spot::build_pyramid', mutates_args=())
def _operator(images: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    return build_pyramid(images, range(first, stop))


@torch.library.custom_op('timm_spot::build_pyramid_backward', mutates_args=())
def _operator_backward(grad: torch.Tensor, height: int, width: int, first: int, stop: int) -> torch.Tensor:
    with torch.enable_grad():
        images = grad.new_zeros((*grad.shape[:2], height, width)).requires_grad_()
        gradient, = torch.autograd.grad(build_pyramid(images, range(first, stop)), images, grad)
    return gradient


@_operator.register_fake
def _(images: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    levels = range(first, stop)
    sides = [sum(_padded(side, levels) // 2 ** level + _GAP for level in levels) for side in images.shape[-2:]]
    return images.new_empty((*images.shape[:2], *sides))


@_operator_backward.register_fake
def _(grad: torch.Tensor, height: int, width: int, first: int, stop: int) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:2], height, width))


def _keep_size(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    images, *ctx.levels = inputs
    ctx.size = images.shape[-2:]


def _to_images(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return _operator_backward(grad, *ctx.size, *ctx.levels), None, None


_operator.register_autograd(_to_images, setup_context=_keep_size)


def _stack(x: torch.Tensor, dim: int, levels: int) -> torch.Tensor:
    """Lines of x along `dim`, then averages of 2, 4, ... of them, zeros behind each."""
    gap = torch.zeros_like(x.narrow(dim, 0, 1)).repeat_interleave(_GAP, dim)
    blocks = [x, gap]
    for _ in range(levels - 1):
        x = _halve(x, dim)
        blocks += [x, gap]
    return torch.cat(blocks, dim=dim)


def _halve(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Averages of pairs of lines: ten times as fast on a CPU as a mean or a pooling."""
    even, odd = (x[..., i::2, :] if dim == -2 else x[..., i::2] for i in range(2))
    return (even + odd).mul_(0.5)


def _padded(length: int, levels: range) -> int:
    """Pixels of an axis that all levels divide."""
    unit: int = 2 ** (levels.stop - 1)
    return -(-length // unit) * unit


def sized_windows(
        images: torch.Tensor,
        positions: torch.Tensor,
        spacing: torch.Tensor,
        window: int,
        levels: range,
) -> torch.Tensor:
    """Windows (B, C, N, k, k) of samples `spacing` pixels apart.

    The derivative to positions and to spacing is right wherever interpolation has one; across a pixel's centre (of the
    copy that is read) it is the symmetric difference over that pixel, as for windows of spacing 1. At spacings 1, 2,
    4, ... it is that towards larger ones.

    Args:
        images: (B, C, H, W), in float32 or float64.
        positions: (B, N, 2), in the same dtype.
        spacing: (B, N, 2) along y and x, positive, in the same dtype. Below 1 the picture itself is interpolated.
        window: Side k of a window in samples.
        levels: Copies that are read, of 2^a pixels: windows of other spacings read the nearest of these. See
            `levels_between` and `level_count`.
    """
    (B, C, H, W), N = images.shape, positions.shape[1]
    fine, share = _between(spacing, levels)
    coarse = (fine + 1.).clamp(max=levels.stop - 1.)
    offsets = torch.arange(window, device=positions.device, dtype=positions.dtype) - (window - 1) / 2
    lines = []
    for axis, length in enumerate((H, W)):
        edge = positions[..., axis, None] * length + spacing[..., axis, None] * offsets  # B N k, 0 at the image's edge
        side = _padded(length, levels) / 2 ** levels.start  # of the finest copy
        lines.append(torch.cat(
            [_line(edge, level[..., axis, None], side, levels.start) for level in (fine, coarse)], dim=-1))
    # Inductor loses itself in copies of copies whose sides it does not know; to it they are one operator.
    compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    pyramid = _operator(images, levels.start, levels.stop) if compiled else build_pyramid(images, levels)
    samples = _SymmetricLattice.apply(pyramid, *lines).view(B, C, N, 2, window, 2, window)
    weights = _corner_weights(share)[:, None, :, :, :, None, None]  # B 1 N 2 2 1 1
    # A product of matrices would copy all samples into another order first.
    parts = [samples[:, :, :, u, :, v] * weights[:, :, :, u, v] for u in range(2) for v in range(2)]
    return torch.stack(parts).sum(dim=0)


def levels_between(spacing: torch.Tensor, image_size: tuple[int, int], window: int) -> range:
    """Levels that windows of these spacings read, in images of (H, W) pixels.

    Looks at the values. Where a derivative to them is wanted, the next level is there too.

    Example:
        >>> levels_between(torch.tensor([2.5, 3.2]), (224, 224), window=14)
        range(1, 3)
    """
    least, most = (math.log2(max(s, 1.)) for s in (spacing.min().item(), spacing.max().item()))
    last = level_count(image_size, window) - 1
    return range(min(math.floor(least), last), min(math.ceil(most) + spacing.requires_grad, last) + 1)


def _between(spacing: torch.Tensor, levels: range) -> tuple[torch.Tensor, torch.Tensor]:
    """The level at or below log2 of spacings, and how far they lie on the way to the next, both of the same shape."""
    level = spacing.clamp(min=2. ** levels.start).log2().clamp(max=levels.stop - 1.)
    fine = level.detach().floor()
    return fine, level - fine


def _corner_weights(share: torch.Tensor) -> torch.Tensor:
    """Weights (B, N, 2, 2) of the finer and coarser level along y and along x, from shares (B, N, 2).

    Linear on either side of the diagonal: equal shares blend two copies only, the finer and the coarser in both axes.
    """
    y, x = share.unbind(dim=-1)
    apart = y - x
    # Halves of |.|: on the diagonal the derivative is the mean of both sides.
    either = torch.stack([(apart.abs() - apart) / 2, (apart.abs() + apart) / 2], dim=-1)
    both = (y + x - apart.abs()) / 2
    weights = torch.stack([1. - both - either.sum(-1), either[..., 0], either[..., 1], both], dim=-1)
    return weights.view(*y.shape, 2, 2)


def _line(edge: torch.Tensor, level: torch.Tensor, side: float, first: int) -> torch.Tensor:
    """Index in the pyramid of a sample `edge` pixels from the image's edge, in the copy of a level.

    The copy of the first level has `side` lines.
    """
    scale = torch.exp2(level)
    length = side * 2. ** first / scale
    start = 2. * (side - length) + _GAP * (level - first)  # side (1 + 1/2 + 1/4 + ...) of the finer copies, and gaps
    # Beyond -1 and the length all is zero.
    return start + (edge / scale - 0.5).clamp(min=-1.).minimum(length)


class _SymmetricLattice(torch.autograd.Function):
    """Pixels where rows y (B, N, h) meet columns x (B, N, w), whose derivative is f(x + 1/2) - f(x - 1/2)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(images: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return _read(images, y, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, y, x = ctx.saved_tensors
        grads: list[torch.Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[0]:
            grads[0], _ = torch.ops.aten.grid_sampler_2d_backward(
                grad.flatten(2, 3), images, meet(*_counted(images, y, x)), 0, 0, False, (True, False))
        if ctx.needs_input_grad[1]:
            grads[1] = (grad * (_read(images, y + 0.5, x) - _read(images, y - 0.5, x))).sum((1, 4))
        if ctx.needs_input_grad[2]:
            grads[2] = (grad * (_read(images, y, x + 0.5) - _read(images, y, x - 0.5))).sum((1, 3))
        if torch.is_grad_enabled() and not (torch.compiler.is_compiling() or transformed()):
            return tuple(None if g is None else NotAgain.apply(g) for g in grads)
        return tuple(grads)


def _counted(images: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns by index as `grid_sample` counts them, from -1 to 1."""
    H, W = images.shape[-2:]
    return (2. * y + 1.) / H - 1., (2. * x + 1.) / W - 1.


def _read(images: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Pixels (B, C, N, h, w) where rows meet columns, by index: 0 is the centre of the first pixel."""
    return read_lattice(
        images, *_counted(images, y, x), mode='bilinear', padding_mode='zeros', align_corners=False)
