from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot.tasks.vectors.text import hex_colors, ring_paths, svg_document


def read(path):
    """The rings of path data, by the grammar of SVG: what a viewer makes of them."""
    rings, pen, start = [], (0, 0), (0, 0)
    for command, numbers in re.findall(r'([mlhvz])([^mlhvz]*)', path):
        values = [int(v) for v in re.findall(r'-?\d+', numbers)]
        if command == 'z':
            pen = start
            continue
        width = dict(m=2, l=2, h=1, v=1)[command]
        assert values and len(values) % width == 0
        for i in range(0, len(values), width):
            x, y = values[i:i + 2] if width == 2 else (values[i], 0) if command == 'h' else (0, values[i])
            pen = pen[0] + x, pen[1] + y
            if command == 'm' and i == 0:
                start = pen
                rings.append([])
            rings[-1].append(pen)
    return rings


def area(ring):
    (x, y), (u, v) = np.array(ring).T, np.roll(ring, -1, axis=0).T
    return (x * v - u * y).sum() / 2


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(-9, 12), st.integers(-9, 12)), min_size=3, max_size=7),
                min_size=1, max_size=6), st.integers(1, 3))
def test_a_viewer_reads_the_same_rings(rings, per_owner):
    length = [len(r) for r in rings]
    ring = np.repeat(np.arange(len(rings)), length)
    texts = ring_paths(ring // per_owner, ring, np.concatenate([np.array(r) for r in rings]))
    seen = [r for text in texts for r in read(text)]
    # Points that repeat or lie straight are left out, with them rings of no area at all.
    areas = [a for a in map(area, rings) if a]
    assert [a for a in map(area, seen) if a] == areas
    assert all(re.fullmatch(r'[-mlhvz\d ]+', text) and '  ' not in text for text in texts)


def test_numbers_are_set_close():
    ring = np.array([[10, 10], [12, 9], [15, 20], [15, 30], [4, 30], [2, 31]])
    assert ring_paths(np.zeros(6), np.zeros(6), ring) == ['m10 10 2-1 3 11v10h-11l-2 1z']


def test_a_hole_counts_from_where_the_ring_before_began():
    square = np.array([[0, 0], [9, 0], [9, 9], [0, 9]])
    points, ring = np.concatenate([square, square // 3 + 3, square + 20]), np.repeat([0, 1, 2], 4)
    assert ring_paths(ring // 2, ring, points) == ['m0 0h9v9h-9zm3 3h3v3h-3z', 'm20 20h9v9h-9z']


def test_no_points_no_text():
    assert ring_paths(np.zeros(0), np.zeros(0), np.zeros((0, 2), dtype=int)) == []


def test_colors():
    assert hex_colors(np.array([[255, 254.6, 0], [16.4, 0, -3], [170, 187, 204]])) == ['#ff0', '#100000', '#abc']


def test_titles_are_escaped():
    root = ET.fromstring(svg_document(['m0 0h1v1z'], ['#fff'], (3, 2), 4, '<a> & "b"'))
    assert root.attrib == dict(width='3', height='2', viewBox='0 0 12 8')
    assert root[0].text == '<a> & "b"' and root[1].attrib == dict(fill='#fff', d='m0 0h1v1z')


def test_curves():
    """Two control points in a row mirror each other at the point between: the second curve needs no control point."""
    points = np.array([[0, 0], [4, 0], [8, 4], [8, 10], [20, 10], [20, 20]])
    control = np.array([False, True, True, False, False, True])
    # From (0, 0) by (4, 0) to (6, 2), by (8, 4) to (8, 10), a line, and by (20, 20) back.
    text, = ring_paths(np.zeros(6), np.zeros(6), points, control)
    assert text == 'm0 0q4 0 6 2t2 8h12q0 10-20-10z'


def test_what_is_straight_beside_a_curve_stays():
    points = np.array([[0, 0], [4, 0], [8, 0], [12, 0], [12, 12]])
    assert ring_paths(np.zeros(5), np.zeros(5), points, np.arange(5) == 2) == ['m0 0h4q4 0 8 0v12z']
    assert ring_paths(np.zeros(5), np.zeros(5), points) == ['m0 0h12v12z']
