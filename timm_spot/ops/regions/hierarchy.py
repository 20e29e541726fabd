"""A hierarchy of regions, level by level, and for each region the level that an information criterion likes best.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

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
    sum_groups,
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


class _Vertices(NamedTuple):
    """The vertices of a level, or the pixels that the first one joins; of all images together."""
    features: torch.Tensor  # (C, n)
    variances: torch.Tensor | None  # (C, n); None for pixels, which have none
    sizes: torch.Tensor  # (n,)
    boxes: torch.Tensor  # (4, n)
    image: torch.Tensor  # (n,)


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

    def update(
            self,
            level: int,
            parent: torch.Tensor,
            criterion: torch.Tensor,
            image: torch.Tensor,
    ) -> torch.Tensor:
        """Let regions that are no better give way to the vertex they lie in.

        Args:
            level: Number of the level, from 1.
            parent: Its vertex that each vertex of the one below became part of.
            criterion: Of its vertices.
            image: Of the vertices of the level below.

        Returns:
            The image of each region that gave way.
        """
        moved_in = image.index_select(0, self.owner)
        owner = parent.index_select(0, self.owner)
        give_way = self.criterion <= criterion.index_select(0, owner)
        moved_in = moved_in[give_way]
        if level == 1 and bool(give_way.all()):
            n = len(criterion)
            self.owner = self.vertex = self.label = torch.arange(n, device=owner.device)
            self.criterion, self.level = criterion, torch.ones_like(self.owner)
            self.on_level_1 = True
            return moved_in
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
        return moved_in


class _Running:
    """Which images still merge: each stops at `min_avg_region` vertices, or when none of its regions gives way."""

    def __init__(self, batch_size: int, pixels: int, min_avg_region: int) -> None:
        self.batch_size = batch_size
        self.min_avg_region = min_avg_region
        self.stopped = [pixels <= min_avg_region] * batch_size

    def frozen(self, image: torch.Tensor) -> torch.Tensor | None:
        """Mask (n,) of the vertices that stay as they are; None where all go on."""
        return torch.tensor(self.stopped, device=image.device)[image] if any(self.stopped) else None

    def update(self, image: torch.Tensor, moved_in: torch.Tensor, is_first: bool) -> None:
        """Look at the vertices (n,) of a new level and at the regions that gave way to it, by their image."""
        counts, moved = torch.stack([
            torch.bincount(index, minlength=self.batch_size) for index in (image, moved_in)]).tolist()
        self.stopped = [
            stop or n <= self.min_avg_region or not (is_first or any_moved)
            for stop, n, any_moved in zip(self.stopped, counts, moved)]


class Hierarchy(NamedTuple):
    """All levels of a batch and its pieces.

    `whole` is the candidate that takes each image for one region.
    """
    levels: list[Level]
    whole: Level
    pieces: Pieces

    def segmentations(self, shape: tuple[int, int, int]) -> list[torch.Tensor]:
        """The partition (B, H, W) of each level from the first on, ids running across the batch."""
        out: list[torch.Tensor] = []
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
        max_levels: int | None = None,
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
        min_avg_region: Stop at so many vertices. An image of no more pixels has no levels: it is one region, or its
            pixels.
        max_levels: Most levels; by default ceil(log2(sqrt(H * W))).

    Returns:
        Levels, whole-image candidate and pieces. Features and variances carry gradient.
    """
    B, _, H, W = features.shape
    if max_levels is None:
        max_levels = math.ceil(math.log2(math.sqrt(H * W)))
    grid = features.transpose(0, 1).contiguous()  # C B H W
    vertices = _pixel_vertices(grid)
    selection = _Selection(B, H * W, features.device, features.dtype)
    select_from = partial(
        _select_from, selection, partial(information_criterion, image_pixels=H * W, criterion=criterion, iota=iota))
    running = _Running(B, H * W, min_avg_region)
    levels: list[Level] = []
    edges = base = torch.empty(2, 0, dtype=torch.long, device=features.device)
    while len(levels) < max_levels and not all(running.stopped):
        if not levels:
            choice, omega = pixel_choice(grid, cmp)
        else:
            choice, omega = _vertex_choice(vertices, edges, self_similarity, cmp)
        parent, merged = _merge(vertices, choice, omega, running.frozen(vertices.image))
        edges = unique_edges(
            parent.index_select(0, edges.flatten()).view(2, -1) if levels else grid_edges(parent.view(B, H, W)))
        base = base if levels else edges
        level, moved_in = select_from(len(levels) + 1, merged, parent, omega, vertices)
        running.update(merged.image, moved_in, is_first=not levels)
        levels.append(level)
        vertices = merged

    whole, _ = select_from(
        len(levels) + 1, _whole_images(vertices, B, H * W), vertices.image, vertices.sizes.to(features.dtype), vertices)
    return Hierarchy(levels, whole, _cut_pieces(grid, [*levels, whole], selection, base))


