"""Merge the regions whose union loses least: Ward's criterion on a graph of regions.

Paper: `Hierarchical Grouping to Optimize an Objective Function` (Ward 1963) -
https://doi.org/10.1080/01621459.1963.10500845

Two regions of m and n pixels whose mean values are d apart add m n / (m + n) * d^2 to the squared error when one mean
stands for both. Neighbours merge in rounds, the cheapest of those that choose each other: the same partition as from a
heap but for what a round takes out of turn, in a number of passes over the edges that hardly grows with them.
"""
from __future__ import annotations

from typing import NamedTuple

import torch

from .budget import Tokens, join_tokens
from .graph import (
    choice_components,
    connected_components,
    number_groups,
    sum_channels,
    sum_groups,
    unique_edges,
)

_RANK_BITS = 31  # a key packs the bits of a cost, which order as the cost does, above the rank of its edge
_SHARE = 0.5  # of the choices of a round, the cheapest may merge: what is dear waits for its turn
_SPECK = 8  # a region so many times smaller than its neighbour hardly changes it


class Merges(NamedTuple):
    """Merges of regions in the order in which they happened."""
    pairs: torch.Tensor  # (2, M), the smallest region of each of both sides
    costs: torch.Tensor  # (M,), by which the squared error grew; of specks as if each had been the only one


@torch.no_grad()
def ward_merges(
        sums: torch.Tensor,
        sizes: torch.Tensor,
        image: torch.Tensor,
        edges: torch.Tensor,
        target: int,
        noise: float = 0.,
) -> Merges:
    """Merge neighbouring regions until `target` of each image remain.

    What happens in an image does not depend on the others. Equal costs go to the edge that comes first.

    Args:
        sums: Sums of values over each region, (C, n); use float64, as sizes differ by orders of magnitude.
        sizes: (n,) pixels.
        image: (n,) index of the image, ascending.
        edges: (2, E) between neighbours, as `unique_edges` gives them.
        target: Regions to leave of each image, at least 1; one with no more is unchanged, one whose regions are not
            all connected may keep more.
        noise: Squared difference that any two regions have at least, so that in flat areas the smaller merge first.

    Returns:
        The merges; the first k of one image's, or all, are what `merged_groups` takes.

    Example:
        >>> import torch
        >>> row = torch.tensor([[0., 1., 5., 6.5]], dtype=torch.float64)
        >>> merges = ward_merges(row, torch.ones(4), torch.zeros(4).long(), torch.tensor([[0, 1, 2], [1, 2, 3]]), 1)
        >>> merges.pairs.tolist(), merges.costs.tolist()
        ([[0, 2, 0], [1, 3, 2]], [0.5, 1.125, 27.5625])
    """
    counts = torch.bincount(image)
    member = torch.arange(len(sizes), device=sizes.device)  # the smallest region of each of those that are left
    sizes = sizes.to(sums.dtype)
    pairs, costs = [member.new_empty(2, 0)], [sums.new_empty(0)]
    while edges.shape[1]:
        excess = (counts - target).clamp_min(0)
        if not bool(excess.any()):
            break
        cost = _ward_costs(sums, sizes, edges, noise)
        chosen, choice = _cheapest_choices(cost, edges, sizes, image, excess)
        u, v = edges[:, chosen]
        pairs.append(torch.stack([member[u], member[v]]))
        costs.append(cost[chosen])
        counts = counts - torch.bincount(image[u], minlength=len(counts))
        number, first = number_groups(choice_components(choice))
        edges = unique_edges(number[edges])
        sums = sum_groups(sums, number, len(first))
        sizes = sum_groups(sizes[None], number, len(first))[0]
        member, image = member[first], image[first]
    return Merges(torch.cat(pairs, dim=1), torch.cat(costs))


def _ward_costs(sums: torch.Tensor, sizes: torch.Tensor, edges: torch.Tensor, noise: float) -> torch.Tensor:
    u, v = edges
    means = sums / sizes
    difference = sum_channels((means.index_select(1, u) - means.index_select(1, v)).square())
    m, n = sizes.index_select(0, u), sizes.index_select(0, v)
    return m * n / (m + n) * (difference + noise)


def _cheapest_choices(
        cost: torch.Tensor,
        edges: torch.Tensor,
        sizes: torch.Tensor,
        image: torch.Tensor,
        excess: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges that merge in this round, by image and ascending cost, and what each region joins, itself if none.

    Candidates are the edges that are the cheapest of both their ends, or of the one that is so small that it hardly
    changes the other: a background takes in all its specks at once. Those merge that are among the cheapest `_SHARE` of
    an image's choices, and no more than its excess.
    """
    rank = torch.arange(edges.shape[1], device=edges.device)
    key = (cost.float().view(torch.int32).long() << _RANK_BITS) | rank
    best = torch.full_like(image, torch.iinfo(torch.int64).max)
    best = best.scatter_reduce_(0, edges[0], key, 'amin').scatter_reduce_(0, edges[1], key, 'amin')
    of_u, of_v = best[edges[0]] == key, best[edges[1]] == key
    m, n = sizes[edges[0]], sizes[edges[1]]
    candidate = (of_u & of_v) | (of_u & (m * _SPECK <= n)) | (of_v & (n * _SPECK <= m))
    counts = torch.bincount(image, minlength=len(excess))
    ranked = _sort_within(best, image)
    limit = best[ranked[(counts.cumsum(0) - 1 - (counts * (1. - _SHARE)).long()).clamp_min(0)]]
    chosen = (candidate & (key <= limit[image[edges[0]]])).nonzero()[:, 0]
    of = image[edges[0, chosen]]
    order = _sort_within(key[chosen], of)
    chosen, of = chosen[order], of[order]
    counts = torch.bincount(of, minlength=len(excess))
    place = torch.arange(len(of), device=of.device) - (counts.cumsum(0) - counts)[of]
    chosen = chosen[place < excess[of]]
    u, v = edges[:, chosen]
    u_joins = of_u[chosen] & ~(of_v[chosen] & (n[chosen] < m[chosen]))
    choice = torch.arange(len(image), device=image.device)
    choice[torch.where(u_joins, u, v)] = torch.where(u_joins, v, u)
    return chosen, choice


def _sort_within(values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Order of values, ascending, image by image."""
    order = values.argsort()
    return order[image[order].argsort(stable=True)]


def merged_groups(n: int, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `number_groups` gives, of n regions after merges (2, M)."""
    return number_groups(connected_components(n, pairs))


def merge_by_ward(tokens: Tokens, sums: torch.Tensor, target: int, noise: float = 0.) -> Tokens:
    """Merge tokens until exactly `target` of an image remain; one with no more keeps those.

    Args:
        tokens: N of them, with neighbours of the same image all connected.
        sums: Sums of values over each, (C, N), see `ward_merges`.
        target: Tokens to keep of each image.
        noise: See `ward_merges`.

    Returns:
        Tokens, numbered by their smallest member, which `parent` refers to; their colours carry gradient.
    """
    merges = ward_merges(sums, tokens.sizes, tokens.image, tokens.edges, target, noise)
    return join_tokens(tokens, *merged_groups(len(tokens.sizes), merges.pairs))
