"""Outlines of regions: traced on pixel corners, simplified, rounded, and turned into cubic curves.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652

In numpy, as nothing here has a gradient. A set of outlines is (ids, points): the region of every point, ascending, and
its (y, x), in the order of the path.
"""
from __future__ import annotations

import numpy as np

Outlines = tuple[np.ndarray, np.ndarray]

# Headings up, right, down, left: the step, the corner of its pixel (on the right hand) where it starts.
_AHEAD = np.array([[-1, 0], [0, 1], [1, 0], [0, -1]])
_CORNER = np.array([[1, 0], [0, 0], [0, 1], [1, 1]])


def trace_outlines(segmentation: np.ndarray) -> Outlines:
    """Outer boundary of every region, clockwise, on the grid of pixel corners.

    Each side of a pixel that faces another region is an edge with one successor, so all boundaries are linked lists;
    pointer doubling ranks the edges of all of them at once. A region that touches itself diagonally is one outline.
    Holes have none: what lies in a hole is a region of its own that starts later in raster order.

    Args:
        segmentation: (H, W), each region 4-connected.

    Returns:
        Ids and corners (P, 2), starting at the lower left corner of a region's bottom-most, then left-most pixel.
    """
    H, W = segmentation.shape
    ids = np.full((H + 2, W + 2), -1, dtype=np.int64)
    ids[1:-1, 1:-1] = segmentation
    width, flat = W + 2, ids.ravel()
    ahead = _AHEAD @ [width, 1]
    inside = np.flatnonzero(flat >= 0)
    # The edge with heading h on the left side of its pixel p has number h * len(flat) + p.
    pixels = [inside[flat[inside] != flat[inside + ahead[(h + 3) % 4]]] for h in range(4)]
    edges = np.concatenate([h * len(flat) + p for h, p in enumerate(pixels)])
    number = np.full(4 * len(flat), -1, dtype=np.int64)
    number[edges] = np.arange(len(edges))
    following = []
    for h, p in enumerate(pixels):
        front_right = p + ahead[h]
        front_left = front_right + ahead[(h + 3) % 4]
        turn_left, turn_right = flat[front_left] == flat[p], flat[front_right] != flat[p]
        heading = np.where(turn_left, (h + 3) % 4, np.where(turn_right, (h + 1) % 4, h))
        pixel = np.where(turn_left, front_left, np.where(turn_right, p, front_right))
        following.append(number[heading * len(flat) + pixel])
    jump = np.concatenate(following)

    # A region's first edge goes up beside the left-most pixel of its bottom row.
    up = pixels[0]
    order = np.lexsort((up % width, -(up // width), flat[up]))
    first = np.unique(flat[up][order], return_index=True)[1]
    start = number[up[order][first]]
    jump[start] = start
    steps = np.ones(len(edges), dtype=np.int64)  # to the start, along the path
    steps[start] = 0
    for _ in range(max(1, len(edges)).bit_length()):
        steps = steps + steps[jump]
        jump = jump[jump]
    is_start = np.zeros(len(edges), dtype=bool)
    is_start[start] = True
    outer = np.flatnonzero(is_start[jump])
    heading, pixel = np.divmod(edges[outer], len(flat))
    path = flat[pixel]
    # The start comes first, then the edge that is furthest from coming back to it.
    position = np.where(steps[outer] == 0, -np.inf, -steps[outer])
    order = np.lexsort((position, path))
    corner = np.stack(np.divmod(pixel, width), axis=1) - 1 + _CORNER[heading]
    return path[order], corner[order].astype(np.float64)


def _neighbours(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the point before and after each, cyclic within its region."""
    index = np.arange(len(ids))
    first = np.flatnonzero(np.diff(ids, prepend=-1))
    last = np.append(first[1:], len(ids)) - 1 if len(ids) else first
    before, after = index - 1, index + 1
    before[first], after[last] = last, first
    return before, after


def simplify(outlines: Outlines, threshold: float) -> Outlines:
    """Keep the points whose triangle with both neighbours has more than half of `threshold` as its area.

    All are judged at once; a region may vanish.
    """
    ids, points = outlines
    before, after = _neighbours(ids)
    a, b, c = points[before], points, points[after]
    doubled = np.abs((b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0]))
    keep = doubled > threshold
    return ids[keep], points[keep]


def round_corners(outlines: Outlines) -> Outlines:
    """Replace each edge by its points at a quarter and at three quarters."""
    ids, points = outlines
    after = points[_neighbours(ids)[1]]
    rounded = np.stack([0.75 * points + 0.25 * after, 0.25 * points + 0.75 * after], axis=1)
    return np.repeat(ids, 2), rounded.reshape(-1, 2)


def split_edges(outlines: Outlines, longest: float) -> Outlines:
    """Split edges into equal pieces no longer than `longest`: rounding then cuts no more than a quarter of it."""
    ids, points = outlines
    step = points[_neighbours(ids)[1]] - points
    pieces = np.maximum(np.ceil(np.linalg.norm(step, axis=1) / longest), 1).astype(np.int64)
    rank = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
    share = rank / np.repeat(pieces, pieces)
    return np.repeat(ids, pieces), np.repeat(points, pieces, axis=0) + share[:, None] * np.repeat(step, pieces, axis=0)


def fit_cubics(outlines: Outlines, stride: int = 4, alpha: float = 0.33) -> tuple[np.ndarray, np.ndarray]:
    """Cubic curves through every `stride`-th point, tangent to the outline there.

    Returns:
        Ids (K,) and control points (K, 4, 2), float32, as (x, y); the last curve of a region ends at its first point.
    """
    ids, points = outlines
    before, after = _neighbours(ids)
    first = np.flatnonzero(np.diff(ids, prepend=-1))
    length = np.diff(np.append(first, len(ids)))
    rank = np.arange(len(ids)) - np.repeat(first, length)
    start = np.flatnonzero(rank % stride == 0)
    base, total = np.repeat(first, length)[start], np.repeat(length, length)[start]
    end = base + np.minimum(rank[start] + stride, total) % total
    xy = points[:, ::-1].astype(np.float32)  # as the authors round
    tangent = xy[after] - xy[before]
    tangent = tangent / np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-6)
    p0, p3 = xy[start], xy[end]
    reach = alpha * np.linalg.norm(p3 - p0, axis=1, keepdims=True)
    return ids[start], np.stack([p0, p0 + reach * tangent[start], p3 - reach * tangent[end], p3], axis=1)
