"""Regions of a picture to SVG: each border simplified once, for both sides, and regions painted large ones first."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...ops.regions.borders import OUTSIDE, Borders, find_borders, trace_rings
from ...ops.regions.layers import stack_regions
from ...ops.regions.mixing import subpixel_lines
from ...ops.regions.simplify import select_lines, simplify_lines
from .text import hex_colors, ring_paths, svg_document

_OUTWARDS = 2 / 3  # of what a curve cuts off a corner, how far the corner moves
_EXACT = 1e-3  # a tolerance that only leaves out what is straight


class Drawing(NamedTuple):
    """Shapes in the order of painting, as closed rings of whole numbers."""
    owner: np.ndarray  # (P,) place of each point's shape in the order
    ring: np.ndarray  # (P,)
    points: np.ndarray  # (P, 2) x and y, in units of 1 / scale pixels
    control: np.ndarray  # (P,) which points draw curves towards them, see `ring_paths`
    regions: np.ndarray  # (N,) region of each shape
    scale: int


def draw_labels(
        labels: np.ndarray,
        tolerance: float,
        scale: int = 1,
        pixels: np.ndarray | None = None,
        curved: bool = False,
) -> Drawing:
    """Shapes of all regions of (H, W) labels 0..N - 1 and `OUTSIDE`.

    Args:
        labels: Of each pixel; every number has some.
        tolerance: How far a border may move, in pixels.
        scale: Units of the coordinates for each pixel.
        pixels: (H, W, 3), for borders that run within pixels, where colours mix; by default they run between them.
        curved: Round those corners of borders that move no further than the tolerance by it; with an even `scale`.
    """
    borders = find_borders(labels)
    sizes = np.bincount(labels[labels != OUTSIDE])
    lines = (borders.corners.astype(float), borders.start) if pixels is None else subpixel_lines(
        borders, pixels, mean_colors(pixels, labels))
    points, start = _simple_borders(borders, lines, sizes, tolerance, scale)
    control = np.zeros(len(points), dtype=bool)
    if curved:
        points, control = _round_corners(points, start, tolerance * scale)
    points = points.clip(0, np.array(labels.shape[::-1]) * scale)
    order, owner, arc, forward = stack_regions(sizes, borders.left, borders.right, np.diff(start).astype(float))
    place = np.empty(len(sizes), dtype=np.int64)
    place[order] = np.arange(len(sizes))
    first, last = borders.corners[borders.start[:-1]], borders.corners[borders.start[1:] - 1]
    width = labels.shape[1] + 1
    ends = np.stack([first[:, 1] * width + first[:, 0], last[:, 1] * width + last[:, 0]], axis=1)
    traced, ring = trace_rings(place[owner], arc, forward, ends)
    owner, arc, forward = owner[traced], arc[traced], forward[traced]
    rows, line_start = select_lines(np.column_stack([points, control]), start, arc, forward)
    length = np.diff(line_start)
    inner = np.ones(len(rows), dtype=bool)
    inner[line_start[1:] - 1] = False  # where the next line starts
    return Drawing(
        np.repeat(place[owner], length)[inner], np.repeat(ring, length)[inner], rows[inner, :2],
        rows[inner, 2].astype(bool), order, scale)


def _simple_borders(
        borders: Borders,
        lines: tuple[np.ndarray, np.ndarray],
        sizes: np.ndarray,
        tolerance: float,
        scale: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Lines along borders in whole units, simplified.

    Regions that would lose most of their area keep the borders between pixels, and so each has some.
    """
    points, start = simplify_lines(*lines, borders.closed, tolerance)
    points = np.rint(points * scale).astype(np.int64)
    for _ in range(3):
        small = 4 * _areas(points, start, borders, len(sizes)) < sizes * scale ** 2
        restore = (small[borders.left] & (borders.left != OUTSIDE)) | small[borders.right]
        if not restore.any():
            break
        exact, exact_start = simplify_lines(
            *select_lines(borders.corners.astype(float), borders.start, np.flatnonzero(restore)),
            borders.closed[restore], _EXACT)
        both = np.concatenate([points, np.rint(exact * scale).astype(np.int64)])
        which = np.arange(len(start) - 1)
        which[restore] = len(start) - 1 + np.arange(restore.sum())
        points, start = select_lines(both, np.concatenate([start, start[-1] + exact_start[1:]]), which)
    return points, start


def _round_corners(points: np.ndarray, start: np.ndarray, most: float) -> tuple[np.ndarray, np.ndarray]:
    """Points, and which of them control a curve that cuts their corner by at most so much, from halfway to halfway.

    The pieces beside them cut through the curve that they stand for, so these corners move outwards a little; and to
    even coordinates, as halfway between two of them there is a point of the curve.
    """
    inner = np.ones(len(points), dtype=bool)
    inner[start[:-1]] = inner[start[1:] - 1] = False
    at = np.flatnonzero(inner)
    one, two = points[at] - points[at - 1], points[at + 1] - points[at]
    cut = (one - two) / 8
    rounds = (np.sqrt((cut ** 2).sum(1)) <= most) & ((one * two).sum(1) > 0)
    inner[at] = rounds
    out = points.copy()
    out[inner] = 2 * np.rint((points[at] + _OUTWARDS * cut)[rounds] / 2).astype(np.int64)
    return out, inner


def _areas(points: np.ndarray, start: np.ndarray, borders: Borders, n: int) -> np.ndarray:
    """Area of each region within its borders, in square units."""
    cross = points[:-1, 0] * points[1:, 1] - points[:-1, 1] * points[1:, 0]
    cross = np.append(cross, 0)
    cross[start[1:] - 1] = 0  # from one line to the next
    doubled = np.add.reduceat(cross, start[:-1])
    right = np.bincount(borders.right, doubled, n)
    mine = borders.left != OUTSIDE
    return (right - np.bincount(borders.left[mine], doubled[mine], n)) / 2


def mean_colors(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean colours (N, 3) of the regions of (H, W, 3) pixels."""
    drawn = labels != OUTSIDE
    region = labels[drawn]
    sums = [np.bincount(region, channel) for channel in pixels[drawn].T.astype(float)]
    return np.stack(sums, axis=1) / np.bincount(region)[:, None]


def to_svg(drawing: Drawing, colors: np.ndarray, size: tuple[int, int], title: str) -> str:
    """The file of a drawing, its regions in (N, 3) colours, `size` (width, height) pixels large."""
    paths = ring_paths(drawing.owner, drawing.ring, drawing.points, drawing.control)
    return svg_document(paths, hex_colors(colors[drawing.regions]), size, drawing.scale, title)
