from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot.ops.regions.borders import OUTSIDE, find_borders, trace_rings

MAPS = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(0, 10 ** 6))


def random_labels(height, width, n, seed):
    return np.random.default_rng(seed).integers(OUTSIDE, n, (height, width))


def test_two_pixels():
    borders = find_borders(np.array([[0, 1]]))
    lines = [borders.corners[a:b].tolist() for a, b in pairwise(borders.start)]
    inner, = (line for line, left in zip(lines, borders.left) if left == 0)
    assert sorted(inner) == [[1, 0], [1, 1]]
    # Around the picture arcs end at its corners, which are to stay.
    assert sorted(map(len, lines)) == [2] * 7 and not borders.closed.any()


def test_an_island_is_a_loop():
    labels = np.zeros((5, 6), dtype=int)
    labels[2, 2:4] = 1
    borders = find_borders(labels)
    loop, = np.flatnonzero(borders.closed)
    corners = borders.corners[borders.start[loop]:borders.start[loop + 1]]
    assert (borders.left[loop], borders.right[loop]) == (0, 1)
    assert len(corners) == 7 and corners[0].tolist() == corners[-1].tolist()
    assert (np.abs(np.diff(corners, axis=0)).sum(1) == 1).all()


@settings(deadline=None, max_examples=60)
@given(MAPS)
def test_arcs_are_the_sides_between_labels(made):
    labels = random_labels(*made)
    borders = find_borders(labels)
    padded = np.pad(labels, 1, constant_values=OUTSIDE)
    seen = 0
    for a, (i, j) in enumerate(pairwise(borders.start)):
        line = borders.corners[i:j]
        for (x0, y0), (x1, y1) in pairwise(line):
            dx, dy = x1 - x0, y1 - y0
            assert abs(dx) + abs(dy) == 1
            # The pixels on both hands of the step, in the padded map.
            middle = np.array([y0 + y1, x0 + x1]) / 2
            right, left = (np.floor(middle + np.array([dx, -dy]) * s / 2).astype(int) + 1 for s in (1, -1))
            assert padded[tuple(right)] == borders.right[a] > borders.left[a] == padded[tuple(left)]
            seen += 1
    assert seen == (padded[:, 1:] != padded[:, :-1]).sum() + (padded[1:] != padded[:-1]).sum()


@settings(deadline=None, max_examples=60)
@given(MAPS)
def test_rings_close_and_bound_each_region_s_area(made):
    labels = random_labels(*made)
    borders = find_borders(labels)
    n_arcs = len(borders.left)
    if not n_arcs:
        return
    shape = np.concatenate([borders.left, borders.right])
    arc, forward = np.tile(np.arange(n_arcs), 2), np.repeat([False, True], n_arcs)
    mine = shape != OUTSIDE
    shape, arc, forward = shape[mine], arc[mine], forward[mine]
    first, last = borders.corners[borders.start[:-1]], borders.corners[borders.start[1:] - 1]
    ends = np.stack([first[:, 1] * 100 + first[:, 0], last[:, 1] * 100 + last[:, 0]], axis=1)
    order, ring = trace_rings(shape, arc, forward, ends)
    assert sorted(order) == list(range(len(shape)))
    area = np.zeros(labels.max() + 1)
    for r in np.unique(ring):
        members = order[ring == r]
        assert (np.diff(np.flatnonzero(ring == r)) == 1).all() and len({*shape[members]}) == 1
        points = np.concatenate([
            borders.corners[borders.start[arc[i]]:borders.start[arc[i] + 1]][::1 if forward[i] else -1]
            for i in members])
        assert points[0].tolist() == points[-1].tolist()
        (x0, y0), (x1, y1) = points[:-1].T, points[1:].T
        assert (np.abs(x1 - x0) + np.abs(y1 - y0) <= 1).all()  # each arc starts where the one before ended
        area[shape[members[0]]] += (x0 * y1 - x1 * y0).sum() / 2
    assert area.tolist() == np.bincount(labels[labels != OUTSIDE], minlength=len(area)).tolist()
