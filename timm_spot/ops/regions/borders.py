"""Borders of a partition as one planar graph: arcs between junctions, each shared by the two regions beside it.

In numpy, as nothing here has a gradient. A corner is where four pixels meet; an arc runs along the sides of pixels that
part two regions, from one junction, where three or more meet, to the next, or around and back to where it began.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

OUTSIDE = -1  # the label of what is no region: around the image, and transparent pixels


class Borders(NamedTuple):
    """The arcs of a partition, A of them, made of E sides of pixels."""
    corners: np.ndarray  # (E + A, 2) x and y, of all arcs one after the other
    start: np.ndarray  # (A + 1,) where each arc's corners start
    left: np.ndarray  # (A,) label on the left hand, the smaller one
    right: np.ndarray  # (A,)
    closed: np.ndarray  # (A,) whether an arc ends where it started


def find_borders(labels: np.ndarray) -> Borders:
    """The borders between regions of (H, W) labels, and around them.

    Args:
        labels: Of each pixel, 0 or more; `OUTSIDE` for what is no region.

    Example:
        >>> borders = find_borders(np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]]))
        >>> arc, = np.flatnonzero(borders.closed)
        >>> borders.left[arc].item(), borders.right[arc].item()
        (0, 1)
        >>> borders.corners[borders.start[arc]:borders.start[arc + 1]].tolist()
        [[1, 2], [1, 1], [2, 1], [2, 2], [1, 2]]
    """
    begin, end, left, right, width = _sides(labels)
    n_corners = (labels.shape[0] + 1) * width
    degree = np.bincount(begin, minlength=n_corners) + np.bincount(end, minlength=n_corners)
    junction = degree > 2
    junction[[0, width - 1, n_corners - width, n_corners - 1]] = True  # the picture's corners stay where they are
    n = len(begin)
    leaving = np.full(n_corners, n)
    leaving[begin] = np.arange(n)
    following = np.where(junction[end], n, leaving[end])  # n: none
    going_on = np.flatnonzero(following < n)
    chain = connected_components(
        coo_array((np.ones(len(going_on), np.int8), (going_on, following[going_on])), shape=(n, n)), directed=False)[1]
    # A loop starts where it turns.
    heading = np.append(end - begin, 0)
    turns = np.zeros(n + 1, dtype=bool)
    turns[following] = heading[:-1] != heading[following]
    turns = np.flatnonzero(turns[:-1])
    open_chains = np.zeros(chain.max(initial=-1) + 1, dtype=bool)
    open_chains[chain[junction[begin]]] = True
    first = np.full(len(open_chains), n)
    np.minimum.at(first, chain[turns], turns)
    before = np.full(n + 1, n)
    before[following] = np.arange(n)
    following[before[first[~open_chains]]] = n
    order = np.lexsort((-_steps_to_end(following), chain))
    chain = chain[order]
    start = np.flatnonzero(np.diff(chain, prepend=-1))
    last = np.append(start, n)[1:] - 1
    corners = np.insert(begin[order], last + 1, end[order][last])
    return Borders(
        corners=np.stack([corners % width, corners // width], axis=1),
        start=np.append(start + np.arange(len(start)), len(corners)),
        left=left[order][start],
        right=right[order][start],
        closed=begin[order][start] == end[order][last],
    )


def _sides(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """All sides of pixels that part two labels, directed so that the larger label is on the right hand.

    Returns:
        First and second corner, left and right label, corners in a row.
    """
    padded = np.pad(labels, 1, constant_values=OUTSIDE)
    width = labels.shape[1] + 1
    west, east = padded[1:-1, :-1], padded[1:-1, 1:]
    north, south = padded[:-1, 1:-1], padded[1:, 1:-1]
    y, x = np.nonzero(west != east)
    a, b, top = west[y, x], east[y, x], y * width + x
    down = a > b
    y, x = np.nonzero(north != south)
    c, d, at = north[y, x], south[y, x], y * width + x
    back = c > d
    return (
        np.concatenate([np.where(down, top, top + width), np.where(back, at + 1, at)]),
        np.concatenate([np.where(down, top + width, top), np.where(back, at, at + 1)]),
        np.concatenate([np.minimum(a, b), np.minimum(c, d)]),
        np.concatenate([np.maximum(a, b), np.maximum(c, d)]),
        width,
    )


def _steps_to_end(following: np.ndarray) -> np.ndarray:
    """How many steps each element of chains is from the last one, by pointer doubling; len(following) ends a chain."""
    n = len(following)
    jump = np.append(following, n)
    steps = (jump < n).astype(np.int64)
    while (jump[:-1] < n).any():
        steps = steps + steps[jump]
        jump = jump[jump]
    return steps[:-1]


def trace_rings(
        shape: np.ndarray,
        arc: np.ndarray,
        forward: np.ndarray,
        ends: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Order the arcs around shapes into closed rings.

    Args:
        shape: (D,) number of the shape that an arc bounds, any number of arcs each.
        arc: (D,) number of the arc.
        forward: (D,) whether it is taken in its own direction.
        ends: (A, 2) first and last corner of each arc, as one number.

    Returns:
        Order (D,) in which arcs follow each other, shape by shape, and ring by ring; and the number of the ring of
        each in that order.
    """
    n = len(shape)
    begin = np.where(forward, ends[arc, 0], ends[arc, 1])
    end = np.where(forward, ends[arc, 1], ends[arc, 0])
    # At a corner as many arcs of a shape end as begin: any matching of the two closes its rings.
    following = np.empty(n, dtype=np.int64)
    following[np.lexsort((end, shape))] = np.lexsort((begin, shape))
    ring = connected_components(
        coo_array((np.ones(n, np.int8), (np.arange(n), following)), shape=(n, n)), directed=False)[1]
    first = np.full(ring.max(initial=-1) + 1, n)
    np.minimum.at(first, ring, np.arange(n))
    cut = following.copy()
    before = np.empty(n, dtype=np.int64)
    before[following] = np.arange(n)
    cut[before[first]] = n
    order = np.lexsort((-_steps_to_end(cut), ring, shape))
    return order, ring[order]
