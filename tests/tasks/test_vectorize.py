from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
import torch
from dht_golden import load

import timm_spot


@pytest.fixture(scope='module')
def tokenizer():
    return timm_spot.RasterToVector().tokenizer


@pytest.mark.parametrize('patch_size', [16, 32])
def test_golden(tokenizer, patch_size):
    tensors, config = load('svg_48x48')
    svg, = timm_spot.vectorize(tensors['image'], tokenizer, config['target'], patch_size)
    assert svg.encode() == bytes(tensors[f'svg_utf8_patch{patch_size}'].tolist())


def test_well_formed_and_one_by_one(tokenizer):
    images = torch.randn(2, 3, 30, 41, generator=torch.Generator().manual_seed(0))
    texts = timm_spot.vectorize(images, tokenizer, patch_size=None)
    assert texts[1:] == timm_spot.vectorize(images[1:], tokenizer, patch_size=None)
    root = ET.fromstring(texts[0])
    assert root.attrib == dict(width='41', height='30')
    assert {child.tag.split('}')[1] for child in root} == {'path'}


NUMBER = r'-?\d+\.\d{3}'
PATH = re.compile(rf'M {NUMBER},{NUMBER}( C {NUMBER},{NUMBER} {NUMBER},{NUMBER} {NUMBER},{NUMBER})+ Z')
COLOR = re.compile(r'rgb\(\d{1,3},\d{1,3},\d{1,3}\)')
BOARD = ((torch.arange(12)[:, None] + torch.arange(12)) % 2).float().expand(1, 3, -1, -1)


@pytest.mark.parametrize('image', [
    torch.full((1, 3, 40, 40), 0.3), BOARD, 4 * BOARD - 2, torch.randn(1, 3, 1, 50), torch.randn(1, 3, 50, 1),
    torch.randn(1, 3, 1, 1), torch.randn(1, 3, 2, 3)], ids=lambda image: 'x'.join(map(str, image.shape[2:])))
def test_unusual_images_give_strict_svg(tokenizer, image):
    svg, = timm_spot.vectorize(image, tokenizer)
    root = ET.fromstring(svg)
    H, W = image.shape[-2:]
    assert root.attrib == dict(width=str(W), height=str(H))
    rects = [e.attrib for e in root if e.tag.endswith('rect')]
    assert sum(int(r['width']) * int(r['height']) for r in rects) == H * W  # the background leaves nothing out
    for path in (e.attrib for e in root if e.tag.endswith('path')):
        assert PATH.fullmatch(path['d']) and COLOR.fullmatch(path['fill']) and path['stroke'] == path['fill']
        x, y = torch.tensor([float(v) for v in re.findall(NUMBER, path['d'])]).view(-1, 2)[::3].T  # ends of the curves
        assert 0 <= x.min() and x.max() <= W and 0 <= y.min() and y.max() <= H


def test_what_lies_in_a_hole_is_painted_over_it(tokenizer):
    """A ring's outline is filled whole; the disc inside comes later in the file and stays visible."""
    y, x = torch.meshgrid(torch.arange(48) - 23.5, torch.arange(48) - 23.5, indexing='ij')
    radius = (y ** 2 + x ** 2).sqrt()
    image = torch.where((radius > 8) & (radius < 18), 2., -1.8).expand(1, 3, -1, -1)
    svg, = timm_spot.vectorize(image, tokenizer, patch_size=None)
    fills = [int(COLOR.search(line)[0][4:].split(',')[0]) for line in svg.splitlines() if line.startswith('<path')]
    ring, inside = fills.index(max(fills)), len(fills) - 1 - fills[::-1].index(min(fills))
    assert ring < inside


