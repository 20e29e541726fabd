"""In which order regions are painted, and how far each may reach below those that come after it."""
from __future__ import annotations

import heapq

import numpy as np


def stack_regions(
        sizes: np.ndarray,
        left: np.ndarray,
        right: np.ndarray,
        weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Paint large regions first, and let each cover those after it that make its outline shorter.

    Args:
        sizes: (N,) pixels of each region.
        left: (A,) region on one side of each arc; negative for the outside.
        right: (A,) region on the other side.
        weight: (A,) what drawing an arc costs, positive.

    Returns:
        Regions (N,) in the order of painting; and of all arcs that are drawn, region by region in that order, the
        region, the arc, and whether it is drawn forward, which has what is covered on the right hand. An arc is drawn
        for a region that covers just one of its sides.
    """
    order = np.lexsort((np.arange(len(sizes)), -sizes))
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[order] = np.arange(len(sizes))
    near, around = _shared_borders(len(sizes), left, right, weight)
    none = np.zeros(0, dtype=np.int64)
    owners, arcs, forward = [none], [none], [none > 0]
    touching = _sides_of(len(sizes), left, right)
    below = np.zeros(len(sizes), dtype=bool)  # whether what is painted before covers it
    for region in order.tolist():
        # The first of what hangs together covers all of it, so that no gap shows the ground.
        covered = _cover(region, rank, near, around, 0.5 if below[region] else 0.)
        below[covered] = True
        sides = np.concatenate([touching[r] for r in covered])
        arc, first, count = np.unique(sides % len(left), return_index=True, return_counts=True)
        arc, side = arc[count == 1], sides[first][count == 1]  # an arc with both sides covered comes twice
        owners.append(np.full(len(arc), region))
        arcs.append(arc)
        forward.append(side >= len(left))
    return order, np.concatenate(owners), np.concatenate(arcs), np.concatenate(forward)


def _shared_borders(
        n: int,
        left: np.ndarray,
        right: np.ndarray,
        weight: np.ndarray,
) -> tuple[list[dict[int, float]], list[float]]:
    """Of each region the weight of its border to each other one, and of its whole border."""
    near: list[dict[int, float]] = [{} for _ in range(n)]
    around = [0.] * n
    for a, b, w in zip(left.tolist(), right.tolist(), weight.tolist()):
        for one, other in ((a, b), (b, a)):
            if one >= 0:
                around[one] += w
                near[one][other] = near[one].get(other, 0.) + w
    return near, around


def _sides_of(n: int, left: np.ndarray, right: np.ndarray) -> list[np.ndarray]:
    """Of each region the sides of arcs that are its own: a for the left side of arc a, A + a for the right."""
    sides = np.concatenate([left, right])
    order = np.argsort(sides, kind='stable')
    bounds = np.searchsorted(sides[order], np.arange(n + 1))
    return np.split(order, bounds)[1:-1]


def _cover(
        region: int,
        rank: np.ndarray,
        near: list[dict[int, float]],
        around: list[float],
        least: float,
) -> list[int]:
    """A region and those after it, best first, that more than a share of their border joins to it and each other."""
    covered = {region}
    joined: dict[int, float] = {}
    queue: list[tuple[float, int]] = []

    def reach(one: int) -> None:
        for other, w in near[one].items():
            if other >= 0 and other not in covered and rank[other] > rank[region]:
                joined[other] = joined.get(other, 0.) + w
                heapq.heappush(queue, (-joined[other] / around[other], other))

    reach(region)
    while queue:
        share, other = heapq.heappop(queue)
        if share >= -least:
            break
        if other not in covered:
            covered.add(other)
            reach(other)
    return list(covered)
