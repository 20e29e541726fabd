"""A picture as SVG, at the level of detail that is asked for: so many regions, or as many as a size allows."""
from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from PIL import Image

from ...ops.regions.slivers import unmix_edges
from ...ops.regions.zones import build_dendrogram, flat_zones
from .drawing import Drawing, draw_labels, mean_colors, to_svg
from .raster import drawing_psnr

TOLERANCE, _FINE = 0.7, 0.35  # of photographs and of graphics
_GRAPHIC = 0.2  # zones of one colour for each pixel: graphics have fewer, photographs more
_SCALE = 4  # coordinates for each pixel of graphics
MODES = ('polygon', 'curve', 'auto')
MAX_REGIONS = 1_000_000
_OPAQUE = 128  # of 255: less is no part of the picture
_SAMPLES = 4  # of each axis of a pixel, where drawings are measured
_BYTES = 120  # of a region's path, where nothing is known yet
# Squared error, of 8-bit colours, that a region has to save to be worth its path, in photographs and in graphics.
_WORTH, _WORTH_GRAPHIC = 20_000., 100_000.


@dataclass(frozen=True)
class Detail:
    """How much of a picture is drawn, and how.

    Args:
        regions: So many, exactly, where the picture has as many pixels (and no more parts that do not touch). By
            default all that save more error than they are worth, or what the other limits allow.
        max_kb: At most so many kB of 1,000 bytes; as many regions as fit.
        psnr: The fewest regions whose drawing has so many dB.
        tolerance: How far a border may move, in pixels, above 0. By default 0.7 in photographs, half the diagonal of a
            pixel, so that a straight slanted border is one line; 0.35 in graphics, where borders run within pixels.
        mode: 'polygon', 'curve', or 'auto': of graphics the curves, if the file is smaller by them and no further from
            the picture, else polygons.

    Raises:
        ValueError: One is out of its range, or more than one of the first three is given.
    """
    regions: int | None = None
    max_kb: float | None = None
    psnr: float | None = None
    tolerance: float | None = None
    mode: str = 'auto'

    def __post_init__(self) -> None:
        if self.regions is not None and not (isinstance(self.regions, Integral) and 1 <= self.regions <= MAX_REGIONS):
            raise ValueError(f'regions={self.regions} must be a whole number from 1 to {MAX_REGIONS:,}.')
        for name, value, high, rule in (
                ('max_kb', self.max_kb, math.inf, 'be positive and finite'),
                ('psnr', self.psnr, 100., 'lie above 0 and below 100 dB'),
                ('tolerance', self.tolerance, 100., 'lie above 0 and below 100 pixels')):
            if value is not None and not 0. < value < high:
                raise ValueError(f'{name}={value} must {rule}.')
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} must be one of {', '.join(map(repr, MODES))}.")
        limits = [f'{name}={getattr(self, name)}' for name in ('regions', 'max_kb', 'psnr')
                  if getattr(self, name) is not None]
        if len(limits) > 1:
            raise ValueError(f"{' and '.join(limits)} exclude each other: give one of them.")


