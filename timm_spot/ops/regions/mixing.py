"""Where within pixels a border runs: as far as the pixels beside it mix the colours of both its sides."""
from __future__ import annotations

import numpy as np

from .borders import OUTSIDE, Borders

_STRAIGHT = 3  # sides in a row on both hands of a corner that is none of a staircase


def subpixel_lines(borders: Borders, pixels: np.ndarray, colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middles of the sides that make up borders, moved across them to where anti-aliased colours say.

    A pixel whose colour lies a quarter of the way to that of the region on the other side is covered by it to a
    quarter.

    Args:
        borders: Of a partition of the picture.
        pixels: (H, W, 3).
        colors: (N, 3) of the regions.

    Returns:
        Points and starts of the lines, as in `simplify`: an arc's first corner, the middles of its sides and between
        them the right angles of straight edges, its last corner.
    """
    corners, start = borders.corners.astype(float), borders.start
    n_sides = np.diff(start) - 1
    arc = np.repeat(np.arange(len(n_sides)), n_sides)
    first = np.arange(len(arc)) + arc  # corner where each side starts
    begin = np.cumsum(n_sides) - n_sides  # side with which each arc starts
    ends = np.stack([corners[start[:-1]], corners[start[1:] - 1]], axis=1)
    loops = _are_loops(ends)
    step = corners[first + 1] - corners[first]
    middle = corners[first] + step / 2
    across = np.stack([-step[:, 1], step[:, 0]], axis=1)  # to the right hand
    shift = _mixture(middle, across, borders, arc, pixels, colors)[:, None] * across
    to_end = (borders.left == OUTSIDE) & ~loops
    bends = _right_angles(step, np.arange(len(arc)) - begin[arc], n_sides[arc], to_end[arc])
    points = np.insert(middle + shift, bends, corners[first[bends]] + shift[bends - 1] + shift[bends], axis=0)
    n_points = n_sides + np.bincount(arc[bends], minlength=len(n_sides))
    inner = np.concatenate([[0], np.cumsum(n_points)])
    # The end of a loop without a junction moves as the sides beside it do.
    ends[loops] += (shift[begin[loops]] + shift[begin[loops] + n_sides[loops] - 1])[:, None]
    points = np.insert(points, inner[:-1], ends[:, 0], axis=0)
    points = np.insert(points, inner[1:] + np.arange(1, len(start)), ends[:, 1], axis=0)
    return points, inner + 2 * np.arange(len(start))


def _are_loops(ends: np.ndarray) -> np.ndarray:
    """Mask (A,) of the arcs, of first and last corners (A, 2, 2), that end where they started and no other arc does."""
    _, number, count = np.unique(ends.reshape(-1, 2), axis=0, return_inverse=True, return_counts=True)
    number = number.reshape(-1, 2)
    loops: np.ndarray = (number[:, 0] == number[:, 1]) & (count[number[:, 0]] == 2)
    return loops


def _right_angles(step: np.ndarray, place: np.ndarray, n_sides: np.ndarray, to_end: np.ndarray) -> np.ndarray:
    """Sides before which a border turns, having run straight for `_STRAIGHT` sides, to run straight for as many.

    Args:
        step: (S, 2), along each side.
        place: (S,), of each side in its arc.
        n_sides: (S,), of its arc.
        to_end: (S,), whether fewer sides do where the arc ends with them: what is left out there is no other region's,
            and a corner that a junction is near to would show a hole.
    """
    goes_on = (place > 0) & (step == np.roll(step, 1, axis=0)).all(1)
    bend = (place > 0) & ~goes_on
    for k in range(1, _STRAIGHT):
        begins, ends = to_end & (place <= k), to_end & (place + k >= n_sides)
        bend &= (np.roll(goes_on, k) | begins) & (np.roll(goes_on, -k) | ends)
    return np.flatnonzero(bend)


def _mixture(
        middle: np.ndarray,
        across: np.ndarray,
        borders: Borders,
        arc: np.ndarray,
        pixels: np.ndarray,
        colors: np.ndarray,
) -> np.ndarray:
    """How far each side moves to its right, -1 to 1 pixel; not at all where one side is no region."""
    left, right = borders.left[arc], borders.right[arc]
    inside = left != OUTSIDE
    shift = np.zeros(len(arc))
    middle, across, left, right = middle[inside], across[inside], left[inside], right[inside]
    toward = (colors[left] - colors[right]).astype(float)
    length = np.maximum((toward ** 2).sum(1), 1e-9)
    shares = []
    for sign, own in ((1, right), (-1, left)):
        x, y = (middle + sign * across / 2).astype(np.int64).T
        # How much of the other side's colour there is in the pixel.
        share = sign * ((pixels[y, x] - colors[own]) * toward).sum(1) / length
        shares.append(share.clip(0., 1.))
    shift[inside] = shares[0] - shares[1]
    return shift
