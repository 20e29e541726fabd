"""A picture as SVG, at the level of detail that is asked for: so many regions, or as many as a size allows."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from PIL import Image

from ...ops.regions.slivers import unmix_edges
from ...ops.regions.zones import Dendrogram, build_dendrogram, flat_zones
from .drawing import draw_labels, mean_colors, to_svg

TOLERANCE, _FINE = 0.7, 0.35  # of photographs and of graphics
_GRAPHIC = 0.2  # zones of one colour for each pixel: graphics have fewer, photographs more
_SCALE = 4  # coordinates for each pixel of graphics
MAX_REGIONS = 1_000_000
_OPAQUE = 128  # of 255: less is no part of the picture
_BYTES = 120  # of a region's path, where nothing is known yet
# Squared error, of 8-bit colours, that a region has to save to be worth its path, in photographs and in graphics.
_WORTH, _WORTH_GRAPHIC = 20_000., 100_000.


@dataclass(frozen=True)
class Detail:
    """How much of a picture is drawn.

    Args:
        regions: So many, exactly, where the picture has as many pixels (and no more parts that do not touch). None: all
            that save more error than they are worth, or what the other limits allow.
        tolerance: How far a border may move, in pixels, above 0. By default 0.7 in photographs, half the diagonal of a
            pixel, so that a straight slanted border is one line; 0.35 in graphics, where borders run within pixels.
        max_kb: At most so many kB of 1,000 bytes; as many regions as fit.

    Raises:
        ValueError: One is out of its range, or `regions` is given with `max_kb`.
    """
    regions: int | None = None
    tolerance: float | None = None
    max_kb: float | None = None

    def __post_init__(self) -> None:
        if self.regions is not None and not (isinstance(self.regions, Integral) and 1 <= self.regions <= MAX_REGIONS):
            raise ValueError(f'regions={self.regions} must be a whole number from 1 to {MAX_REGIONS:,}.')
        if self.tolerance is not None and not 0. < self.tolerance <= 100.:
            raise ValueError(f'tolerance={self.tolerance} must lie above 0 and at most at 100 pixels.')
        if self.max_kb is not None and not 0. < self.max_kb < math.inf:
            raise ValueError(f'max_kb={self.max_kb} must be positive and finite.')
        if self.regions is not None and self.max_kb is not None:
            raise ValueError(f'regions={self.regions} and max_kb={self.max_kb} exclude each other: give one of them.')


def picture_to_svg(picture: Image.Image, detail: Detail = Detail(), title: str = '') -> str:
    """Draw a picture as SVG.

    Args:
        picture: RGB, or RGBA: what is less than half opaque is left out.
        detail: How much of it.
        title: What a reader is told of it.

    Returns:
        The text of the file, the same on any machine.

    Raises:
        ValueError: Not even one region fits in `detail.max_kb`.

    Example:
        >>> from PIL import Image
        >>> print(picture_to_svg(Image.new('RGB', (4, 3), '#f80'), title='orange'), end='')
        <svg xmlns="http://www.w3.org/2000/svg" width="4" height="3" viewBox="0 0 16 12">
        <title>orange</title>
        <path fill="#f80" d="m0 12v-12h16v12z"/>
        </svg>
    """
    pixels = np.asarray(picture.convert('RGB'))
    drawn = np.ones(pixels.shape[:2], dtype=bool)
    if 'A' in picture.getbands():
        drawn = np.asarray(picture.getchannel('A')) >= _OPAQUE
    zones = flat_zones(pixels, drawn)
    is_graphic = zones.max() < _GRAPHIC * drawn.sum()
    flat = unmix_edges(pixels, zones) if is_graphic else pixels
    tree = build_dendrogram(flat, drawn, detail.regions or 1)
    tolerance, scale = (_FINE, _SCALE) if is_graphic else (TOLERANCE, 1)
    if detail.tolerance is not None:
        tolerance = detail.tolerance

    def draw(regions: int) -> str:
        labels = tree.cut(regions)
        drawing = draw_labels(labels, tolerance, scale, pixels if is_graphic else None)
        return to_svg(drawing, mean_colors(flat, labels), picture.size, title)

    if detail.max_kb is not None:
        return _fill(draw, tree, detail.max_kb)
    worth = _WORTH_GRAPHIC if is_graphic else _WORTH
    return draw(tree.regions_above(worth) if detail.regions is None else detail.regions)


def _fill(draw: Callable[[int], str], tree: Dendrogram, max_kb: float) -> str:
    """The file of most regions that is small enough, to within one in a hundred."""
    limit = 1000. * max_kb
    few, text = tree.fewest, draw(tree.fewest)
    if len(text.encode()) > limit:
        raise ValueError(
            f'max_kb={max_kb} is less than the {len(text.encode()) / 1000:.3g} kB that the fewest regions take.')
    many = tree.n_zones + 1  # too many, or more than there are
    guess = min(max(few, int(limit / _BYTES)), tree.n_zones)
    while many - few > max(1, few // 100):
        guess = min(max(guess, few + 1), many - 1)
        drawn = draw(guess)
        size = len(drawn.encode())
        if size > limit:
            many = guess
        else:
            few, text = guess, drawn
        # The size grows more slowly than the regions: the rule of three leads outside, where bisection goes on.
        guess = int(guess * limit / size)
        if not few < guess < many:
            guess = (few + many) // 2
    return text
