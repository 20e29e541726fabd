"""Sizes of tokens: cells that tile the picture, spacings that let windows cover them, and what a token is told of it.

A token's cell is the part of the image that is nearer to it than to its neighbours. At `coverage` 1 its window is as
large as the cell, so that all windows together cover the picture, coarsely where tokens lie far apart and finely where
they lie close; at 0 every sample is a pixel, as in `SPoT: Subpixel Placement of Tokens in Vision Transformers` -
https://arxiv.org/abs/2507.01654; between them

    spacing = (cell / k) ^ coverage
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

SIZE_NODES = (-2., -1., 1., 2., 3., 4., 5., 6.)  # log2 of spacings, one axis; 0 is the window of spacing 1


def check_coverage(coverage: float | Sequence[float]) -> tuple[float, float]:
    """Smallest and largest of a fixed coverage, or of coverages (low, high).

    Raises:
        TypeError: Not a number, nor two.
        ValueError: Outside of [0, 1], or the first above the second.
    """
    both: Any = coverage if isinstance(coverage, (list, tuple)) and len(coverage) == 2 else (coverage, coverage)
    low, high = both
    for value in (low, high):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f'coverage={coverage!r} must be one number in [0, 1] or two, the smallest and the largest.')
        if not 0. <= value <= 1.:
            raise ValueError(f'coverage={coverage!r} lies outside [0, 1]: 0 is a pixel a sample, 1 tiles the picture.')
    if low > high:
        raise ValueError(f'coverage={coverage!r} is out of order: give the smaller first, ({high}, {low}).')
    return float(low), float(high)


def neighbour_cells(positions: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """Cells of scattered tokens: squares by the mean distance to the two nearest, together as large as the image.

    One that would be higher or wider than the image has its height or width, and the same area.

    Args:
        positions: (B, N, 2) of (y, x), fractions of the image.
        image_size: (H, W) in pixels.

    Returns:
        Height and width of each cell in fractions of the image, (B, N, 2).

    Example:
        >>> row = torch.tensor([[[0.5, 0.125], [0.5, 0.375], [0.5, 0.875]]])  # two close to each other, one apart
        >>> [round(width, 2) for width in neighbour_cells(row, (8, 32))[0, :, 1].tolist()]
        [0.32, 0.21, 0.5]
    """
    H, W = image_size
    n_tokens = positions.shape[1]
    if n_tokens == 1:
        return torch.ones_like(positions)
    pixels = positions * positions.new_tensor([H, W])
    distance = (pixels[:, :, None] - pixels[:, None]).square().sum(-1)  # B N N
    distance = distance + torch.diag_embed(torch.full_like(distance[:, 0], torch.inf))
    nearest = distance.topk(min(2, n_tokens - 1), dim=-1, largest=False).values
    side = nearest.clamp(min=1.).sqrt().mean(dim=-1)  # tokens on one spot are a pixel apart
    side = side * (H * W / side.square().sum(dim=-1, keepdim=True)).sqrt()
    area = side.square()
    height = side.clamp(max=H).maximum(area / W)
    return torch.stack([height / H, area / height / W], dim=-1)


def cell_spacing(
        cells: torch.Tensor,
        image_size: tuple[int, int],
        window: int,
        coverage: float | torch.Tensor,
) -> torch.Tensor:
    """Spacings (B, N, 2) of windows of k samples that cover their cells to a degree.

    Where tokens crowd, cells are smaller than a window of single pixels, which has all that there is to see: spacings
    stay at 1, or at half of an even lattice's where there are more tokens than patches.

    Args:
        cells: Height and width in fractions of the image, (B, N, 2).
        image_size: (H, W) in pixels.
        window: Side k of a window in samples.
        coverage: In [0, 1], a number or of a shape that broadcasts.

    Example:
        >>> cell_spacing(torch.tensor([[[0.25, 0.5]]]), (64, 64), window=8, coverage=1.)
        tensor([[[2., 4.]]])
        >>> cell_spacing(torch.tensor([[[0.25, 0.5]]]), (64, 64), window=8, coverage=0.5)
        tensor([[[1.4142, 2.0000]]])
    """
    H, W = image_size
    finest = min(1., 0.5 * math.sqrt(H * W / cells.shape[-2]) / window)
    spacing: torch.Tensor = (cells * cells.new_tensor([H, W]) / window).clamp(min=finest) ** coverage
    return spacing


def add_sizes(
        positions: torch.Tensor,
        image_size: tuple[int, int],
        window: int,
        coverage: float,
) -> torch.Tensor:
    """Positions (B, N, 2) with spacings by the distances between them, (B, N, 4); as they are at coverage 0.

    Args:
        positions: (B, N, 2) of (y, x), fractions of the image.
        image_size: (H, W) in pixels.
        window: Side k of a window in samples.
        coverage: In [0, 1].
    """
    if coverage == 0.:
        return positions
    cells = neighbour_cells(positions, image_size)
    return torch.cat([positions, cell_spacing(cells, image_size, window, coverage)], dim=-1)


def default_coarse(n_tokens: int) -> int:
    """How many of a budget's tokens are coarse in a mixed placement: the largest square up to two thirds.

    Example:
        >>> [default_coarse(n) for n in (1, 2, 16, 25, 49, 100)]
        [1, 1, 9, 16, 25, 64]
    """
    return max(1, math.isqrt(2 * n_tokens // 3)) ** 2


def size_feature(spacing: torch.Tensor) -> torch.Tensor:
    """What a token is told of its size: psi(log s), hat functions of log2 of the spacing, for y and then for x.

    All are 0 at spacing 1, so that windows of single pixels have no size. Beyond the outermost nodes, spacings of 1/4
    and 64 pixels, nothing changes.

    Args:
        spacing: (B, N, 2) in pixels.

    Returns:
        (B, N, 16), in [0, 1].

    Example:
        >>> size_feature(torch.tensor([[[1., 2.8284]]]))[0, 0, 8:].round(decimals=2).tolist()
        [0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]
    """
    nodes = spacing.new_tensor(SIZE_NODES)
    octave = spacing.log2().clamp(SIZE_NODES[0], SIZE_NODES[-1])
    return (1. - (octave[..., None] - nodes).abs()).clamp(min=0.).flatten(-2)


def check_n_coarse(n_coarse: Any, n_tokens: int) -> int:
    """The count of coarse tokens in a mixed placement of `n_tokens`, None for the default; at most all of them.

    Raises:
        TypeError, ValueError: No whole number of at least 1.
    """
    if n_coarse is None:
        return default_coarse(n_tokens)
    if isinstance(n_coarse, bool) or not isinstance(n_coarse, int):
        raise TypeError(f'n_coarse must be an int, got {n_coarse!r} ({type(n_coarse).__name__}).')
    if n_coarse < 1:
        raise ValueError(f'n_coarse={n_coarse} must be at least 1.')
    return min(n_coarse, n_tokens)  # budgets that are drawn may be smaller
