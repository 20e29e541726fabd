"""The vertices of a hierarchy from which an image's budget of regions is merged.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652
"""
from __future__ import annotations

import torch

from .graph import grid_edges, merge_boxes, number_groups, pixel_boxes, unique_edges
from .hierarchy import Hierarchy, Pieces

_COARSEST = 2  # later levels have merged what a budget may want apart


def vertices_for_budget(hierarchy: Hierarchy, features: torch.Tensor, target: int) -> Pieces:
    """Each image's vertices of level 2; of level 1, or pixels, where those are fewer than the budget.

    Args:
        hierarchy: Of the images.
        features: Pixel features (B, C, H, W) that it was built from.
        target: Regions wanted of each image.

    Returns:
        Pieces, at least `target` of each image that has as many pixels; the features carry gradient.
    """
    B, _, H, W = features.shape
    levels = hierarchy.levels[:_COARSEST]
    records = torch.arange(B * H * W, device=features.device).view(B, H, W)
    tables, start = [features.transpose(0, 1).flatten(1)], records.numel()
    for level, segmentation in zip(levels, hierarchy.segmentations((B, H, W))):
        enough = torch.bincount(level.image, minlength=B) >= target
        records = torch.where(enough[:, None, None], start + segmentation, records)
        tables.append(level.features)
        start += len(level.sizes)
    flat = records.flatten()
    first_pixel = torch.full((start,), len(flat), device=flat.device).scatter_reduce_(
        0, flat, torch.arange(len(flat), device=flat.device), 'amin')
    group, first = number_groups(first_pixel[flat])
    segmentation = group.view(B, H, W)
    return Pieces(
        segmentation=segmentation,
        features=torch.cat(tables, dim=1).index_select(1, flat[first]),
        sizes=torch.bincount(group, minlength=len(first)),
        boxes=merge_boxes(pixel_boxes(B, H, W, flat.device), group, len(first)),
        image=first // (H * W),
        edges=unique_edges(grid_edges(segmentation)),
    )
