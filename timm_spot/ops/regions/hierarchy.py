"""A hierarchy of regions, level by level, and for each region the level that an information criterion likes best.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652
"""
from __future__ import annotations

import math
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch

from .criteria import information_criterion
from .graph import (
    best_neighbours,
    best_potential,
    choice_components,
    compactness,
    connected_components,
    contract,
    edge_potential,
    grid_edges,
    merge_boxes,
    number_groups,
    pixel_boxes,
    pixel_choice,
    unique_edges,
)


class Level(NamedTuple):
    """What one contraction leaves, of all images together: n vertices with C channels."""
    parent: torch.Tensor  # vertex of this level that each vertex of the one below became part of
    weight: torch.Tensor  # omega of each vertex of the level below
    features: torch.Tensor  # (C, n)
    variances: torch.Tensor  # (C, n)
    sizes: torch.Tensor  # (n,) pixels
    boxes: torch.Tensor  # (4, n)
    criterion: torch.Tensor  # (n,)
    image: torch.Tensor  # (n,) index of the image
    best: torch.Tensor  # label of the best region of each pixel, or of each vertex of level 1


class Pieces(NamedTuple):
    """The best regions cut into 4-connected pieces, N of all images together."""
    segmentation: torch.Tensor  # (B, H, W), numbered by first pixel
    features: torch.Tensor  # (C, N), of the best region that a piece belongs to
    sizes: torch.Tensor  # (N,)
    boxes: torch.Tensor  # (4, N)
    image: torch.Tensor  # (N,)
    edges: torch.Tensor  # (2, E) between neighbours


class _Selection:
    """The best regions so far: for each its current vertex, its criterion, and the level and vertex it is.

    Regions start as pixels. Where all of them gave way at level 1, as in any but a tiny image, the vertices of level 1
    take the place of the pixels, and nothing of the size of the image is touched again.
    """

    def __init__(self, batch_size: int, pixels: int, device: torch.device, dtype: torch.dtype) -> None:
        n = batch_size * pixels
        self.owner = torch.arange(n, device=device)
        self.criterion = torch.full((n,), -math.sqrt(pixels), device=device, dtype=dtype)
        self.level = torch.zeros(n, dtype=torch.long, device=device)
        self.vertex = self.owner
        self.label = self.owner  # of each pixel, or of each vertex of level 1
        self.on_level_1 = False

    def update(self, level: int, parent: torch.Tensor, criterion: torch.Tensor) -> torch.Tensor:
        """Let regions that are no better give way to the vertex they lie in; returns which of them did."""
        owner = parent.index_select(0, self.owner)
        give_way = self.criterion <= criterion.index_select(0, owner)
        if level == 1 and bool(give_way.all()):
            n = len(criterion)
            self.owner = self.vertex = self.label = torch.arange(n, device=owner.device)
            self.criterion, self.level = criterion, torch.ones_like(self.owner)
            self.on_level_1 = True
            return give_way
        stay = ~give_way
        won = torch.zeros(len(criterion), dtype=torch.bool, device=owner.device).index_fill_(0, owner[give_way], True)
        stay_id = stay.cumsum(0) - 1
        number = torch.where(stay, stay_id, (stay_id[-1] + won.cumsum(0))[owner])
        won = won.nonzero()[:, 0]
        self.label = number[self.label]
        self.owner = torch.cat([owner[stay], won])
        self.criterion = torch.cat([self.criterion[stay], criterion[won]])
        self.level = torch.cat([self.level[stay], torch.full_like(won, level)])
        self.vertex = torch.cat([self.vertex[stay], won])
        return give_way


class Hierarchy(NamedTuple):
    """All levels of a batch and its pieces.

    `whole` is the candidate that takes each image for one region.
    """
    levels: List[Level]
    whole: Level
    pieces: Pieces

    def segmentations(self, shape: Tuple[int, int, int]) -> List[torch.Tensor]:
        """The partition (B, H, W) of each level from the first on, ids running across the batch."""
        out: List[torch.Tensor] = []
        for level in self.levels:
            out.append(level.parent.view(shape) if not out else level.parent[out[-1]])
        return out


