"""Spectral residual, energy, and the priors that draw from a map."""
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
from timm_spot.ops import energy, sample_placement, spectral_residual

PRIORS = ('salient', 'salient_sobol', 'salient_inverse')
MAPS = (spectral_residual, energy)


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


@pytest.mark.parametrize('saliency', MAPS)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 4), st.integers(0, 2 ** 31))
def test_a_map_is_a_distribution_at_any_size(saliency, height, width, channels, seed):
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed))
    maps = saliency(images)
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


def test_energy_follows_the_formula():
    """Against NumPy, term by term, on an image that needs no resizing."""
    image = np.random.default_rng(0).random((3, 20, 30)).astype(np.float32)

    def blur(x, sigma):
        out = np.zeros_like(x, dtype=float)
        for i in range(20):
            for j in range(30):
                weight = np.exp(
                    -((np.arange(20)[:, None] - i) ** 2 + (np.arange(30) - j) ** 2) / (2 * sigma ** 2))
                out[..., i, j] = (weight * x).sum(axis=(-2, -1)) / weight.sum()
        return out

    expected = blur(((image - blur(image, 6.)) ** 2).mean(axis=0), 2.5)
    saliency = energy(torch.from_numpy(image)[None])[0]
    torch.testing.assert_close(saliency, torch.from_numpy(expected / expected.sum()).float(), rtol=1e-4, atol=0)


def test_energy_sees_colours_that_grey_does_not():
    image = torch.zeros(1, 3, 64, 64)
    image[:, 0, 20:26, 40:46], image[:, 1, 20:26, 40:46] = 0.5, -0.5
    y, x = divmod(energy(image).argmax().item(), 64)
    assert 20 <= y < 26 and 40 <= x < 46


@pytest.mark.parametrize('saliency', MAPS)
@pytest.mark.parametrize('top, left, side', [(5, 40, 8), (50, 3, 5), (30, 30, 3)])
def test_a_map_finds_the_odd_one_out(saliency, top, left, side):
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, top:top + side, left:left + side] = 1.
    y, x = divmod(saliency(image).argmax().item(), 64)
    assert top - 2 <= y < top + side + 2 and left - 2 <= x < left + side + 2


def test_spectral_residual_of_a_photograph_prefers_the_cyclist():
    saliency = spectral_residual(read_photo('cowbike.jpg'))[0]
    cyclist = saliency[160:480, 260:400].mean()
    assert cyclist > 2 * saliency.mean()


@pytest.mark.parametrize('saliency', MAPS)
@pytest.mark.parametrize('value', [0., 0.3, -7e3])
def test_an_image_without_structure_is_salient_everywhere_alike(saliency, value):
    torch.testing.assert_close(saliency(torch.full((1, 3, 40, 70), value)), torch.full((1, 40, 70), 1 / 2800))


@pytest.mark.parametrize('saliency', MAPS)
def test_a_map_ignores_normalisation_and_neighbours(saliency):
    photo, other = read_photo('cowbike.jpg'), read_photo('oldkitchen.jpg')
    expected = saliency(photo)
    tolerance = dict(rtol=1e-4, atol=1e-10)
    torch.testing.assert_close(saliency((photo - 0.5) / 0.25), expected, **tolerance)
    torch.testing.assert_close(saliency(torch.cat([other, photo]))[1:], expected, **tolerance)
    torch.testing.assert_close(saliency((photo * 255).round().byte()), expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize('saliency', MAPS)
def test_a_map_keeps_its_precision_under_autocast(saliency):
    photo = read_photo('cowbike.jpg')
    with torch.autocast('cpu', torch.bfloat16):
        maps = saliency(photo)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, saliency(photo))


@pytest.mark.parametrize('saliency', MAPS)
def test_what_is_no_image_is_refused(saliency):
    with pytest.raises(TypeError, match='images must be a tensor'):
        saliency(np.zeros((1, 3, 8, 8)))
    with pytest.raises(ValueError, match=r'\(B, C, H, W\), got \(3, 8, 8\)'):
        saliency(torch.zeros(3, 8, 8))
    images = torch.zeros(3, 1, 8, 8)
    images[1, 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match=r'hold NaN or infinity, first in image 1\.'):
        saliency(images)


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


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 1000), st.sampled_from([(64, 64), (32, 1024), (224, 160)]), st.floats(0.1, 4), st.floats(0, 1),
    st.integers(0, 2 ** 31))
def test_the_lattice_of_any_map_has_its_budget_inside_the_image(n_tokens, size, power, floor, seed):
    maps = torch.rand(2, *size, generator=torch.Generator().manual_seed(seed))
    maps[1] = 0.
    maps[1, 7, 11] = 1.  # one bright pixel
    positions = timm_spot.sample_positions('salient_lattice', n_tokens, size, 2, maps, power=power, floor=floor)
    assert positions.shape == (2, n_tokens, 2) and positions.dtype == torch.float32
    assert positions.isfinite().all() and (positions >= 0).all() and (positions <= 1).all()


def test_the_lattice_of_a_constant_map_is_the_even_one():
    for size in ((64, 64), (32, 1024)):
        torch.testing.assert_close(
            timm_spot.sample_positions('salient_lattice', 26, size, saliency=torch.full(size, 0.3)),
            timm_spot.sample_positions('isotropic', 26, size))


def test_the_lattice_gathers_at_one_bright_pixel():
    size, maps = (64, 48), torch.zeros(64, 48)
    maps[40, 12] = 5.
    bright = torch.tensor([40.5 / 64, 12.5 / 48])

    def share(**options):
        placed = timm_spot.sample_positions('salient_lattice', 100, size, saliency=maps, **options)[0]
        return ((placed - bright).abs() * torch.tensor(size) < 1).all(dim=1).float().mean().item()

    assert share(floor=0.) == 1.
    assert 0.6 < share(floor=0.3) < 0.8 and share(floor=1.) <= 0.01
    with pytest.raises(ValueError, match=r'power=0 must be positive'):
        share(power=0)
    with pytest.raises(ValueError, match=r'floor=1.5 must lie in \[0, 1\]'):
        share(floor=1.5)


def test_the_lattice_of_squares_shares_its_tokens_as_they_weigh():
    """64 tokens on two squares of weight 1 : 3, and 1 : 9 when squared."""
    for power, above in ((1., 16), (2., 6.4)):
        positions = timm_spot.sample_positions(
            'salient_lattice', 64, (64, 64), saliency=squares(), power=power, floor=0.)
        assert abs((positions[0, :, 0] < 0.5).sum().item() - above) <= 8  # a row of tokens


def test_coverage_of_a_salient_lattice_is_the_stretch_of_its_map():
    maps = torch.ones(64, 64)
    maps[16:48, 16:48] = 20.
    placement = sample_placement('salient_lattice', 64, (64, 64), saliency=maps, window=8, coverage=1.)[0]
    assert placement[:, 2:].amin() < 1. and placement[:, 2:].amax() > 2.
    inside = ((placement[:, :2] > 0.3) & (placement[:, :2] < 0.7)).all(dim=1)
    assert placement[inside, 2:].mean() < placement[~inside, 2:].mean()


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
@pytest.mark.parametrize('prior', [*PRIORS, 'salient_lattice'])
def test_a_wrong_map_is_refused_with_its_reason(prior, saliency, error, match):
    with pytest.raises(error, match=match):
        timm_spot.sample_positions(prior, 9, (64, 64), saliency=saliency)
