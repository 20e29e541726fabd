"""Merge the pieces of an image until a budget of tokens is kept.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652
"""
from __future__ import annotations

from typing import NamedTuple

import torch

from .graph import (
    best_neighbours,
    choice_components,
    edge_potential,
    merge_boxes,
    number_groups,
    sum_groups,
    unique_edges,
)


class Tokens(NamedTuple):
    """Merged pieces, N of all images together."""
    parent: torch.Tensor  # token of each piece
    colors: torch.Tensor  # (3, N), mean of the pieces' colours by their size
    sizes: torch.Tensor  # (N,)
    boxes: torch.Tensor  # (4, N)
    image: torch.Tensor  # (N,)
    edges: torch.Tensor  # (2, E) between neighbours


def merge_to_budget(
        colors: torch.Tensor,
        sizes: torch.Tensor,
        boxes: torch.Tensor,
        image: torch.Tensor,
        edges: torch.Tensor,
        target: int,
        strict: bool = False,
        boost: float = 1.,
        random: bool = False,
        generator: torch.Generator | None = None,
) -> Tokens:
    """Merge pieces with the neighbours of most similar colour until about `target` tokens of an image remain.

    Per image `target` keepers stay apart, each other piece joins its best neighbour. Without `strict` a few more than
    `target` tokens usually remain, pairs of pieces that chose each other; the excess at least halves in each step.

    Args:
        colors: (3, N).
        sizes: (N,) pixels.
        boxes: (4, N).
        image: (N,) index of the image, ascending.
        edges: (2, E) between neighbours.
        target: Tokens to keep of each image; one with no more is unchanged.
        strict: Repeat until exactly `target` are left.
        boost: Factor for the potential of an edge from a keeper to another piece.
        random: Draw the keepers with probability proportional to 1 / sqrt(size), instead of keeping the smallest.
        generator: For the random keepers; torch's global one by default.

    Returns:
        Tokens, numbered by their smallest piece.
    """
    n = len(sizes)
    tokens = Tokens(torch.arange(n, device=sizes.device), colors, sizes, boxes, image, edges)
    while True:
        counts = torch.bincount(tokens.image)
        if int(counts.max()) <= target:
            return tokens
        merged = _merge_once(tokens, counts, target, boost, random, generator)
        tokens = merged._replace(parent=merged.parent[tokens.parent])
        if not strict:
            return tokens


def _merge_once(
        tokens: Tokens,
        counts: torch.Tensor,
        target: int,
        boost: float,
        random: bool,
        generator: torch.Generator | None,
) -> Tokens:
    n = len(tokens.sizes)
    ids = torch.arange(n, device=tokens.sizes.device)
    keeper = _choose_keepers(tokens, counts, target, random, generator)
    potential = edge_potential(tokens.colors.detach(), tokens.edges)
    if boost != 1.:
        one_keeper = keeper[tokens.edges[0]] != keeper[tokens.edges[1]]
        potential = torch.where(one_keeper, (potential * boost).clamp(0., 1.), potential)
    choice = best_neighbours(tokens.edges, potential, potential.new_full((n,), -1.))
    parent, first = number_groups(choice_components(torch.where(keeper, ids, choice)))
    return join_tokens(tokens, parent, first)


def join_tokens(tokens: Tokens, parent: torch.Tensor, first: torch.Tensor) -> Tokens:
    """Tokens made of others.

    Args:
        tokens: N of them.
        parent: (N,) number 0..M - 1 of what each becomes part of.
        first: (M,) the smallest member of each.

    Returns:
        M tokens whose `parent` is the one given.
    """
    m = len(first)
    sizes = torch.zeros(m, dtype=torch.long, device=parent.device).scatter_add_(0, parent, tokens.sizes)
    colors = sum_groups(tokens.colors * tokens.sizes, parent, m) / sizes
    # A token of one piece keeps its colour to the last bit, so that an image that had few enough is left as it was.
    single = torch.bincount(parent, minlength=m) == 1
    return Tokens(
        parent=parent,
        colors=torch.where(single, tokens.colors[:, first], colors),
        sizes=sizes,
        boxes=merge_boxes(tokens.boxes, parent, m),
        image=tokens.image[first],
        edges=unique_edges(parent[tokens.edges]),
    )


def _choose_keepers(
        tokens: Tokens,
        counts: torch.Tensor,
        target: int,
        random: bool,
        generator: torch.Generator | None,
) -> torch.Tensor:
    """Mask (n,): `target` of each image, all where it has no more."""
    rank = tokens.sizes
    if random:
        device = rank.device if generator is None else generator.device
        noise = torch.rand(len(rank), generator=generator, device=device).to(rank.device).clamp_min(1e-20)
        rank = 0.5 * rank.log() + (-noise.log()).log()  # the largest -ln(size) / 2 + Gumbel noise, negated
    order = rank.argsort(stable=True)
    order = order[tokens.image[order].argsort(stable=True)]
    place = torch.arange(len(rank), device=rank.device) - (counts.cumsum(0) - counts)[tokens.image[order]]
    return torch.zeros_like(order, dtype=torch.bool).index_fill_(0, order[place < target], True)
