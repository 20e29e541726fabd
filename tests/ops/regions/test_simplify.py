from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from timm_spot.ops.regions.simplify import select_lines, simplify_lines, straight_reach


def staircase(n):
    """Corners of pixels along the diagonal."""
    return np.array([[(i + 1) // 2, i // 2] for i in range(n)], dtype=float)


def walk(n, seed):
    """A random walk along the sides of pixels."""
    steps = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
    turns = np.random.default_rng(seed).choice([-1, 0, 0, 1], n)
    return np.cumsum(steps[np.cumsum(turns) % 4], axis=0).astype(float)


def distance(points, line):
    """Of each point to a polyline."""
    best = np.full(len(points), np.inf)
    for a, b in pairwise(line):
        along = (b - a) @ (b - a)
        t = np.clip(((points - a) @ (b - a)) / max(along, 1e-12), 0, 1)
        best = np.minimum(best, np.linalg.norm(points - a - t[:, None] * (b - a), axis=1))
    return best


def simplify(line, tolerance, closed=False):
    return simplify_lines(line, np.array([0, len(line)]), np.array([closed]), tolerance)[0]


def test_a_diagonal_is_one_piece():
    line = staircase(41)
    assert simplify(line, 0.75).tolist() == [[0, 0], [20, 20]]
    assert len(simplify(line, 0.3)) == 41


def test_what_is_straight_is_left_out_exactly():
    line = np.array([[0, 0], [1, 0], [2, 0], [2, 1], [2, 2], [3, 2.]])
    np.testing.assert_allclose(simplify(line, 1e-3), [[0, 0], [2, 0], [2, 2], [3, 2]], atol=1e-9)


def test_a_spike_is_not_cut_off():
    """There and back along one ray: the last point is near the first, but what lies between is not."""
    line = np.array([[x, 0.] for x in [*range(10), *range(8, -1, -1)]])
    assert simplify(line, 0.5)[:, 0].max() >= 8.5


@pytest.mark.parametrize('tolerance', [0.3, 0.7, 1.5])
def test_nothing_moves_further_than_the_tolerance_allows(tolerance):
    lines = [walk(n, n) for n in (2, 3, 50, 200)]
    start = np.concatenate([[0], np.cumsum([len(line) for line in lines])])
    points, new = simplify_lines(np.concatenate(lines), start, np.zeros(4, dtype=bool), tolerance)
    for line, a, b in zip(lines, new, new[1:]):
        assert points[a].tolist() == line[0].tolist() and points[b - 1].tolist() == line[-1].tolist()
        # Once within the piece, and once more where its ends move to meet the neighbours.
        assert distance(line, points[a:b]).max() <= 2 * tolerance + 1e-9
        alone = simplify(line, tolerance)
        np.testing.assert_allclose(points[a:b], alone, atol=1e-9)


def test_few_pieces():
    """Hardly more than what a search over all chains of pieces finds."""
    found = needed = 0
    for seed in range(40):
        line = walk(30, seed)
        reach = straight_reach(line, np.array([0, 30]), 0.8, np.array([29]))
        fewest = [0] + [10 ** 6] * 29
        for i in range(30):
            for j in range(i + 1, reach[i] + 1):
                fewest[j] = min(fewest[j], fewest[i] + 1)
        found, needed = found + len(simplify(line, 0.8)) - 1, needed + fewest[-1]
    assert needed <= found <= 1.15 * needed


def test_corners_are_where_lines_of_best_fit_meet():
    """Middles of the sides of a rectangle, whose corner is no point of them."""
    line = np.array([*[[x + 0.5, 0.] for x in range(10)], *[[10., y + 0.5] for y in range(10)]])
    corner = simplify(line, 0.5)[1]
    assert np.abs(corner - [10, 0]).max() < 0.3


def test_a_loop_keeps_three_pieces():
    loop = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0.]])
    assert len(simplify(loop, 50., closed=True)) >= 4


def test_lines_turned_around():
    points, start = select_lines(
        np.arange(10).reshape(5, 2), np.array([0, 2, 5]), np.array([1, 1, 0]), np.array([True, False, False]))
    assert points[:, 0].tolist() == [4, 6, 8, 8, 6, 4, 2, 0] and start.tolist() == [0, 3, 6, 8]
