from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label

from timm_spot.ops.regions.borders import OUTSIDE, find_borders
from timm_spot.ops.regions.layers import stack_regions


def stacked(labels):
    borders = find_borders(labels)
    sizes = np.bincount(labels[labels != OUTSIDE])
    return borders, sizes, stack_regions(sizes, borders.left, borders.right, np.diff(borders.start).astype(float))


def test_a_disc_in_a_ring_is_not_cut_out_of_it():
    labels = np.zeros((9, 9), dtype=int)
    labels[2:7, 2:7] = 1
    labels[4, 4] = 2
    borders, _, (order, owner, arc, _) = stacked(labels)
    assert order.tolist() == [0, 1, 2]
    drawn = {region: {(borders.left[a], borders.right[a]) for a in arc[owner == region]} for region in range(3)}
    assert drawn == {0: {(OUTSIDE, 0)}, 1: {(0, 1)}, 2: {(1, 2)}}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 6), st.integers(0, 10 ** 6))
def test_painting_gives_the_partition(height, width, n, seed):
    """Each region covers itself and later ones only, and what is drawn around it bounds just that."""
    labels = np.random.default_rng(seed).integers(OUTSIDE, n, (height, width))
    numbers = np.unique(labels[labels != OUTSIDE])
    if not len(numbers):
        return
    labels = np.where(labels == OUTSIDE, OUTSIDE, np.searchsorted(numbers, labels))
    borders, sizes, (order, owner, arc, forward) = stacked(labels)
    assert (np.diff(sizes[order]) <= 0).all()
    ground = np.zeros(len(sizes) + 1, dtype=bool)
    for k, region in enumerate(order):
        mine = owner == region
        inner = np.where(forward[mine], borders.right[arc[mine]], borders.left[arc[mine]])
        outer = np.where(forward[mine], borders.left[arc[mine]], borders.right[arc[mine]])
        covered = {region, *inner.tolist()}
        while True:  # and what cannot be left without crossing an arc that is drawn
            walls = set(arc[mine].tolist())
            more = {
                int(b) for i, (one, two) in enumerate(zip(borders.left, borders.right)) if i not in walls
                for a, b in ((one, two), (two, one)) if a in covered} - covered
            if not more:
                break
            covered |= more
        assert OUTSIDE not in covered and covered <= set(order[k:].tolist())
        assert not covered & set(outer.tolist())
        ground[list(covered)] = True
    assert ground[:-1].all()


def test_the_first_of_what_hangs_together_covers_it_all():
    labels = np.random.default_rng(0).integers(0, 9, (12, 13))
    labels[:, 6] = OUTSIDE
    labels = np.where(labels == OUTSIDE, OUTSIDE, labels + 9 * (np.arange(13) > 6))
    borders, _, (_, owner, arc, _) = stacked(labels)
    around = [r for r in range(18) if (borders.left[arc[owner == r]] == OUTSIDE).all()]
    assert len(around) == label(labels != OUTSIDE)[1] == 2