def _pixel_vertices(grid: torch.Tensor) -> _Vertices:
    """The pixels of (C, B, H, W)."""
    _, B, H, W = grid.shape
    return _Vertices(
        features=grid.flatten(1),
        variances=None,
        sizes=torch.ones(B * H * W, dtype=torch.long, device=grid.device),
        boxes=pixel_boxes(B, H, W, grid.device),
        image=torch.arange(B, device=grid.device).repeat_interleave(H * W),
    )


def _vertex_choice(
        vertices: _Vertices,
        edges: torch.Tensor,
        self_similarity: Callable[[torch.Tensor], torch.Tensor],
        cmp: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `pixel_choice` gives for pixels: choice (n,) and omega (n,), where a vertex may prefer itself."""
    sizes, boxes = vertices.sizes, vertices.boxes
    assert vertices.variances is not None  # pixels choose by `pixel_choice`
    potential = edge_potential(vertices.features, edges, cmp, sizes, boxes)
    own = (1. - cmp) * self_similarity(vertices.variances) + cmp * compactness(sizes, boxes).to(potential.dtype)
    return best_neighbours(edges, potential, own), best_potential(edges, potential, own)


def _merge(
        vertices: _Vertices,
        choice: torch.Tensor,
        omega: torch.Tensor,
        frozen: torch.Tensor | None,
) -> tuple[torch.Tensor, _Vertices]:
    """Join each vertex to its choice: the number (n,) of what each became part of, and the new vertices."""
    if frozen is not None:
        choice = torch.where(frozen, torch.arange(len(choice), device=choice.device), choice)
    parent, first = number_groups(choice_components(choice))
    n = len(first)
    features, variances = contract(
        vertices.features, vertices.variances, omega.sqrt() * vertices.sizes, parent, n)
    if frozen is not None:
        assert vertices.variances is not None  # pixels are never frozen
        keep = frozen[first]
        features = torch.where(keep, vertices.features[:, first], features)
        variances = torch.where(keep, vertices.variances[:, first], variances)
    return parent, _Vertices(
        features=features,
        variances=variances,
        sizes=sum_groups(vertices.sizes[None], parent, n)[0],
        boxes=merge_boxes(vertices.boxes, parent, n),
        image=vertices.image.index_select(0, first),
    )


def _select_from(
        selection: _Selection,
        judge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        number: int,
        vertices: _Vertices,
        parent: torch.Tensor,
        weight: torch.Tensor,
        below: _Vertices,
) -> tuple[Level, torch.Tensor]:
    """Let the best regions give way to new vertices: the level that these are, and the image of each that gave way."""
    assert vertices.variances is not None  # vertices that are made have some
    value = judge(vertices.variances, vertices.sizes)
    moved_in = selection.update(number, parent, value, below.image)
    return Level(
        parent=parent, weight=weight, criterion=value, best=selection.label, **vertices._asdict()), moved_in


def _whole_images(vertices: _Vertices, batch_size: int, pixels: int) -> _Vertices:
    """Each image as one vertex."""
    sizes, image = vertices.sizes, vertices.image
    features, variances = contract(
        vertices.features, vertices.variances, sizes.to(vertices.features.dtype), image, batch_size)
    return _Vertices(
        features=features,
        variances=variances,
        sizes=torch.full((batch_size,), pixels, device=sizes.device),
        boxes=merge_boxes(vertices.boxes, image, batch_size),
        image=torch.arange(batch_size, device=sizes.device),
    )


def _cut_pieces(
        grid: torch.Tensor,
        levels: Sequence[Level],
        selection: _Selection,
        base: torch.Tensor,
) -> Pieces:
    """Cut the selected regions into connected pieces.

    Args:
        grid: Pixel features (C, B, H, W).
        levels: All levels, the whole images last; where there is no other they are level 1.
        selection: The best regions, of pixels or of vertices of level 1.
        base: Edges (2, E) of level 1.
    """
    _, B, H, W = grid.shape
    features = [level.features for level in levels]
    atoms: Level | _Vertices
    if selection.on_level_1:
        atoms, edges = levels[0], base
        segmentation = atoms.parent.view(B, H, W)
        skipped = [0]  # pixels are not among the features: nothing refers to them
    else:
        atoms = _pixel_vertices(grid)
        segmentation = torch.arange(B * H * W, device=grid.device).view(B, H, W)
        edges = grid_edges(segmentation)
        features.insert(0, atoms.features)
        skipped = []
    start = torch.tensor([*skipped, *accumulate((f.shape[1] for f in features[:-1]), initial=0)], device=grid.device)
    label = selection.label
    inner = label[edges[0]] == label[edges[1]]
    number, first = number_groups(connected_components(len(label), edges[:, inner]))
    n, region = len(first), label[first]
    record = start[selection.level[region]] + selection.vertex[region]
    return Pieces(
        segmentation=number.index_select(0, segmentation.flatten()).view(B, H, W),
        features=torch.cat(features, dim=1).index_select(1, record),
        sizes=sum_groups(atoms.sizes[None], number, n)[0],
        boxes=merge_boxes(atoms.boxes, number, n),
        image=atoms.image[first],
        edges=unique_edges(number[edges[:, ~inner]]),
    )
