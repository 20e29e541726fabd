"""Polylines with fewer points: the longest straight pieces within a tolerance, their ends where lines of best fit meet.

After `Potrace: a polygon-based tracing algorithm` (Selinger 2003) - https://potrace.sourceforge.net/potrace.pdf

A set of lines is (points, start): all points (P, 2) one line after the other, and where each starts, (A + 1,).
"""
from __future__ import annotations

import numpy as np

_REACH = 1.  # how far a corner may be, in pixels, from the points of both its sides


def select_lines(
        points: np.ndarray,
        start: np.ndarray,
        which: np.ndarray,
        forward: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The lines of numbers `which`, as often as they are named; turned around where `forward` is False.

    Example:
        >>> points, start = select_lines(np.array([[0, 0], [1, 0], [5, 5]]), np.array([0, 2, 3]), np.array([1, 0]))
        >>> points.tolist(), start.tolist()
        ([[5, 5], [0, 0], [1, 0]], [0, 1, 3])
    """
    length = np.diff(start)[which]
    new_start = np.concatenate([[0], np.cumsum(length)])
    place = np.arange(new_start[-1]) - np.repeat(new_start[:-1], length)
    if forward is not None:
        place = np.where(np.repeat(forward, length), place, np.repeat(length, length) - 1 - place)
    return points[np.repeat(start[which], length) + place], new_start


def straight_reach(points: np.ndarray, start: np.ndarray, tolerance: float, longest: np.ndarray) -> np.ndarray:
    """The furthest point to which a straight piece may go from each.

    All points between lie within `tolerance` of the ray from the first to the last, and the line does not turn back
    by more than that.

    Args:
        points: (P, 2).
        start: (A + 1,).
        tolerance: Distance, positive.
        longest: (A,) most points that one piece may pass over, of each line.

    Returns:
        (P,) index of a point of the same line, at least the next one; of the last point itself.
    """
    line = np.repeat(np.arange(len(start) - 1), np.diff(start))
    last = start[1:][line] - 1
    at = np.arange(len(points))
    reach: np.ndarray = np.minimum(at + 1, last)
    most = np.minimum(last, at + longest[line])
    active = at[at < most]
    x, y = points[:, 0], points[:, 1]
    ahead = np.zeros_like(points)  # the first direction that is one, from which angles count
    low, high = np.full(len(points), -np.pi / 2), np.full(len(points), np.pi / 2)
    furthest = np.zeros(len(points))
    j = 0
    while len(active):
        j += 1
        active = active[active + j <= most[active]]
        dx, dy = x[active + j] - x[active], y[active + j] - y[active]
        distance = np.sqrt(dx * dx + dy * dy)
        near = distance <= tolerance
        new = ~near & (furthest[active] <= tolerance)
        ahead[active[new]] = np.stack([dx[new], dy[new]], axis=1)
        sx, sy = ahead[active].T
        angle = np.arctan2(dy * sx - dx * sy, dx * sx + dy * sy)
        goes_on = distance >= furthest[active] - tolerance
        fits = goes_on & (near | ((low[active] <= angle) & (angle <= high[active])))
        reach[active[fits]] = active[fits] + j
        spread = np.where(near, np.pi, np.arcsin(tolerance / np.maximum(distance, tolerance)))
        low[active] = np.maximum(low[active], angle - spread)
        high[active] = np.minimum(high[active], angle + spread)
        furthest[active] = np.maximum(furthest[active], distance)
        active = active[goes_on & (low[active] <= high[active])]
    return reach


def _walk(start: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Mask (P,) of the points where pieces end that each go as far as they can, in all lines at once."""
    keep = np.zeros(len(reach), dtype=bool)
    at = start[:-1]
    while len(at):
        keep[at] = True
        further = reach[at]
        at = further[further > at]
    return keep


def simplify_lines(
        points: np.ndarray,
        start: np.ndarray,
        closed: np.ndarray,
        tolerance: float,
) -> tuple[np.ndarray, np.ndarray]:
    """As few straight pieces as the tolerance allows, moved to where they fit best.

    First and last points stay. A loop keeps three pieces at least.

    Args:
        points: (P, 2).
        start: (A + 1,).
        closed: (A,) whether a line is a loop, whose last point is its first.
        tolerance: Distance, positive.

    Returns:
        Points and starts of the simpler lines.
    """
    length = np.diff(start) - 1
    longest = np.maximum(np.where(closed, (length - 1) // 2, length), 1)
    keep = np.flatnonzero(_walk(start, straight_reach(points, start, tolerance, longest)))
    new_start = np.searchsorted(keep, start)
    return _meet_lines(points, keep, new_start, tolerance), new_start


def _meet_lines(points: np.ndarray, keep: np.ndarray, start: np.ndarray, tolerance: float) -> np.ndarray:
    """Move kept points between two pieces to where the lines that fit the points of both best meet."""
    kept: np.ndarray = points[keep]
    inner = np.ones(len(keep), dtype=bool)
    inner[start[:-1]] = inner[start[1:] - 1] = False
    at = np.flatnonzero(inner)
    if not len(at):
        return kept
    centre, normal, _ = _fit_lines(points, keep[:-1], keep[1:])
    one, two = at - 1, at
    determinant = normal[one, 0] * normal[two, 1] - normal[one, 1] * normal[two, 0]
    c_one = (normal[one] * centre[one]).sum(1)
    c_two = (normal[two] * centre[two]).sum(1)
    safe = np.where(np.abs(determinant) > 0.1, determinant, 1.)
    meet = np.stack([
        c_one * normal[two, 1] - c_two * normal[one, 1], c_two * normal[one, 0] - c_one * normal[two, 0]], axis=1)
    shift = np.where(np.abs(determinant)[:, None] > 0.1, meet / safe[:, None] - kept[at], 0.)
    distance = np.sqrt((shift ** 2).sum(1, keepdims=True))
    kept[at] += shift * np.minimum(1., max(tolerance, _REACH) / np.maximum(distance, 1e-9))
    return kept


def _fit_lines(points: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lines of least squared distance from points first..last: centres and unit normals (K, 2), and those distances."""
    x, y = (points - points.mean(0)).T if len(points) else points.T
    sums = [np.concatenate([[0.], np.cumsum(v)]) for v in (x, y, x * x, x * y, y * y)]
    sx, sy, sxx, sxy, syy = (s[last + 1] - s[first] for s in sums)
    n = np.maximum(last + 1 - first, 1)
    sx, sy = sx / n, sy / n
    a, b, c = sxx / n - sx * sx, sxy / n - sx * sy, syy / n - sy * sy
    root = np.sqrt(((a - c) / 2) ** 2 + b * b)
    least = (a + c) / 2 - root
    angle = np.arctan2(2 * b, a - c) / 2  # of the long axis
    return np.stack([sx, sy], axis=1) + points.mean(0), np.stack([-np.sin(angle), np.cos(angle)], axis=1), least