def build_hierarchy(
        features: torch.Tensor,
        self_similarity: Callable[[torch.Tensor], torch.Tensor],
        cmp: float = 0.1,
        iota: float = 5.,
        criterion: str = 'aicc',
        min_avg_region: int = 6,
        max_levels: Optional[int] = None,
) -> Hierarchy:
    """Merge pixels into regions level by level and select the best regions.

    An image's result depends on nothing but its own features: it stops on its own count, and what it holds then is left
    as it is while others go on.

    Args:
        features: Pixel features (B, C, H, W), float32 or float64.
        self_similarity: Similarity (n,) in [0, 1] of a vertex to itself from its variances (C, n): what a better
            neighbour has to beat.
        cmp: Weight of the compactness, lambda in the paper.
        iota: See `information_criterion`, as `criterion`.
        criterion: 'aicc', 'aic', 'bic' or 'cic'.
        min_avg_region: Stop at so many vertices.
        max_levels: Most levels; by default ceil(log2(sqrt(H * W))).

    Returns:
        Levels, whole-image candidate and pieces. Features and variances carry gradient.
    """
    B, _, H, W = features.shape
    pixels, device = H * W, features.device
    if max_levels is None:
        max_levels = math.ceil(math.log2(math.sqrt(pixels)))
    grid = features.transpose(0, 1).contiguous()  # C B H W
    f, v = grid.flatten(1), None
    sizes = torch.ones(B * pixels, dtype=torch.long, device=device)
    boxes = pixel_boxes(B, H, W, device)
    image = torch.arange(B, device=device).repeat_interleave(pixels)
    selection = _Selection(B, pixels, device, features.dtype)
    levels: List[Level] = []
    base: Optional[torch.Tensor] = None  # edges of level 1
    edges: Optional[torch.Tensor] = None
    counts, stopped = [pixels] * B, [False] * B
    while len(levels) < max_levels:
        stopped = [stop or n <= min_avg_region for stop, n in zip(stopped, counts)]
        if all(stopped):
            break
        frozen = torch.tensor(stopped, device=device)[image] if any(stopped) else None
        if edges is None:
            choice, omega = pixel_choice(grid, cmp)
        else:
            potential = edge_potential(f, edges, cmp, sizes, boxes)
            own = (1. - cmp) * self_similarity(v) + cmp * compactness(sizes, boxes).to(f.dtype)
            choice = best_neighbours(edges, potential, own)
            omega = best_potential(edges, potential, own)
        if frozen is not None:
            choice = torch.where(frozen, torch.arange(len(choice), device=device), choice)
        parent, first = number_groups(choice_components(choice))
        n = len(first)
        new_f, new_v = contract(f, v, omega.sqrt() * sizes, parent, n)
        if frozen is not None:
            keep = frozen[first]
            new_f = torch.where(keep, f[:, first], new_f)
            new_v = torch.where(keep, v[:, first], new_v)
        f, v = new_f, new_v
        sizes = torch.zeros(n, dtype=torch.long, device=device).scatter_add_(0, parent, sizes)
        boxes = merge_boxes(boxes, parent, n)
        value = information_criterion(v, sizes, pixels, criterion, iota)
        edges = unique_edges(
            grid_edges(parent.view(B, H, W)) if edges is None else parent.index_select(0, edges.flatten()).view(2, -1))
        if base is None:
            base = edges

        region_image = image.index_select(0, selection.owner)
        gave_way = selection.update(len(levels) + 1, parent, value)
        image = image.index_select(0, first)
        levels.append(Level(parent, omega, f, v, sizes, boxes, value, image, selection.label))
        host = torch.stack([
            torch.bincount(image, minlength=B), torch.bincount(region_image[gave_way], minlength=B)]).tolist()
        counts = host[0]
        if len(levels) > 1:
            stopped = [stop or not moved for stop, moved in zip(stopped, host[1])]

    whole_f, whole_v = contract(f, v, sizes.to(f.dtype), image, B)
    whole_sizes = torch.full((B,), pixels, device=device)
    value = information_criterion(whole_v, whole_sizes, pixels, criterion, iota)
    selection.update(len(levels) + 1, image, value)
    whole = Level(
        image, sizes.to(f.dtype), whole_f, whole_v, whole_sizes, merge_boxes(boxes, image, B), value,
        torch.arange(B, device=device), selection.label)
    return Hierarchy(levels, whole, _cut_pieces(grid, levels, whole, selection, base))


def _cut_pieces(
        grid: torch.Tensor,
        levels: List[Level],
        whole: Level,
        selection: _Selection,
        base: Optional[torch.Tensor],
) -> Pieces:
    _, B, H, W = grid.shape
    if selection.on_level_1:
        atoms, edges = levels[0], base
        sizes, boxes, image = atoms.sizes, atoms.boxes, atoms.image
        segmentation, tables = atoms.parent.view(B, H, W), [*levels, whole]
        features = torch.cat([level.features for level in tables], dim=1)
    else:
        n = B * H * W
        sizes = torch.ones(n, dtype=torch.long, device=grid.device)
        boxes = pixel_boxes(B, H, W, grid.device)
        image = torch.arange(B, device=grid.device).repeat_interleave(H * W)
        segmentation, tables = torch.arange(n, device=grid.device).view(B, H, W), [*levels, whole]
        edges = grid_edges(segmentation)
        features = torch.cat([grid.flatten(1), *(level.features for level in tables)], dim=1)
    label = selection.label
    inner = label[edges[0]] == label[edges[1]]
    number, first = number_groups(connected_components(len(label), edges[:, inner]))
    n = len(first)
    skipped = 1 if selection.on_level_1 else 0
    lengths = [grid[0].numel(), *(level.features.shape[1] for level in tables)][skipped:]
    start = torch.tensor([0] * skipped + [sum(lengths[:i]) for i in range(len(lengths))], device=grid.device)
    region = label[first]
    record = start[selection.level[region]] + selection.vertex[region]
    return Pieces(
        segmentation=number.index_select(0, segmentation.flatten()).view(B, H, W),
        features=features.index_select(1, record),
        sizes=torch.zeros(n, dtype=torch.long, device=grid.device).scatter_add_(0, number, sizes),
        boxes=merge_boxes(boxes, number, n),
        image=image[first],
        edges=unique_edges(number[edges[:, ~inner]]),
    )
