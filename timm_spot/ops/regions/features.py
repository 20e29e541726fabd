"""What a token tells of its region: the mean-injected image in its box, a soft mask, where it lies, its gradients.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652

A cell is one of the side x side of a histogram, of places or of gradients.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .graph import sum_channels, sum_groups


def region_means(values: torch.Tensor, segmentation: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Means (C, N) of values (B, C, H, W) over the N regions of a segmentation (B, H, W)."""
    flat = values.transpose(0, 1).flatten(1)
    return sum_groups(flat, segmentation.flatten(), len(sizes)) / sizes


def inject_means(
        images: torch.Tensor,
        segmentation: torch.Tensor,
        sizes: torch.Tensor,
        colors: torch.Tensor,
) -> torch.Tensor:
    """Replace each region's mean by its predicted colour.

    This is the path on which a gradient reaches what predicts the colours.

    Args:
        images: (B, 3, H, W).
        segmentation: (B, H, W), ids 0..N - 1 running across the batch.
        sizes: (N,).
        colors: (3, N).

    Returns:
        (B, H, W, 3).
    """
    shift = (colors - region_means(images, segmentation, sizes)).T.contiguous()
    return images.permute(0, 2, 3, 1) + shift.index_select(0, segmentation.flatten()).view(*segmentation.shape, -1)


@torch.no_grad()
def scharr_gradient(images: torch.Tensor) -> torch.Tensor:
    """Gradient (B, 2, H, W) of the mean of all channels, along y and along x, by the Scharr kernel."""
    grey = F.pad((sum_channels(images.transpose(0, 1)) / images.shape[1])[:, None], (1, 1, 1, 1), mode='replicate')
    dy = grey[:, :, 2:] - grey[:, :, :-2]
    dx = grey[..., 2:] - grey[..., :-2]
    dy = 3. * dy[..., :-2] + 10. * dy[..., 1:-1] + 3. * dy[..., 2:]
    dx = 3. * dx[:, :, :-2] + 10. * dx[:, :, 1:-1] + 3. * dx[:, :, 2:]
    return torch.cat([dy, dx], dim=1) / 32.


