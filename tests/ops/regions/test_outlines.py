from __future__ import annotations

import numpy as np
import pytest
from dht_golden import load

from timm_spot.ops.regions.outlines import fit_cubics, round_corners, simplify, split_edges, trace_outlines


def test_golden_stages():
    tensors, _ = load('svg_48x48')
    outlines = trace_outlines(tensors['seg'].numpy())
    stages = dict(trace=outlines)
    for name, function in (
            ('simplify0', lambda o: simplify(o, 0.)), ('chaikin1', round_corners),
            ('simplify1', lambda o: simplify(o, 0.1)), ('chaikin2', round_corners),
            ('simplify2', lambda o: simplify(o, 0.1))):
        stages[name] = outlines = function(outlines)
    for name, (ids, points) in stages.items():
        np.testing.assert_array_equal(ids, tensors[f'{name}/ids'].numpy())
        np.testing.assert_array_equal(points, tensors[f'{name}/yx'].numpy())
    ids, curves = fit_cubics(outlines)
    np.testing.assert_array_equal(ids, tensors['bezier/ids'].numpy())
    np.testing.assert_allclose(curves, tensors['bezier/xy'].numpy(), atol=1e-4)


@pytest.mark.parametrize('segmentation, expected', [
    ([[0]], [(0, 1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 1)]),
    # A ring: its hole has no outline, but the region inside has.
    ([[0, 0, 0], [0, 1, 0], [0, 0, 0]], [
        (0, 3, 0), (0, 2, 0), (0, 1, 0), (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 3), (0, 2, 3), (0, 3, 3),
        (0, 3, 2), (0, 3, 1), (1, 2, 1), (1, 1, 1), (1, 1, 2), (1, 2, 2)]),
])
def test_outlines_by_hand(segmentation, expected):
    ids, points = trace_outlines(np.array(segmentation))
    assert [(i, *p) for i, p in zip(ids.tolist(), points.tolist())] == expected


def test_a_region_that_touches_itself_is_one_outline():
    # Region 0 meets itself at the corner (2, 2), which its path crosses.
    ids, points = trace_outlines(np.array([[0, 0, 0], [0, 1, 0], [0, 0, 2]]))
    assert len(points[ids == 0]) == 12
    ids, points = trace_outlines(np.array([[0, 0, 0, 0], [0, 1, 0, 3], [0, 0, 2, 2], [0, 0, 0, 2]]))
    assert sorted(set(ids.tolist())) == [0, 1, 2, 3]


def test_long_edges_are_split():
    square = np.array([0, 0, 0, 1, 1, 1]), np.array([[0., 0], [0, 6], [3, 0], [1, 1], [2, 1], [1, 2]])
    ids, points = split_edges(square, 3.)
    diagonal = [[3 * i / 3, 6 - 6 * i / 3] for i in range(3)]  # 6.7 long: three pieces
    assert ids.tolist() == [0] * 6 + [1] * 3
    np.testing.assert_allclose(points[:6], [[0, 0], [0, 3], *diagonal, [3, 0]])
    np.testing.assert_array_equal(points[6:], square[1][3:])
    for a, b in zip(square, split_edges(square, np.inf)):
        np.testing.assert_array_equal(a, b)


def test_nothing_left():
    empty = simplify(trace_outlines(np.array([[0]])), 9.)
    assert len(empty[0]) == 0
    assert len(fit_cubics(split_edges(round_corners(empty), 1.))[0]) == 0
