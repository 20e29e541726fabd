from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label

from timm_spot.ops.regions.borders import OUTSIDE
from timm_spot.ops.regions.zones import build_dendrogram
from timm_spot.tasks.vectors.drawing import draw_labels, mean_colors, to_svg
from timm_spot.tasks.vectors.raster import paint_shapes


def paint(drawing, height, width):
    """Painted by the rule of even and odd crossings, at the middles of pixels: what a viewer does without smoothing."""
    y, x = np.mgrid[:height, :width] + 0.5 + 1e-6
    canvas = np.full((height, width), OUTSIDE)
    for k, region in enumerate(drawing.regions):
        inside = np.zeros((height, width), dtype=bool)
        for r in np.unique(drawing.ring[drawing.owner == k]):
            ring = drawing.points[drawing.ring == r] / drawing.scale
            for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0)):
                crosses = (y0 <= y) != (y1 <= y)
                if y0 != y1:
                    inside ^= crosses & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
        canvas[inside] = region
    return canvas


def relabel(labels):
    """Numbers of the 4-connected parts."""
    out, n = np.full(labels.shape, OUTSIDE), 0
    for value in np.unique(labels[labels != OUTSIDE]):
        parts, count = label(labels == value)
        out[parts > 0] = parts[parts > 0] - 1 + n
        n += count
    return out


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 10 ** 6))
def test_without_tolerance_painting_gives_the_partition(height, width, n, seed):
    labels = relabel(np.random.default_rng(seed).integers(OUTSIDE, n, (height, width)))
    if labels.max() < 0:
        return
    assert (paint(draw_labels(labels, 1e-3), height, width) == labels).all()


@pytest.mark.parametrize('tolerance, scale', [(0.7, 1), (0.35, 4), (2., 1), (30., 2)])
def test_every_region_has_a_shape_of_its_size(tolerance, scale):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    pixels[10:30, 10:35] = 200
    labels = build_dendrogram(pixels).cut(150)
    for given_pixels in (None, pixels):
        drawing = draw_labels(labels, tolerance, scale, given_pixels)
        assert sorted(drawing.regions) == list(range(150)) and (np.unique(drawing.owner) == np.arange(150)).all()
        assert drawing.points.min() >= 0 and (drawing.points.max(0) <= np.array([50, 40]) * scale).all()
        painted = paint(drawing, 40, 50)
        assert (painted != OUTSIDE).all()  # the picture is covered, whatever the tolerance
        if tolerance < 1:
            assert (painted == labels).mean() > 0.8


def test_a_diagonal_is_one_line_for_both_sides():
    labels = (np.arange(30)[:, None] > np.arange(30)).astype(int)
    drawing = draw_labels(labels, 0.75)
    assert len(drawing.points) <= 6 + 4  # around the picture, and the smaller triangle
    assert (paint(drawing, 30, 30) != labels).mean() < 0.04


def test_curves_stay_near():
    """A disc: both sides of its border are the same curve, within the tolerance of the disc."""
    y, x = np.mgrid[:60, :60]
    labels = ((y - 29.5) ** 2 + (x - 29.5) ** 2 < 20.3 ** 2).astype(int)
    drawing = draw_labels(labels, 0.7, 4, curved=True)
    assert drawing.control.any() and not (drawing.points[drawing.control] % 2).any()
    shapes = paint_shapes(drawing, (60, 60), 4)
    y, x = (np.mgrid[:240, :240] + 0.5) / 4
    radius = np.hypot(y - 30, x - 30)
    assert (shapes[radius < 19] == 1).all() and (shapes[radius > 21.6] == 0).all()


def test_nothing_drawn_where_nothing_is():
    drawing = draw_labels(np.full((3, 4), OUTSIDE), 0.7)
    assert 'path' not in to_svg(drawing, np.zeros((0, 3)), (4, 3), 'nothing')


def test_mean_colors():
    labels = np.array([[0, 0, OUTSIDE], [1, 1, 1]])
    pixels = np.arange(18).reshape(2, 3, 3)
    np.testing.assert_allclose(mean_colors(pixels, labels), [[1.5, 2.5, 3.5], [12, 13, 14]])
