from __future__ import annotations

from itertools import pairwise

import numpy as np

from timm_spot.ops.regions.borders import OUTSIDE, find_borders
from timm_spot.ops.regions.mixing import subpixel_lines


def test_a_border_runs_where_the_colours_say():
    """A white picture, black from x = 3.25 on: pixel 3 is a quarter white."""
    pixels = np.zeros((6, 8, 3))
    pixels[:, :3], pixels[:, 3] = 255., 255 / 4
    labels = (np.arange(8) >= 3).astype(int) + np.zeros((6, 1), dtype=int)
    borders = find_borders(labels)
    points, start = subpixel_lines(borders, pixels, np.array([[255.] * 3, [0.] * 3]))
    inner, = np.flatnonzero(borders.left == 0)
    line = points[start[inner]:start[inner + 1]]
    assert sorted(line[[0, -1]].tolist()) == [[3, 0], [3, 6]]  # junctions stay
    np.testing.assert_allclose(line[1:-1, 0], 3.25)
    assert sorted(line[1:-1, 1]) == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    rest = np.concatenate([points[a:b] for i, (a, b) in enumerate(pairwise(start)) if i != inner])
    assert (np.isin(rest[:, 0], [0, 8]) | np.isin(rest[:, 1], [0, 6])).all()  # the frame does too


def test_either_way_around():
    pixels = np.zeros((4, 4, 3))
    pixels[:2], pixels[2] = 255., 255 * 0.4
    for top, bottom in ((0, 1), (1, 0)):
        labels = np.where(np.arange(4)[:, None] < 2, top, bottom) + np.zeros((1, 4), dtype=int)
        borders = find_borders(labels)
        colors = np.zeros((2, 3))
        colors[top] = 255.
        points, start = subpixel_lines(borders, pixels, colors)
        inner, = np.flatnonzero(borders.left == 0)
        np.testing.assert_allclose(points[start[inner] + 1:start[inner + 1] - 1, 1], 2.4)


def test_right_angles_are_points_and_steps_of_a_slope_are_not():
    pixels = np.zeros((12, 12, 3))
    labels = np.zeros((12, 12), dtype=int)
    labels[3:9, 2:8] = 1
    slope = (np.arange(12)[:, None] > np.arange(12)).astype(int)
    for made, expected in ((labels, [[2, 3], [2, 9], [8, 3], [8, 9]]), (slope, [])):
        borders = find_borders(made)
        points, start = subpixel_lines(borders, pixels, np.zeros((2, 3)))
        inner, = np.flatnonzero(borders.left == 0)
        line = points[start[inner]:start[inner + 1] - 1]
        line = line if borders.closed[inner] else line[1:]
        assert sorted(line[(line % 1 == 0).all(1)].tolist()) == expected


def test_right_angles_at_the_end_of_an_outer_border():
    """One side from a junction: a point where nothing is beside it, but not between two regions."""
    for rest, expected in ((OUTSIDE, [[2, 3], [8, 3]]), (0, [])):
        labels = np.full((12, 12), rest)
        labels[3:9, 2:8], labels[3, 2:8] = 1, 2
        borders = find_borders(labels)
        points, start = subpixel_lines(borders, np.zeros((12, 12, 3)), np.zeros((3, 3)))
        top, = np.flatnonzero((borders.left == rest) & (borders.right == 2))
        line = points[start[top] + 1:start[top + 1] - 1]
        assert sorted(line[(line % 1 == 0).all(1)].tolist()) == expected


def test_a_loop_moves_as_a_whole():
    """A square whose edges are a quarter pixel further out all around, its start too."""
    pixels = np.zeros((14, 14, 3))
    pixels[3:11, 3:11] = 255 / 4
    pixels[4:10, 4:10] = 255.
    labels = (pixels[..., 0] == 255.).astype(int)
    borders = find_borders(labels)
    points, start = subpixel_lines(borders, pixels, np.array([[0.] * 3, [255.] * 3]))
    inner, = np.flatnonzero(borders.left == 0)
    line = points[start[inner]:start[inner + 1]]
    assert line[0].tolist() == line[-1].tolist()
    assert line.min() == 3.75 and line.max() == 10.25 and np.isin(line, [3.75, 10.25]).any(1).all()
