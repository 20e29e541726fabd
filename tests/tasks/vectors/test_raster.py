from __future__ import annotations

import math

import numpy as np
import pytest

from timm_spot.ops.regions.borders import OUTSIDE
from timm_spot.tasks.vectors.drawing import Drawing, draw_labels
from timm_spot.tasks.vectors.raster import drawing_psnr, paint_shapes


def shape(points, control=None, scale=1):
    points = np.array(points)
    n = len(points)
    control = np.zeros(n, dtype=bool) if control is None else np.array(control, dtype=bool)
    return Drawing(np.zeros(n, dtype=int), np.zeros(n, dtype=int), points, control, np.zeros(1, dtype=int), scale)


def test_whole_pixels():
    painted = paint_shapes(shape([[1, 1], [4, 1], [4, 3], [1, 3]]), (6, 5), 1)
    expected = np.full((5, 6), -1)
    expected[1:3, 1:4] = 0
    assert painted.tolist() == expected.tolist()


@pytest.mark.parametrize('samples', [1, 2, 4])
def test_the_share_of_a_triangle(samples):
    painted = paint_shapes(shape([[0, 0], [40, 0], [0, 40]]), (40, 40), samples)
    assert (painted == 0).mean() == pytest.approx(0.5, abs=0.02)


def test_a_curve_is_a_parabola():
    """Under a control point lies two thirds of its triangle."""
    painted = paint_shapes(shape([[0, 0], [40, 80], [80, 0]], [0, 1, 0]), (80, 80), 2)
    assert (painted == 0).sum() / 4 == pytest.approx(80 * 80 / 2 * 2 / 3, rel=0.08)


def test_later_shapes_are_on_top_and_holes_are_seen_through():
    labels = np.full((9, 9), OUTSIDE)
    labels[1:8, 1:8], labels[3:6, 3:6] = 0, OUTSIDE
    labels[4, 4] = 1
    drawing = draw_labels(labels, 1e-3)
    painted = paint_shapes(drawing, (9, 9), 1)
    assert np.where(painted >= 0, drawing.regions[painted], OUTSIDE).tolist() == labels.tolist()


@pytest.mark.parametrize('samples', [1, 3])
def test_any_partition(samples):
    for seed in range(20):
        labels = np.random.default_rng(seed).integers(0, 3, (8, 11))
        labels = np.unique(labels, return_inverse=True)[1].reshape(8, 11)
        drawing = draw_labels(labels, 1e-3)
        painted = drawing.regions[paint_shapes(drawing, (11, 8), samples)]
        assert (painted == labels.repeat(samples, 0).repeat(samples, 1)).all()


def test_many_samples_in_chunks(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 4, (20, 30))
    drawing = draw_labels(labels, 0.7)
    whole = paint_shapes(drawing, (30, 20), 2)
    monkeypatch.setattr('timm_spot.tasks.vectors.raster._CHUNK', 64)
    assert (paint_shapes(drawing, (30, 20), 2) == whole).all()


def test_psnr():
    drawing = shape([[0, 0], [8, 0], [8, 6], [0, 6]])
    pixels, drawn = np.full((6, 8, 3), 100), np.ones((6, 8), dtype=bool)
    assert drawing_psnr(drawing, np.array([[100.] * 3]), pixels, drawn, 2) == math.inf
    assert drawing_psnr(drawing, np.array([[110.] * 3]), pixels, drawn, 2) == pytest.approx(10 * math.log10(650.25))
    drawn[0], pixels[0] = False, 0
    assert drawing_psnr(drawing, np.array([[110.] * 3]), pixels, drawn, 2) == pytest.approx(10 * math.log10(650.25))
    assert drawing_psnr(drawing, np.array([[0.] * 3]), pixels, np.zeros_like(drawn), 2) == math.inf