class Vectorizer:
    """A picture whose drawings, of any number of regions, are cuts through one dendrogram.

    Args:
        picture: RGB, or RGBA: what is less than half opaque is left out.
        detail: How it is drawn.
        title: What a reader is told of it.
    """

    def __init__(self, picture: Image.Image, detail: Detail, title: str = '') -> None:
        self.size, self.title, self.mode = picture.size, title, detail.mode
        self.pixels = np.asarray(picture.convert('RGB'))
        self.drawn = np.ones(self.pixels.shape[:2], dtype=bool)
        if 'A' in picture.getbands():
            self.drawn = np.asarray(picture.getchannel('A')) >= _OPAQUE
        zones = flat_zones(self.pixels, self.drawn)
        self.is_graphic = bool(zones.max() < _GRAPHIC * self.drawn.sum())
        self.flat = unmix_edges(self.pixels, zones) if self.is_graphic else self.pixels
        self.tree = build_dendrogram(self.flat, self.drawn, detail.regions or 1)
        tolerance, self.scale = (_FINE, _SCALE) if self.is_graphic else (TOLERANCE, 1)
        self.tolerance = tolerance if detail.tolerance is None else detail.tolerance

    def draw(self, regions: int) -> str:
        """The file with so many regions, in the mode that was chosen."""
        labels = self.tree.cut(regions)
        colors = mean_colors(self.flat, labels)
        first = self._shapes(labels, curved=self.mode == 'curve')
        text = to_svg(first, colors, self.size, self.title)
        if self.mode != 'auto' or not self.is_graphic:
            return text
        other = self._shapes(labels, curved=True)
        shorter = to_svg(other, colors, self.size, self.title)
        if len(shorter) < len(text) and self._measure(other, colors) >= self._measure(first, colors):
            return shorter
        return text

    def psnr(self, regions: int) -> float:
        """That of the polygons of so many regions."""
        labels = self.tree.cut(regions)
        return self._measure(self._shapes(labels, curved=False), mean_colors(self.flat, labels))

    def _shapes(self, labels: np.ndarray, curved: bool) -> Drawing:
        return draw_labels(
            labels, self.tolerance, self.scale * (2 if curved else 1), self.pixels if self.is_graphic else None, curved)

    def _measure(self, drawing: Drawing, colors: np.ndarray) -> float:
        return drawing_psnr(drawing, colors, self.pixels, self.drawn, _SAMPLES)


def picture_to_svg(picture: Image.Image, detail: Detail = Detail(), title: str = '') -> str:
    """Draw a picture as SVG.

    Args:
        picture: RGB, or RGBA: what is less than half opaque is left out.
        detail: How much of it, and how.
        title: What a reader is told of it.

    Returns:
        The text of the file, the same on any machine.

    Raises:
        ValueError: Not even one region fits in `detail.max_kb`, or all there are do not reach `detail.psnr`.

    Example:
        >>> from PIL import Image
        >>> print(picture_to_svg(Image.new('RGB', (4, 3), '#f80'), title='orange'), end='')
        <svg xmlns="http://www.w3.org/2000/svg" width="4" height="3" viewBox="0 0 16 12">
        <title>orange</title>
        <path fill="#f80" d="m0 12v-12h16v12z"/>
        </svg>
    """
    vectorizer = Vectorizer(picture, detail, title)
    if detail.max_kb is not None:
        return _fill(vectorizer, detail.max_kb)
    if detail.psnr is not None:
        return _reach(vectorizer, detail.psnr)
    worth = _WORTH_GRAPHIC if vectorizer.is_graphic else _WORTH
    return vectorizer.draw(vectorizer.tree.regions_above(worth) if detail.regions is None else detail.regions)


def _fill(vectorizer: Vectorizer, max_kb: float) -> str:
    """The file of most regions that is small enough, to within one in a hundred."""
    limit, tree, draw = 1000. * max_kb, vectorizer.tree, vectorizer.draw
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


def _reach(vectorizer: Vectorizer, psnr: float) -> str:
    """The file of the fewest regions that come so near to the picture, to within one in fifty."""
    tree = vectorizer.tree
    few, many = tree.fewest - 1, max(tree.fewest, tree.regions_above(_WORTH))  # too few, enough
    while (reached := vectorizer.psnr(many)) < psnr:
        if many >= tree.n_zones:
            raise ValueError(f'psnr={psnr} is more than the {reached:.1f} dB that all regions have: lower tolerance.')
        few, many = many, min(2 * many, tree.n_zones)
    while many - few > max(1, few // 50):
        middle = round(math.sqrt(max(few, 1) * many))
        middle = min(max(middle, few + 1), many - 1)
        if vectorizer.psnr(middle) < psnr:
            few = middle
        else:
            many = middle
    return vectorizer.draw(many)
