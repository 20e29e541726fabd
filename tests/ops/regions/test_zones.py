from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import label

from timm_spot.ops.regions.borders import OUTSIDE
from timm_spot.ops.regions.zones import build_dendrogram, flat_zones


def picture(seed=0, size=(20, 23)):
    return np.random.default_rng(seed).integers(0, 4, (*size, 3)).astype(np.uint8) * 80


@pytest.mark.parametrize('n', [1, 2, 7, 100, 400])
def test_cuts_are_exact_and_connected(n):
    tree = build_dendrogram(picture())
    labels = tree.cut(n)
    assert len(np.unique(labels)) == labels.max() + 1 == min(n, tree.n_zones)
    assert all(label(labels == k)[1] == 1 for k in range(n))


def test_cuts_nest():
    tree = build_dendrogram(picture())
    coarse, fine = tree.cut(5), tree.cut(40)
    assert len(np.unique(np.stack([coarse.ravel(), fine.ravel()]), axis=1).T) == 40


def test_a_flat_picture_is_divided_where_more_is_asked_for():
    flat = np.full((16, 16, 3), 77, dtype=np.uint8)
    assert build_dendrogram(flat).n_zones == 1
    tree = build_dendrogram(flat, at_least=9)
    sizes = np.bincount(tree.cut(9).ravel())
    assert len(sizes) == 9 and sizes.max() <= 6 * sizes.min()


def test_what_is_not_drawn_has_no_region():
    drawn = np.ones((20, 23), dtype=bool)
    drawn[:, 11] = False
    tree = build_dendrogram(picture(), drawn)
    assert tree.fewest == 2  # halves that do not touch
    labels = tree.cut(30)
    assert ((labels == OUTSIDE) == ~drawn).all() and len(np.unique(labels[drawn])) == 30


def test_regions_by_what_they_save():
    pixels = np.zeros((10, 10, 3), dtype=np.uint8)
    pixels[2:4, 2:4], pixels[7, 7] = 200, 10
    tree = build_dendrogram(pixels)
    assert [tree.regions_above(cost) for cost in (0., 1e3, 1e7)] == [3, 2, 1]


def test_zones_of_one_colour():
    pixels = np.uint8([[0, 0, 5], [5, 0, 5], [5, 5, 0]])[..., None].repeat(3, axis=2)
    assert flat_zones(pixels, np.ones((3, 3), dtype=bool)).tolist() == [[0, 0, 1], [2, 0, 1], [2, 2, 3]]
    drawn = np.bool_([[1, 0, 1], [1, 1, 1], [0, 1, 1]])
    assert flat_zones(pixels, drawn).tolist() == [[0, OUTSIDE, 1], [2, 3, 1], [OUTSIDE, 4, 5]]
    assert (flat_zones(pixels, np.zeros((3, 3), dtype=bool)) == OUTSIDE).all()
