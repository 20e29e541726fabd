"""Pictures of regions."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import timm_spot

pytestmark = pytest.mark.usefixtures('default_style')

REGIONS = torch.tensor([[4, 4, 4], [4, 4, 7], [4, 7, 7]])


def test_borders_of_regions():
    ax = timm_spot.draw_regions(np.zeros((3, 3), np.uint8), REGIONS)
    drawn = ax.get_images()[0].get_array()
    # A border is the first pixel of the next region, to the right or below.
    assert (drawn.sum(-1) > 0).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert ax.get_title() == '2 regions'


def test_means_of_regions():
    picture = torch.tensor([[0., 0., 0.], [0., 0.6, 0.], [0., 0.3, 0.9]])[None]
    ax = timm_spot.draw_region_means(picture, REGIONS)
    drawn = ax.get_images()[0].get_array()[..., 0]
    np.testing.assert_allclose(drawn, [[0.1, 0.1, 0.1], [0.1, 0.1, 0.4], [0.1, 0.4, 0.4]], atol=1e-6)
    error = (5 * 0.1 ** 2 + 0.5 ** 2 + 0.4 ** 2 + 0.1 ** 2 + 0.5 ** 2) / 9
    assert ax.get_title() == f'2 means, PSNR {-10 * math.log10(error):.1f} dB'
    assert 'PSNR ∞ dB' in timm_spot.draw_region_means(torch.zeros(3, 3, 3), REGIONS).get_title()


def test_levels_of_a_hierarchy():
    axes = timm_spot.draw_hierarchy(torch.rand(3, 3, 3), [REGIONS, torch.zeros(3, 3, dtype=torch.long)])
    assert [[ax.get_title().split(',')[0] for ax in row] for row in axes] == [
        ['2 regions', '1 regions'], ['2 means', '1 means']]
    with pytest.raises(ValueError, match='levels is empty'):
        timm_spot.draw_hierarchy(torch.rand(3, 1, 1), [])
    with pytest.raises(ValueError, match=r'segmentation of shape \(3, 3\) must match the image, \(4, 3\)'):
        timm_spot.draw_regions(torch.rand(3, 4, 3), REGIONS)
