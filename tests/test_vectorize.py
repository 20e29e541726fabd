from __future__ import annotations

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


def test_options(tokenizer):
    image = load('svg_48x48')[0]['image']
    curves = {
        key: timm_spot.vectorize(image, tokenizer, **dict(key))[0].count(' C ')
        for key in ((), (('tolerance', 1.),), (('smoothing', 3),), (('target', 12),))}
    default = curves[()]
    assert curves[(('tolerance', 1.),)] < default and curves[(('smoothing', 3),)] < default
    assert curves[(('target', 12),)] < default
    assert 'stroke-width="0.5"' in timm_spot.vectorize(image, tokenizer, stroke=0.5)[0]


@pytest.mark.parametrize('options, match', [
    (dict(smoothing=0), 'smoothing=0'), (dict(patch_size=0), 'patch_size=0'), (dict(tolerance=-1), 'tolerance=-1'),
    (dict(target=0), 'target=0')])
def test_wrong_options(tokenizer, options, match):
    with pytest.raises(ValueError, match=match):
        timm_spot.vectorize(torch.zeros(1, 3, 8, 8), tokenizer, **options)
