"""The text of an SVG file, in as few characters as its numbers allow."""
from __future__ import annotations

from html import escape
from itertools import pairwise

import numpy as np


def ring_paths(
        owner: np.ndarray,
        ring: np.ndarray,
        points: np.ndarray,
        control: np.ndarray | None = None,
) -> list[str]:
    """Path data of closed rings, in relative coordinates.

    Args:
        owner: (P,) what each point is drawn for, those of one owner together.
        ring: (P,) the ring that it belongs to, those of one ring together; a ring does not repeat its first point.
        points: (P, 2), whole numbers.
        control: (P,), which points are not on the ring but draw it towards them, as in TrueType's outlines: halfway
            between two of them, whose coordinates must then be even, lies a point on the ring. The first point of a
            ring is on it. None for polygons.

    Returns:
        One text for each owner, in their order.

    Example:
        >>> square = np.array([[2, 4], [6, 4], [6, 8], [2, 8]])
        >>> ring_paths(np.zeros(4), np.zeros(4), square)
        ['m2 4h4v4h-4z']
        >>> ring_paths(np.zeros(4), np.zeros(4), square, np.array([False, True, True, False]))
        ['m2 4q4 0 4 2t-4 2z']
    """
    control = np.zeros(len(points), dtype=bool) if control is None else control
    points, owner, ring, control = _without_straight(points, owner, ring, control)
    starts = np.flatnonzero(np.diff(ring, prepend=-1))
    names = owner[starts].tolist()
    rows = np.column_stack([points, control]).tolist()
    out: list[str] = []
    pen, last = (0, 0), None
    for (a, b), name in zip(pairwise([*starts.tolist(), len(rows)]), names):
        if name != last:
            out.append('')
            pen, last = (0, 0), name  # a path's first move counts from the origin
        out[-1] += _ring_text(rows[a:b], pen)
        pen = rows[a][0], rows[a][1]  # after z the pen is back where the ring began
    return out


def _without_straight(*parts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of points, owner, ring and control leave out points that repeat the one before, then those that lie straight.

    Those that control a curve, and those beside them, stay.
    """
    for is_left_out in (lambda one, two: (one == 0).all(1),
                        lambda one, two: (one[:, 0] * two[:, 1] == one[:, 1] * two[:, 0]) & ((one * two).sum(1) > 0)):
        points, _, ring, control = parts
        starts = np.flatnonzero(np.diff(ring, prepend=-1))
        last = np.append(starts, len(ring))[1:] - 1
        before, after = np.arange(len(ring)) - 1, np.arange(len(ring)) + 1
        before[starts], after[last] = last, starts
        bends = control | control[before] | control[after]
        keep = bends | ~is_left_out(points - points[before], points[after] - points)
        parts = tuple(part[keep] for part in parts)
    return parts


def _ring_text(rows: list[list[int]], pen: tuple[int, int]) -> str:
    """A ring's commands: each point as (x, y, whether it controls a curve), the pen where the last ring left it."""
    x, y = rows[0][:2]
    text = _Steps(*pen)
    text.write('m', x, y)
    waiting: tuple[int, int] | None = None  # a control point whose curve has no end yet
    for u, v, is_control in rows[1:]:
        if waiting is not None:
            end = ((waiting[0] + u) // 2, (waiting[1] + v) // 2) if is_control else (u, v)
            text.curve(waiting, end)
        elif not is_control:
            text.line(u, v)
        waiting = (u, v) if is_control else None
    if waiting is not None:  # z draws but a line
        text.curve(waiting, (x, y))
    return ''.join([*text.parts, 'z'])


class _Steps:
    """Commands from a pen on; a number needs no space before its minus sign, nor a name what repeats the last one."""

    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y
        self.parts: list[str] = []
        self.implied = ''  # the command that numbers without one stand for
        self.mirrored: tuple[int, int] | None = None  # the control point that t takes

    def write(self, command: str, x: int, y: int, *before: int) -> None:
        """Go to (x, y); `before` are the numbers that come first, relative already."""
        numbers = [*before, x - self.x, y - self.y]
        if command in 'hv':
            numbers = [numbers[command == 'v']]
        name = '' if command == self.implied else command
        first, *rest = numbers
        self.parts.append(name + (f'{first}' if name or first < 0 else f' {first}'))
        self.parts += [f'{n}' if n < 0 else f' {n}' for n in rest]
        self.x, self.y = x, y
        self.implied = 'l' if command == 'm' else command
        self.mirrored = None

    def line(self, x: int, y: int) -> None:
        self.write('h' if y == self.y else 'v' if x == self.x else 'l', x, y)

    def curve(self, control: tuple[int, int], end: tuple[int, int]) -> None:
        """A quadratic curve, by t where its control point mirrors the last one."""
        if control == self.mirrored:
            self.write('t', *end)
        else:
            self.write('q', *end, control[0] - self.x, control[1] - self.y)
        self.mirrored = 2 * end[0] - control[0], 2 * end[1] - control[1]


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