def test_options(tokenizer):
    image = load('svg_48x48')[0]['image']
    curves = {
        key: timm_spot.vectorize(image, tokenizer, **dict(key))[0].count(' C ')
        for key in ((), (('tolerance', 1.),), (('smoothing', 3),), (('target', 12),))}
    default = curves[()]
    assert curves[(('tolerance', 1.),)] < default and curves[(('smoothing', 3),)] < default
    assert curves[(('target', 12),)] < default
    assert 'stroke-width="0.5"' in timm_spot.vectorize(image, tokenizer, stroke=0.5)[0]


def test_long_borders_stay_where_they_are(tokenizer):
    """The cut corner of a long edge: a square of 40 px keeps its corners within two pixels."""
    image = torch.full((1, 3, 64, 64), -1.8)
    image[..., 12:52, 12:52] = 2.
    reach = {}
    for longest in (None, 4.):
        svg, = timm_spot.vectorize(image, tokenizer, smoothing=1, longest_edge=longest)
        square = max((line for line in svg.splitlines() if line.startswith('<path')), key=brightness)
        reach[longest] = min(
            abs(float(y) - 12) + abs(float(x) - 12) for x, y in re.findall(rf'({NUMBER}),({NUMBER})', square))
    assert reach[4.] < 2 < 4 < reach[None]


def brightness(line):
    return sum(map(int, re.findall(r'\d+', COLOR.search(line)[0])))


def test_the_model_draws_near_the_picture():
    image = load('svg_48x48')[0]['image']
    model = timm_spot.RasterToVector()
    assert model(image) == timm_spot.vectorize(image, model.tokenizer, smoothing=1, stroke=0.5, longest_edge=4.)
    assert 'stroke-width="1.0"' in timm_spot.RasterToVector(stroke=1.)(image)[0]


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize('name, value', [
    *(('smoothing', v) for v in (0, 9, 50, 1.5, NAN)), *(('patch_size', v) for v in (0, 2.5, NAN, INF)),
    *(('tolerance', v) for v in (-1, 1e6, NAN, INF)), *(('stroke', v) for v in (-1, 1e6, NAN, INF)),
    *(('longest_edge', v) for v in (0., -1, 1e-9, NAN, -INF)), *(('target', v) for v in (0, 2.5, NAN))])
def test_options_out_of_their_ranges_are_refused_before_work(name, value, monkeypatch):
    with pytest.raises(ValueError, match=f'{name}={value} must'):
        timm_spot.RasterToVector(**{name: value})
    model = timm_spot.RasterToVector()
    monkeypatch.setattr(model.tokenizer, 'forward', None)  # no region is looked for
    with pytest.raises(ValueError, match=f'{name}={value} must'):
        timm_spot.vectorize(torch.zeros(1, 3, 8, 8), model.tokenizer, **{name: value})


def test_unknown_options_are_refused_before_work():
    with pytest.raises(TypeError, match='smothing'):
        timm_spot.RasterToVector(smothing=2)


def test_options_that_leave_no_outline_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r'longest_edge=0.5 with tolerance=0.1 .* 2 / 8 = 0.031'):
        timm_spot.vectorize(torch.zeros(1, 3, 8, 8), tokenizer, longest_edge=0.5)
    square = torch.full((1, 3, 40, 40), 0.3)
    # Twice the triangle at a corner is 40 * 40 square px at first, an eighth after each rounding: 0.39 after four.
    assert timm_spot.vectorize(square, tokenizer, smoothing=4)[0].count('<path') == 1
    with pytest.raises(ValueError, match=r'smoothing=5 with tolerance=0.1 leaves nothing .* 40 x 40 px'):
        timm_spot.vectorize(square, tokenizer, smoothing=5)
    # By the authors' own settings single pixels leave the background only, as in their code.
    assert timm_spot.vectorize(square[..., :1, :1], tokenizer)[0].count('<path') == 0


def test_edges_left_whole(tokenizer):
    image = load('svg_48x48')[0]['image']
    assert timm_spot.vectorize(image, tokenizer, longest_edge=INF) == timm_spot.vectorize(image, tokenizer)
