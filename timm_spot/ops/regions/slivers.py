"""Pixels that only mix the colours of what they lie between, as anti-aliased edges do, in the colour of the nearer."""
from __future__ import annotations

from itertools import combinations

import numpy as np

_LARGE = 16  # pixels of one colour that are an area of their own
_NEAR = 3 * 16. ** 2  # squared distance of a colour from what two others mix


def unmix_edges(pixels: np.ndarray, zones: np.ndarray) -> np.ndarray:
    """A picture in which such pixels have the colour of that area, of both beside them, which is nearer to theirs.

    Thin lines with a colour of their own stay.

    Args:
        pixels: (H, W, 3), uint8.
        zones: (H, W) numbers 0.. of areas of one colour; negative for what is no part of the picture.

    Example:
        >>> white_grey_black = np.repeat(np.uint8([255] * 8 + [120] + [0] * 8), 3).reshape(1, 17, 3).repeat(4, axis=0)
        >>> zones = np.int64([0] * 8 + [1] + [2] * 8)[None].repeat(4, axis=0)
        >>> unmix_edges(white_grey_black, zones)[0, 7:10, 0].tolist()
        [255, 0, 0]
    """
    sizes = np.bincount(zones[zones >= 0], minlength=1)
    large = (sizes[zones] >= _LARGE) & (zones >= 0)
    y, x = np.nonzero(~large & (zones >= 0))
    padded = np.pad(pixels.astype(float), ((1, 1), (1, 1), (0, 0)))
    around = [(1 + dy, 1 + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    colors = [padded[y + dy, x + dx] for dy, dx in around]
    is_large = [np.pad(large, 1)[y + dy, x + dx] for dy, dx in around]
    own = pixels[y, x].astype(float)
    best, nearer = np.full(len(y), _NEAR), own
    for i, j in combinations(range(len(around)), 2):
        whole = colors[j] - colors[i]
        length = (whole ** 2).sum(1)
        share = ((own - colors[i]) * whole).sum(1) / np.maximum(length, 1.)
        rest = ((own - colors[i] - share.clip(0., 1.)[:, None] * whole) ** 2).sum(1)
        better = is_large[i] & is_large[j] & (length > 0) & (rest < best)
        best = np.where(better, rest, best)
        nearer = np.where(better[:, None], np.where((share < 0.5)[:, None], colors[i], colors[j]), nearer)
    out = pixels.copy()
    out[y, x] = nearer.astype(pixels.dtype)
    return out
