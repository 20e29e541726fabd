"""Lattices: placements that follow from the budget and the size of the image alone, with the cells of their tokens.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654
"""
from __future__ import annotations

import itertools
import math

import torch


def isotropic(n_tokens: int, image_size: tuple[int, int]) -> torch.Tensor:
    """Centres of equal cells, and these: a square lattice, or rows of nearly equal length.

    The number of rows makes the tightest cell as wide, in pixels, as the budget allows.
    """
    H, W = image_size
    ideal = math.sqrt(n_tokens * H / W)
    candidates = {min(n_tokens, max(1, math.floor(ideal))), min(n_tokens, max(1, math.ceil(ideal)))}
    rows = max(candidates, key=lambda r: (min(H / r, W / math.ceil(n_tokens / r)), r))
    return _lattice(n_tokens, rows)


def center(n_tokens: int, image_size: tuple[int, int]) -> torch.Tensor:
    """The isotropic lattice pulled to the middle of the image; cells reach to where the pull carries their edges."""
    lattice = isotropic(n_tokens, image_size)
    centres, half = lattice[:, :2], lattice[:, 2:] / 2
    positions = _pull_to_center(centres)
    edges = torch.stack([positions - _pull_to_center(centres - half), _pull_to_center(centres + half) - positions])
    return torch.cat([positions, 2 * edges.amax(dim=0)], dim=-1)


def grid(n_tokens: int, image_size: tuple[int, int], window: int) -> torch.Tensor:
    """Centres of a ViT's patches, row by row; for smaller budgets an even subset of them."""
    H, W = image_size
    rows, columns = H // window, W // window
    if n_tokens > rows * columns:
        raise ValueError(
            f"n_tokens={n_tokens} exceeds the {rows} x {columns} patches that sampler 'grid' finds in images of "
            f"{H} x {W} px with window={window}; 'isotropic' takes any budget.")
    # The patches nearest to the isotropic lattice, its rows neither more nor longer than the grid's.
    lattice_rows = round(math.sqrt(n_tokens * rows / columns))
    lattice_rows = min(rows, n_tokens, max(lattice_rows, math.ceil(n_tokens / columns)))
    patches = torch.tensor([rows, columns], dtype=torch.float64, device='cpu')
    lattice = _lattice(n_tokens, lattice_rows)
    patch = torch.floor(lattice[:, :2] * patches + 1e-9)
    scale = window / torch.tensor([H, W], dtype=torch.float64, device='cpu')
    return torch.cat([(patch + 0.5) * scale, lattice[:, 2:] * patches * scale], dim=-1)


def grid_uniform(n_tokens: int, image_size: tuple[int, int]) -> torch.Tensor:
    """The authors' even lattice, rounded to whole pixels; not every budget exists."""
    return _authors_lattice('grid_uniform', 'isotropic', n_tokens, image_size)


def grid_center(n_tokens: int, image_size: tuple[int, int]) -> torch.Tensor:
    """The authors' even lattice, pulled to the middle; not every budget exists."""
    return _pull_to_center(_authors_lattice('grid_center', 'center', n_tokens, image_size))


def lattice_shape(positions: torch.Tensor) -> tuple[int, int] | None:
    """Rows and columns of a placement that is a lattice, or None.

    A lattice has its tokens row by row, those of a row at one y, those of a column at one x, both ascending; all
    images share it.

    Args:
        positions: (B, N, 2).

    Example:
        >>> lattice_shape(isotropic(12, (96, 128))[None, :, :2])
        (3, 4)
        >>> lattice_shape(isotropic(11, (96, 128))[None, :, :2]) is None
        True
    """
    if not (positions == positions[:1]).all():
        return None
    y, x = positions[0].unbind(dim=-1)
    n = y.shape[0]
    columns = int((y == y[0]).sum())
    if n % columns:
        return None
    y, x = y.view(-1, columns), x.view(-1, columns)
    rectangular = (y == y[:, :1]).all() and (x == x[:1]).all()
    ascending = (y[:, 0].diff() > 0).all() and (x[0].diff() > 0).all()
    return (n // columns, columns) if rectangular and ascending else None


def _lattice(n_tokens: int, rows: int) -> torch.Tensor:
    """Cells in `rows` rows of nearly equal length: centre, height and width, (n_tokens, 4) in float64."""
    # Rounding the running total spreads the longer rows evenly.
    ends = [math.floor(i * n_tokens / rows + 0.5) for i in range(rows + 1)]
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    points = [
        ((i + 0.5) / rows, (j + 0.5) / length, 1 / rows, 1 / length)
        for i, length in enumerate(lengths) for j in range(length)]
    return torch.tensor(points, dtype=torch.float64, device='cpu')


def _pull_to_center(positions: torch.Tensor) -> torch.Tensor:
    """0.5 + d (1 - exp(-(d / 0.2)^2)) for the offset d from 0.5, along each axis."""
    offset = positions - 0.5
    return 0.5 + offset * (1 - torch.exp(-(offset / 0.2).square()))


def _authors_lattice(name: str, instead: str, n_tokens: int, image_size: tuple[int, int]) -> torch.Tensor:
    """Whole-pixel lattice: step = round(sqrt(H W / n)), start = floor(sqrt(H W / n) / 2), position = index / size."""
    if n_tokens == 1:
        return torch.full((1, 2), 0.5, dtype=torch.float64, device='cpu')
    H, W = image_size
    spacing = math.sqrt(H * W / n_tokens)
    step, start = max(1, round(spacing)), math.floor(spacing / 2)
    points = [(y / H, x / W) for y in range(start, H, step) for x in range(start, W, step)]
    if len(points) != n_tokens:
        raise ValueError(
            f'n_tokens={n_tokens} does not exist for sampler {name!r} on images of {H} x {W} px (its lattice has '
            f'{len(points)} points); {instead!r} takes any budget.')
    return torch.tensor(points, dtype=torch.float64, device='cpu')
