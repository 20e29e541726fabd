"""Position feature: a Gaussian radial basis over the unit square, and its fit to a ViT's position table.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

A token's position enters the model as W_pos . phi(position), with one Gaussian bump for each of m x m nodes at
linspace(0, 1, m):

    phi_ab = exp(-((y - node_a)^2 + (x - node_b)^2) / (2 sigma^2))
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def position_feature(positions: torch.Tensor, nodes: int, sigma: torch.Tensor, scaled: bool = False) -> torch.Tensor:
    """Gaussian radial basis of positions.

    Args:
        positions: (B, N, 2) of (y, x).
        nodes: Nodes m per axis, at linspace(0, 1, m).
        sigma: Width of a bump as a fraction of the image, scalar tensor.
        scaled: Divide by the largest value over all nodes and all tokens of each image (convention `spot`).

    Returns:
        phi of shape (B, N, m * m), row-major over (y node, x node), values in [0, 1].

    Example:
        >>> import torch
        >>> position_feature(torch.tensor([[[0., 1.]]]), nodes=2, sigma=torch.tensor(0.1))
        tensor([[[0., 1., 0., 0.]]])
    """
    centres = torch.linspace(0., 1., nodes, device=positions.device, dtype=positions.dtype)
    offset = positions[:, :, :, None] - centres
    log_phi = offset * offset * (-0.5 / sigma.to(positions.dtype).square())  # B N 2 m
    if scaled:
        # phi is separable: its largest value over all nodes is that of the best row times that of the best column.
        # Subtracting logarithms cannot divide by an underflowed maximum.
        best = log_phi.amax(dim=-1, keepdim=True)  # B N 2 1
        token_best = best.sum(dim=2)  # B N 1
        token_scale = token_best - token_best.amax(dim=1, keepdim=True)
        log_phi = log_phi - best + torch.stack([token_scale, torch.zeros_like(token_scale)], dim=2)
    # Cut negligible factors to zero: a CPU is slow at subnormal numbers, in exp and fourfold in the matmul of products.
    phi = torch.exp(log_phi.masked_fill(log_phi <= math.log(1e-18), -math.inf))
    return (phi[:, :, 0][:, :, :, None] * phi[:, :, 1][:, :, None, :]).flatten(2)


def fit_position_weights(
        table: torch.Tensor,
        nodes: int,
        sigma: torch.Tensor,
        extent: tuple[float, float] = (1., 1.),
) -> torch.Tensor:
    """Weights of the (unscaled) position feature that reproduce a ViT's position table, in closed form.

    Least squares in float64: phi at the table's own patch centres, weighted by 1000, then at 8192 quasi-random
    positions (more above 64 nodes) whose targets are the table's bicubic interpolation.

    Args:
        table: (h, w, D), one row for each patch of the ViT's grid.
        nodes: Nodes m per axis, at least max(h, w).
        sigma: Width of a bump, scalar tensor.
        extent: Part of the image's height and width that the table covers; a ViT drops the last pixels of an image
            whose size is no multiple of its patch.

    Returns:
        W_pos of shape (D, m * m), in the dtype of `table`.

    Raises:
        ValueError: `nodes` is smaller than the longer side of the table.
    """
    from scipy.stats import qmc

    h, w, _ = table.shape
    if nodes < max(h, w):
        raise ValueError(f'pos_nodes={nodes} cannot hold a position table of {h} x {w}, use at least {max(h, w)}.')
    target = table.double()
    centres = torch.cartesian_prod(
        (torch.arange(h, dtype=torch.float64) + 0.5) / h, (torch.arange(w, dtype=torch.float64) + 0.5) / w)
    covered = torch.tensor(extent, dtype=torch.float64)
    centres = centres * covered
    log2 = max(13, math.ceil(math.log2(2 * nodes ** 2)))
    between = torch.from_numpy(qmc.Sobol(d=2, rng=0).random_base2(log2))
    between_target = F.grid_sample(
        target.permute(2, 0, 1)[None], 2 * (between / covered).flip(-1)[None, None] - 1,
        mode='bicubic', padding_mode='border', align_corners=False)[0, :, 0].T

    def basis(positions: torch.Tensor) -> torch.Tensor:
        return position_feature(positions[None], nodes, sigma.double())[0]

    phi = torch.cat([1000 * basis(centres), basis(between)])
    rows = torch.cat([1000 * target.flatten(0, 1), between_target])
    # The normal equations: in float64 their conditioning costs 1e-9, and they take an eighth of the time of `lstsq`.
    weights = torch.cholesky_solve(phi.T @ rows, torch.linalg.cholesky(phi.T @ phi))
    return weights.T.contiguous().to(table.dtype)