def _read_axis(low: torch.Tensor, high: torch.Tensor, side: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Lower and upper neighbour (N, side) of samples from the first to the last pixel, and the upper one's weight."""
    steps = torch.arange(side, device=low.device, dtype=dtype) / max(side - 1, 1)
    at = low[:, None] + steps * (high - low)[:, None]
    lower = at.floor()
    return lower.long(), torch.minimum(lower.long() + 1, high[:, None]), at - lower


def region_windows(
        injected: torch.Tensor,
        segmentation: torch.Tensor,
        boxes: torch.Tensor,
        image: torch.Tensor,
        side: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each region's bounding box, resampled to side x side by bilinear interpolation, and its soft mask.

    Args:
        injected: (B, H, W, C), read by the windows; gradient flows to its values.
        segmentation: (B, H, W), ids running across the batch.
        boxes: (4, N).
        image: (N,) index of each region's image.
        side: Samples per axis; the corner samples lie on the border pixels of the box.

    Returns:
        Windows (N, C, side, side) and masks (N, side, side): the weight of the samples' pixels inside the region.
    """
    _, H, W, C = injected.shape
    N = boxes.shape[1]
    ymin, xmin, ymax, xmax = boxes
    y0, y1, wy = _read_axis(ymin, ymax, side, injected.dtype)
    x0, x1, wx = _read_axis(xmin, xmax, side, injected.dtype)
    flat, ids = injected.reshape(-1, C), segmentation.flatten()
    region = torch.arange(N, device=boxes.device)[:, None, None]
    start = (image * H * W)[:, None, None]
    windows, masks = None, None
    for y, weight_y in ((y0, 1. - wy), (y1, wy)):
        row = start + (y * W)[:, :, None]
        for x, weight_x in ((x0, 1. - wx), (x1, wx)):
            pixel = (row + x[:, None, :]).flatten()
            weight = weight_y[:, :, None] * weight_x[:, None, :]
            read = flat.index_select(0, pixel).view(N, side, side, C) * weight[..., None]
            inside = weight * (ids.index_select(0, pixel).view(N, side, side) == region)
            windows = read if windows is None else windows + read
            masks = inside if masks is None else masks + inside
    assert windows is not None and masks is not None
    return windows.permute(0, 3, 1, 2), masks


@torch.no_grad()
def position_histogram(
        segmentation: torch.Tensor,
        sizes: torch.Tensor,
        side: int,
        scale: int | None = None,
        dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Where a region lies: the share of its pixels in each of side x side cells of the image.

    Args:
        segmentation: (B, H, W), ids running across the batch.
        sizes: (N,).
        side: Cells per axis.
        scale: The shares are divided by (scale / 32)^2; `side` by default.
        dtype: Of the result.

    Returns:
        (N, side, side).
    """
    _, H, W = segmentation.shape
    row = torch.arange(H, device=sizes.device) * side // H
    column = torch.arange(W, device=sizes.device) * side // W
    cell = segmentation * side ** 2 + (row[:, None] * side + column)
    return _histogram(cell, sizes, side, side if scale is None else scale, dtype)


@torch.no_grad()
def gradient_histogram(
        segmentation: torch.Tensor,
        sizes: torch.Tensor,
        gradient: torch.Tensor,
        side: int,
) -> torch.Tensor:
    """Histogram (N, side, side) of gradients (B, 2, H, W) over each region: row from the y part, column from the x.

    Cells divide [-1, 1]; a zero gradient falls into one certain cell. Values are shares over (side / 32)^2.
    """
    row, column = (side * (gradient + 1.) / 2. + 1e-5).floor().long().clamp(0, side - 1).unbind(1)
    return _histogram(segmentation * side ** 2 + row * side + column, sizes, side, side, gradient.dtype)


def _histogram(cell: torch.Tensor, sizes: torch.Tensor, side: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    count = torch.bincount(cell.flatten(), minlength=len(sizes) * side ** 2).view(-1, side, side)
    return count.to(dtype) / (sizes.to(dtype) * (scale / 32.) ** 2)[:, None, None]


def box_histogram(positions: torch.Tensor, sides: tuple[float, float], cells: int, scale: int) -> torch.Tensor:
    """Position histograms (N, cells * cells) of boxes around positions (N, 2), all as fractions of the image."""
    edges = torch.linspace(0., 1., cells + 1, dtype=positions.dtype, device=positions.device)
    shares = []
    for axis in range(2):
        low, high = positions[:, axis, None] - sides[axis] / 2, positions[:, axis, None] + sides[axis] / 2
        overlap = torch.minimum(high, edges[1:]) - torch.maximum(low, edges[:-1])
        shares.append(overlap.clamp_min(0.) / sides[axis])
    return (shares[0][:, :, None] * shares[1][:, None, :]).flatten(1) / (scale / 32.) ** 2


def fit_histogram_weights(table: torch.Tensor, cells: int, scale: int) -> torch.Tensor:
    """Weights of the position histogram that reproduce a ViT's position table, in closed form.

    Least squares in float64: histograms of the ViT's own patches, weighted by 1000, then of 8192 patches at
    quasi-random places whose targets are the table's bicubic interpolation.

    Args:
        table: (h, w, D), one row for each patch of the ViT's grid.
        cells: Cells per axis of the histogram.
        scale: What its values are scaled for, see `position_histogram`.

    Returns:
        (D, cells * cells), in the dtype of `table`. Where the patches are more than the cells allow to tell apart, the
        nearest that there is.
    """
    from scipy.stats import qmc

    h, w, _ = table.shape
    target, sides = table.double().cpu(), (1. / h, 1. / w)
    centres = torch.cartesian_prod(
        (torch.arange(h, dtype=torch.float64) + 0.5) / h, (torch.arange(w, dtype=torch.float64) + 0.5) / w)
    half = torch.tensor(sides, dtype=torch.float64) / 2
    between = half + torch.from_numpy(qmc.Sobol(d=2, rng=0).random_base2(13)) * (1. - 2. * half)
    between_target = F.grid_sample(
        target.permute(2, 0, 1)[None], 2 * between.flip(-1)[None, None] - 1,
        mode='bicubic', padding_mode='border', align_corners=False)[0, :, 0].T
    basis = torch.cat([
        1000. * box_histogram(centres, sides, cells, scale), box_histogram(between, sides, cells, scale)])
    rows = torch.cat([1000. * target.flatten(0, 1), between_target])
    weights: torch.Tensor = torch.linalg.lstsq(basis, rows, driver='gelsd').solution
    return weights.T.contiguous().to(table.dtype)
