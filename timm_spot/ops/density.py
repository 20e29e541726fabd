"""Placements from a density: a lattice carried through its inverse distribution function.

Paper: `Remarks on a Multivariate Transformation` (Rosenblatt) - https://doi.org/10.1214/aoms/1177729394

A point (u, v) of the unit square goes to where a share u of the density lies above, and in that row a share v of it to
the left. Even points thus become points of that density, as many as there are, without randomness; all of it can be
differentiated by the density and by the points.
"""
from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F


def shape_density(maps: torch.Tensor, power: float = 1., floor: float = 0.) -> torch.Tensor:
    """Non-negative maps as densities that sum to one each: raised to a power, and a share spread evenly.

    Args:
        maps: (B, h, w), no map zero everywhere.
        power: Above 1 tokens crowd where the map is large, below 1 they spread.
        floor: Share in [0, 1] of the density that is spread evenly.

    Example:
        >>> shape_density(torch.tensor([[[1., 2.], [0., 1.]]]), power=2., floor=0.4)
        tensor([[[0.2000, 0.5000],
                 [0.1000, 0.2000]]])
    """
    largest = maps.amax(dim=(1, 2), keepdim=True)  # divided out, a power cannot under- or overflow
    density = (maps / largest) ** power
    density = density / density.sum(dim=(1, 2), keepdim=True)
    return (1. - floor) * density + floor / density[0].numel()


def density_loss(density: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of densities from the maps that they should follow, mean over images.

    Args:
        density: (B, h, w), positive, each summing to one.
        maps: (B, H, W), not negative, none zero everywhere, averaged over the cells of the density.

    Example:
        >>> density_loss(torch.full((1, 2, 2), 0.25), torch.eye(4)[None])  # half of the cells have everything: log 2
        tensor(0.6931)
    """
    target = F.adaptive_avg_pool2d(maps, (density.shape[1], density.shape[2]))
    target = target / target.sum(dim=(1, 2), keepdim=True)
    return F.kl_div(density.log(), target, reduction='batchmean')


def place_by_density(lattice: torch.Tensor, density: torch.Tensor) -> torch.Tensor:
    """Carry a lattice through the inverse distribution function of a density.

    Rows of the density are interpolated, so that positions move smoothly with the lattice's; inside a bin the density
    is constant.

    Args:
        lattice: Points (y, x) in the unit square, (N, 2), or with the height and width of their cells, (N, 4).
        density: (B, h, w), not negative, each summing to one, of any resolution.

    Returns:
        Positions (B, N, 2) in [0, 1], or (B, N, 4) with the height and width of each cell, its edges carried too: the
        local stretch. Cells that tile the square still do so row by row where they have whole rows.

    Example:
        >>> density = torch.tensor([[[0.1, 0.1], [0.2, 0.6]]])  # of the lower row three quarters on the right
        >>> place_by_density(torch.tensor([[0.8, 0.5], [0.1, 0.5]]), density)
        tensor([[[0.8750, 0.6667],
                 [0.2500, 0.5000]]])
    """
    lattice = lattice.to(density)
    rows = density.sum(dim=2)[:, None]  # B 1 h
    y, height = _invert(rows, lattice[:, 0], lattice[:, 2] if lattice.shape[1] == 4 else None)
    h = density.shape[1]
    row = torch.arange(h, dtype=density.dtype, device=density.device)
    # The bins whose centres are next, at the borders the outermost alone.
    weight = 1. - ((y * h - 0.5).clamp(0., h - 1.)[..., None] - row).abs()
    # The meta device knows no autocast.
    with nullcontext() if density.is_meta else torch.autocast(density.device.type, enabled=False):
        between = weight.clamp(min=0.) @ density  # B N w
    x, width = _invert(between, lattice[:, 1], lattice[:, 3] if lattice.shape[1] == 4 else None)
    return torch.stack([y, x] if height is None or width is None else [y, x, height, width], dim=-1)


def _invert(
        weights: torch.Tensor,
        share: torch.Tensor,
        extent: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where shares (N,) of the weights (B, 1 or N, L) of equal bins lie, (B, N), and how far `extent` (N,) reaches."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[..., -1:]
    before = cumulative - weights
    # A bin of no weight is passed at once.
    weights = weights.clamp(min=torch.finfo(weights.dtype).tiny)

    def invert(share: torch.Tensor) -> torch.Tensor:
        # Each bin is full, empty or in part: no index is looked up, so this exports as it is.
        return ((share[:, None] * total - before) / weights).clamp(0., 1.).mean(dim=-1)

    if extent is None:
        return invert(share), None
    return invert(share), invert((share + extent / 2).clamp(max=1.)) - invert((share - extent / 2).clamp(min=0.))
