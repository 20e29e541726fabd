"""The text of an SVG file, in as few characters as its numbers allow."""
from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import pairwise

import numpy as np


def ring_paths(owner: np.ndarray, ring: np.ndarray, points: np.ndarray) -> list[str]:
    """Path data of polygons, closed and in relative coordinates.

    Args:
        owner: (P,) what each point is drawn for, those of one owner together.
        ring: (P,) the ring that it belongs to, those of one ring together.
        points: (P, 2), whole numbers; a ring does not repeat its first point.

    Returns:
        One text for each owner, in their order.

    Example:
        >>> square = np.array([[2, 3], [6, 3], [6, 7], [2, 7]])
        >>> ring_paths(np.zeros(4), np.zeros(4), square)
        ['m2 3h4v4h-4z']
    """
    points, owner, ring = _without_straight(points, owner, ring)
    if not len(points):
        return []
    starts = np.flatnonzero(np.diff(ring, prepend=ring[0] - 1))
    step = np.diff(points, axis=0, prepend=points[:1])
    goes_on = owner[starts][1:] == owner[starts][:-1]
    # After z the pen is back where the ring began, from where the next one of the same owner counts.
    step[starts] = points[starts]
    step[starts[1:]] -= np.where(goes_on[:, None], points[starts[:-1]], 0)
    bounds = np.append(starts, len(points)).tolist()
    steps = step.tolist()
    rings = [''.join(_ring_text(steps[a:b])) for a, b in pairwise(bounds)]
    first = np.flatnonzero(np.insert(~goes_on, 0, True)).tolist()
    return [''.join(rings[a:b]) for a, b in pairwise([*first, len(rings)])]


def _without_straight(points: np.ndarray, owner: np.ndarray, ring: np.ndarray) -> tuple[np.ndarray, ...]:
    """Leave out points that repeat the one before, then those that lie straight between their neighbours."""
    for is_left_out in (lambda one, two: (one == 0).all(1),
                        lambda one, two: (one[:, 0] * two[:, 1] == one[:, 1] * two[:, 0]) & ((one * two).sum(1) > 0)):
        starts = np.flatnonzero(np.diff(ring, prepend=-1))
        last = np.append(starts, len(ring))[1:] - 1
        before, after = np.arange(len(ring)) - 1, np.arange(len(ring)) + 1
        before[starts], after[last] = last, starts
        keep = ~is_left_out(points - points[before], points[after] - points)
        points, owner, ring = points[keep], owner[keep], ring[keep]
    return points, owner, ring


def _ring_text(steps: list[list[int]]) -> Iterator[str]:
    """A ring's commands; a number needs no space before its minus sign, nor a command that repeats the last."""
    x, y = steps[0]
    yield f'm{x}{y}' if y < 0 else f'm{x} {y}'
    last = 'l'  # what a move is followed by
    for x, y in steps[1:]:
        command = 'h' if y == 0 else 'v' if x == 0 else 'l'
        first = y if command == 'v' else x
        yield (f'{first}' if first < 0 else f' {first}') if command == last else f'{command}{first}'
        if command == 'l':
            yield f'{y}' if y < 0 else f' {y}'
        last = command
    yield 'z'


def hex_colors(colors: np.ndarray) -> list[str]:
    """Colours (N, 3) in 0..255 as #rrggbb, or #rgb where that says the same.

    Example:
        >>> hex_colors(np.array([[255, 0, 17], [1, 2, 3]]))
        ['#f01', '#010203']
    """
    full = ['{:02x}{:02x}{:02x}'.format(*c) for c in np.rint(colors).clip(0, 255).astype(int).tolist()]
    return [f'#{c[::2]}' if c[::2] == c[1::2] else f'#{c}' for c in full]


def svg_document(paths: list[str], fills: list[str], size: tuple[int, int], scale: int, title: str) -> str:
    """A whole file.

    Args:
        paths: Path data, in the order of painting.
        fills: Their colours.
        size: Width and height, in pixels.
        scale: Units of the coordinates for each pixel.
        title: What a reader is told of the picture.
    """
    width, height = size
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width * scale} {height * scale}">')
    lines = [head, f'<title>{escape(title, quote=False)}</title>']
    lines += [f'<path fill="{fill}" d="{path}"/>' for path, fill in zip(paths, fills)]
    return '\n'.join([*lines, '</svg>\n'])
