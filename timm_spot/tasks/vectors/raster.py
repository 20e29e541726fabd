"""What a drawing looks like, and how far that is from the picture: for searches by quality, no viewer."""
from __future__ import annotations

import math

import numpy as np

from .drawing import Drawing

_PIECES = 4  # straight ones for a curve
_CHUNK = 1 << 22  # samples that are painted at once


def paint_shapes(drawing: Drawing, size: tuple[int, int], samples: int) -> np.ndarray:
    """The last shape that covers each of samples x samples points within every pixel.

    Args:
        drawing: What to paint.
        size: Width and height of the picture.
        samples: For each axis of a pixel.

    Returns:
        (height * samples, width * samples) places in the order of painting, -1 where there is no shape.
    """
    width, height = (samples * side for side in size)
    owner, begin, end = _edges(drawing)
    begin, end = begin * samples / drawing.scale - 0.5, end * samples / drawing.scale - 0.5  # a sample is its middle
    low, high = np.minimum(begin[:, 1], end[:, 1]), np.maximum(begin[:, 1], end[:, 1])
    first = np.ceil(low).astype(np.int64).clip(0, height)
    count = np.ceil(high).astype(np.int64).clip(0, height) - first
    edge = np.repeat(np.arange(len(owner)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    slope = (end[:, 0] - begin[:, 0]) / np.where(count > 0, end[:, 1] - begin[:, 1], 1.)
    column = np.ceil(begin[edge, 0] + (row - begin[edge, 1]) * slope[edge] - 1e-9).astype(np.int64).clip(0, width)
    # Between odd and even crossings of a row lies the inside of a shape.
    crossing = np.sort((owner[edge] * height + row) * (width + 1) + column)
    line, left = np.divmod(crossing[::2], width + 1)
    shape, row = np.divmod(line, height)
    length = crossing[1::2] - crossing[::2]
    canvas = np.full(width * height, -1)
    chunk = np.cumsum(length) // _CHUNK
    for part in np.split(np.arange(len(length)), np.flatnonzero(np.diff(chunk)) + 1):
        n = length[part]
        place = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        canvas[np.repeat(row[part] * width + left[part], n) + place] = np.repeat(shape[part], n)  # the last one stays
    return canvas.reshape(height, width)


def _edges(drawing: Drawing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape, first and last point of all straight pieces; curves in `_PIECES`."""
    points, control, ring = drawing.points.astype(float), drawing.control, drawing.ring
    starts = np.flatnonzero(np.diff(ring, prepend=-1))
    last = np.append(starts, len(ring))[1:] - 1
    before, after = np.arange(len(ring)) - 1, np.arange(len(ring)) + 1
    before[starts], after[last] = last, starts
    straight = ~control & ~control[after]
    bent = np.flatnonzero(control)
    here, one, two = points[bent], points[before[bent]], points[after[bent]]
    one = np.where(control[before[bent], None], (one + here) / 2, one)
    two = np.where(control[after[bent], None], (two + here) / 2, two)
    t = np.linspace(0., 1., _PIECES + 1)[:, None, None]
    curve = (1 - t) ** 2 * one + 2 * t * (1 - t) * here + t ** 2 * two
    return (
        np.concatenate([drawing.owner[straight], np.tile(drawing.owner[bent], _PIECES)]),
        np.concatenate([points[straight], curve[:-1].reshape(-1, 2)]),
        np.concatenate([points[after[straight]], curve[1:].reshape(-1, 2)]))


def drawing_psnr(drawing: Drawing, colors: np.ndarray, pixels: np.ndarray, drawn: np.ndarray, samples: int) -> float:
    """Peak signal-to-noise ratio of a drawing, in dB.

    Args:
        drawing: What is painted.
        colors: (N, 3) of its regions.
        pixels: (H, W, 3) of the picture, in 0..255.
        drawn: (H, W), which pixels count.
        samples: See `paint_shapes`.

    Returns:
        Infinity for what is equal.
    """
    height, width, _ = pixels.shape
    shapes = paint_shapes(drawing, (width, height), samples)
    table = np.concatenate([np.rint(colors)[drawing.regions], [[255.] * 3]])  # -1: what shows where nothing is
    seen = table[shapes].reshape(height, samples, width, samples, 3).mean((1, 3))
    error = ((seen - pixels)[drawn] ** 2).mean() if drawn.any() else 0.
    return 10 * math.log10(255 ** 2 / error) if error else math.inf
