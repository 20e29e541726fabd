"""Spectral residual, and the priors that draw from a map."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare

import timm_spot
from timm_spot.ops import spectral_residual

PRIORS = ('salient', 'salient_sobol', 'salient_inverse')


def read_photo(name: str) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    with Image.open(Path(__file__).parents[2] / 'examples' / 'photos' / name) as photo:
        return torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255


def squares(height: int = 64, width: int = 64) -> torch.Tensor:
    """Map with weight 1 on rows 8-15 of columns 16-23, weight 3 on rows 40-47 of columns 0-7, zero elsewhere."""
    saliency = torch.zeros(1, height, width)
    saliency[:, 8:16, 16:24] = 1.
    saliency[:, 40:48, 0:8] = 3.
    return saliency


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 4), st.integers(0, 2 ** 31))
def test_spectral_residual_is_a_distribution_at_any_size(height, width, channels, seed):
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed))
    maps = spectral_residual(images)
    assert maps.shape == (2, height, width) and maps.dtype == torch.float32
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(2))


def test_spectral_residual_follows_the_formula():
    """Against NumPy, term by term, on an image that needs no resizing."""
    image = np.random.default_rng(0).random((20, 30)).astype(np.float32)
    x = np.pad(image.astype(np.float64) - image.mean(dtype=np.float64), ((0, 20), (0, 30)), mode='symmetric')
    spectrum = np.fft.fft2(x)
    amplitude = np.abs(spectrum) + 0.05 * np.abs(spectrum).mean()
    average = sum(np.roll(np.log(amplitude), (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
    energy = np.abs(np.fft.ifft2(np.exp(np.log(amplitude) - average) * spectrum / amplitude))[:20, :30] ** 2
    expected = np.zeros((20, 30))
    for i in range(20):
        for j in range(30):
            weight = np.exp(-((np.arange(20)[:, None] - i) ** 2 + (np.arange(30) - j) ** 2) / (2 * 2.5 ** 2))
            expected[i, j] = (weight * energy).sum() / weight.sum()
    saliency = spectral_residual(torch.from_numpy(image)[None, None])[0]
    torch.testing.assert_close(saliency, torch.from_numpy(expected / expected.sum()).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize('top, left, side', [(5, 40, 8), (50, 3, 5), (30, 30, 3)])
def test_spectral_residual_finds_the_odd_one_out(top, left, side):
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, top:top + side, left:left + side] = 1.
    y, x = divmod(spectral_residual(image).argmax().item(), 64)
    assert top - 2 <= y < top + side + 2 and left - 2 <= x < left + side + 2


def test_spectral_residual_of_a_photograph_prefers_the_cyclist():
    saliency = spectral_residual(read_photo('cowbike.jpg'))[0]
    cyclist = saliency[160:480, 260:400].mean()
    assert cyclist > 2 * saliency.mean()


@pytest.mark.parametrize('value', [0., 0.3, -7e3])
def test_an_image_without_structure_is_salient_everywhere_alike(value):
    torch.testing.assert_close(spectral_residual(torch.full((1, 3, 40, 70), value)), torch.full((1, 40, 70), 1 / 2800))


def test_spectral_residual_ignores_normalisation_and_neighbours():
    photo, other = read_photo('cowbike.jpg'), read_photo('oldkitchen.jpg')
    saliency = spectral_residual(photo)
    tolerance = dict(rtol=1e-4, atol=1e-10)
    torch.testing.assert_close(spectral_residual((photo - 0.5) / 0.25), saliency, **tolerance)
    torch.testing.assert_close(spectral_residual(torch.cat([other, photo]))[1:], saliency, **tolerance)
    torch.testing.assert_close(spectral_residual((photo * 255).round().byte()), saliency, rtol=1e-3, atol=1e-8)


def test_spectral_residual_keeps_its_precision_under_autocast():
    photo = read_photo('cowbike.jpg')
    with torch.autocast('cpu', torch.bfloat16):
        saliency = spectral_residual(photo)
    assert saliency.dtype == torch.float32
    torch.testing.assert_close(saliency, spectral_residual(photo))


def test_spectral_residual_refuses_what_is_no_image():
    with pytest.raises(TypeError, match='images must be a tensor'):
        spectral_residual(np.zeros((1, 3, 8, 8)))
    with pytest.raises(ValueError, match=r'\(B, C, H, W\), got \(3, 8, 8\)'):
        spectral_residual(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match='NaN'):
        spectral_residual(torch.full((1, 1, 8, 8), math.nan))


@pytest.mark.parametrize('prior, weights', [
    ('salient', [[1., 2., 0.], [0., 4., 3.]]),
    ('salient_sobol', [[1., 2., 0.], [0., 4., 3.]]),
    ('salient_inverse', [[3., 2., 4.], [4., 0., 1.]]),  # the largest value, 4, minus the map
])
def test_20000_draws_follow_the_map(prior, weights):
    saliency = torch.tensor([[[1., 2., 0.], [0., 4., 3.]]])
    generator = torch.Generator().manual_seed(0)
    positions = timm_spot.sample_positions(prior, 20_000, (2, 3), saliency=saliency, generator=generator)[0]
    y, x = (positions * torch.tensor([2, 3])).floor().long().unbind(dim=-1)
    counts = torch.bincount(y * 3 + x, minlength=6)
    expected = torch.tensor(weights).double().flatten() / torch.tensor(weights).sum() * 20_000
    assert (counts[expected == 0] == 0).all()
    assert chisquare(counts[expected > 0].double(), expected[expected > 0]).pvalue > 0.01


def test_20000_draws_follow_the_map_of_a_photograph():
    saliency = spectral_residual(read_photo('cowbike.jpg'))
    generator = torch.Generator().manual_seed(0)
    positions = timm_spot.sample_positions('salient', 20_000, (512, 512), saliency=saliency, generator=generator)[0]
    block = (positions * 8).floor().long()
    counts = torch.bincount(block[:, 0] * 8 + block[:, 1], minlength=64).double()
    expected = saliency[0].double().unflatten(0, (8, 64)).unflatten(2, (8, 64)).sum(dim=(1, 3)).flatten()
    assert (expected * 20_000 > 5).all()
    assert chisquare(counts, expected / expected.sum() * 20_000).pvalue > 0.01


def test_draws_are_jittered_inside_their_pixel():
    saliency = torch.zeros(1, 4, 4)
    saliency[0, 2, 1] = 1.
    generator = torch.Generator().manual_seed(0)
    positions = timm_spot.sample_positions('salient', 20_000, (4, 4), saliency=saliency, generator=generator)[0]
    inside = positions * 4 - torch.tensor([2., 1.])
    assert (inside > 0).all() and (inside < 1).all()
    counts = torch.bincount((inside * 10).long()[:, 0] * 10 + (inside * 10).long()[:, 1], minlength=100)
    assert chisquare(counts.double()).pvalue > 0.01


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PRIORS), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2 ** 31))
def test_any_budget_falls_on_positive_weight(prior, n_tokens, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(2, height, width, generator=generator)
    saliency[torch.rand(2, height, width, generator=generator) < 0.8] = 0.
    saliency[:, -1, -1] += 1e-6  # no map is zero everywhere
    positions = timm_spot.sample_positions(
        prior, n_tokens, (height, width), batch_size=2, saliency=saliency, generator=generator)
    assert positions.shape == (2, n_tokens, 2)
    if prior == 'salient_inverse':
        saliency = saliency.amax(dim=(1, 2), keepdim=True) - saliency
        saliency[saliency.sum(dim=(1, 2)) == 0] = 1.
    pixel = (positions.double() * torch.tensor([height, width])).floor().long()
    assert (saliency[torch.arange(2)[:, None], pixel[..., 0], pixel[..., 1]] > 0).all()


@pytest.mark.parametrize('prior', PRIORS)
def test_a_constant_map_gives_uniform_coverage(prior):
    generator = torch.Generator().manual_seed(1)
    positions = timm_spot.sample_positions(
        prior, 20_000, (32, 48), saliency=torch.full((32, 48), 0.25), generator=generator)[0]
    counts = torch.bincount((positions * 8).long()[:, 0] * 8 + (positions * 8).long()[:, 1], minlength=64)
    assert chisquare(counts.double()).pvalue > 0.01


def test_low_discrepancy_draws_are_sobol_points_carried_to_the_map():
    size = (1000, 1000)
    positions, sobol = (
        timm_spot.sample_positions(
            name, 32, size, saliency=torch.ones(size), generator=torch.Generator().manual_seed(3))
        for name in ('salient_sobol', 'sobol'))
    torch.testing.assert_close(positions, sobol, rtol=0, atol=1e-5)


def test_low_discrepancy_draws_crowd_less():
    """64 tokens on two squares of weight 1 : 3 are 16 and 48, to within one; independent draws vary."""
    def count_upper(prior: str, seed: int) -> int:
        generator = torch.Generator().manual_seed(seed)
        positions = timm_spot.sample_positions(prior, 64, (64, 64), saliency=squares(), generator=generator)
        return (positions[0, :, 0] < 0.5).sum().item()

    assert all(abs(count_upper('salient_sobol', seed) - 16) <= 1 for seed in range(20))
    assert any(abs(count_upper('salient', seed) - 16) > 1 for seed in range(20))


def test_options_are_the_names():
    for name, options in (('salient_sobol', dict(spread=True)), ('salient_inverse', dict(inverse=True))):
        by_name, by_option = (
            timm_spot.sample_positions(
                sampler, 25, (64, 64), saliency=squares(), generator=torch.Generator().manual_seed(0), **keywords)
            for sampler, keywords in ((name, {}), ('salient', options)))
        assert torch.equal(by_name, by_option)
    with pytest.raises(TypeError, match='inverse'):
        timm_spot.sample_positions('uniform', 25, (64, 64), inverse=True)


@pytest.mark.parametrize('saliency, error, match', [
    (None, ValueError, 'needs a saliency map'),
    (np.ones((64, 64)), TypeError, 'must be a tensor'),
    (torch.zeros(64, 64), ValueError, 'zero everywhere in map 0'),
    (-torch.ones(64, 64), ValueError, 'must not be negative, its smallest value is -1'),
    (torch.full((64, 64), math.nan), ValueError, 'NaN'),
    (torch.ones(32, 64), ValueError, r'\(1, 32, 64\) does not cover images of \(64, 64\)'),
])
@pytest.mark.parametrize('prior', PRIORS)
def test_a_wrong_map_is_refused_with_its_reason(prior, saliency, error, match):
    with pytest.raises(error, match=match):
        timm_spot.sample_positions(prior, 9, (64, 64), saliency=saliency)
