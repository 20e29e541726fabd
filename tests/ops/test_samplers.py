from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import timm_spot
from timm_spot import sample_positions
from timm_spot.ops import samplers

ANY_BUDGET = ('uniform', 'gaussian', 'sobol', 'isotropic', 'center')
SIZES = [(32, 32), (224, 224), (160, 224), (1024, 640), (48, 600)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('name', ANY_BUDGET)
@pytest.mark.parametrize('size', SIZES)
def test_every_budget_is_exact(name, size):
    for n_tokens in range(1, 301):
        for batch_size in (1, 7) if n_tokens % 25 == 0 else (2,):
            positions = sample_positions(name, n_tokens, size, batch_size, generator=generator(n_tokens))
            assert positions.shape == (batch_size, n_tokens, 2)
            assert positions.dtype == torch.float32
            assert positions.min() >= 0 and positions.max() <= 1


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(ANY_BUDGET), n_tokens=st.integers(1, 400), H=st.integers(1, 1200), W=st.integers(1, 1200),
    batch_size=st.integers(1, 3), seed=st.integers(0, 2 ** 40))
def test_draws_follow_the_generator(name, n_tokens, H, W, batch_size, seed):
    first = sample_positions(name, n_tokens, (H, W), batch_size, generator=generator(seed))
    again = sample_positions(name, n_tokens, (H, W), batch_size, generator=generator(seed))
    assert torch.equal(first, again)
    if name in ('uniform', 'gaussian', 'sobol') and n_tokens > 3:  # a few gaussian ones may share a corner, clamped
        other = sample_positions(name, n_tokens, (H, W), batch_size, generator=generator(seed + 1))
        assert not torch.equal(first, other)
        assert batch_size == 1 or not torch.equal(first[0], first[1])


def test_without_generator_torch_s_global_one_is_used():
    for name in ('uniform', 'gaussian', 'sobol'):
        torch.manual_seed(3)
        first = sample_positions(name, 5, (64, 64))
        assert not torch.equal(first, sample_positions(name, 5, (64, 64)))
        torch.manual_seed(3)
        assert torch.equal(first, sample_positions(name, 5, (64, 64)))


@pytest.mark.parametrize('name', ['salient', 'salient_sobol', 'salient_inverse'])
def test_salient_draws_follow_the_generator(name):
    saliency = torch.rand(8, 12, generator=generator(9))
    first, again, other = (
        sample_positions(name, 6, (8, 12), 2, saliency=saliency, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first[0], first[1])


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', timm_spot.list_samplers())
def test_draws_do_not_depend_on_torch_s_default_dtype_and_device(name, dtype):
    """Under bfloat16 `uniform` once drew other positions, off by up to 0.84 of the image."""
    arguments = dict(
        sampler=name, n_tokens=49, image_size=(224, 224), batch_size=2, saliency=torch.rand(224, 224))
    expected = sample_positions(generator=generator(3), **arguments)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(sample_positions(generator=generator(3), **arguments), expected)
    finally:
        torch.set_default_dtype(default)
    with torch.device('meta'):
        assert torch.equal(sample_positions(generator=generator(3), **arguments), expected)


@pytest.mark.parametrize('name', ['isotropic', 'center', 'sobol'])
def test_no_two_tokens_share_a_point(name):
    for n_tokens in range(1, 301):
        positions = sample_positions(name, n_tokens, (224, 224), generator=generator(n_tokens))[0]
        assert len(positions.unique(dim=0)) == n_tokens


def test_gaussian_moments():
    positions = sample_positions('gaussian', 300, (64, 64), 300, generator=generator())
    # Standard deviation 1 / pi, clamped at 0.5 / (1 / pi) = 1.571 sigma: P(outside) = 0.1162.
    outside = ((positions == 0) | (positions == 1)).double().mean().item()
    assert outside == pytest.approx(0.1162, abs=0.003)
    assert positions.mean().item() == pytest.approx(0.5, abs=0.003)


def test_salient_follows_the_map():
    saliency = torch.zeros(2, 4, 6)
    saliency[0, 1, 2] = 1.
    saliency[1, 3, 5] = 3.
    saliency[1, 0, 0] = 1.
    positions = sample_positions('salient', 4000, (4, 6), 2, saliency=saliency, generator=generator())
    pixels = (positions.double() * torch.tensor([4, 6])).floor().long()
    assert (pixels[0] == torch.tensor([1, 2])).all()
    corner = (pixels[1] == 0).all(dim=-1)
    assert (pixels[1][~corner] == torch.tensor([3, 5])).all()
    assert corner.double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_bins_are_inverted_by_hand():
    # Weights 1, 0, 3: a quarter of the shares falls into bin 0, the rest into bin 2, none onto an edge of a bin.
    bins, inside = samplers._invert(torch.tensor([1., 0., 3.]), torch.tensor([0., 0.125, 0.25, 0.625, 1.]))
    assert bins.tolist() == [0, 0, 2, 2, 2]
    torch.testing.assert_close(inside, torch.tensor([0.001, 0.5, 0.001, 0.5, 0.999]))


def test_salient_draws_at_the_edge_of_a_pixel_stay_inside_it(monkeypatch):
    """Shares of 0 and 1 land on the edges of the only pixel with weight: rounding once carried them over."""
    saliency = torch.zeros(3, 1000)
    saliency[1, 333] = 1.
    ends = torch.tensor([[[0., 0.], [1., 1.], [0., 1.], [1., 0.]]])
    monkeypatch.setattr(samplers, 'uniform', lambda *arguments: ends)
    positions = sample_positions('salient', 4, (3, 1000), saliency=saliency)[0]
    pixels = (positions * torch.tensor([3, 1000])).floor()  # in float32
    assert pixels.tolist() == [[1., 333.]] * 4


def test_salient_shares_its_numbers_among_the_maps_of_one_draw():
    saliency = torch.rand(3, 8, 8, generator=generator())
    together = sample_positions('salient', 9, (8, 8), 1, saliency=saliency, generator=generator(5))
    for i in range(3):
        alone = sample_positions('salient', 9, (8, 8), 1, saliency=saliency[i], generator=generator(5))
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-6)  # sums of another shape


@pytest.mark.parametrize('saliency, says', [
    (None, 'needs a saliency map'),
    (torch.zeros(8, 8), 'zero everywhere in map 0'),
    (torch.full((8, 8), float('nan')), 'NaN'),
    (-torch.ones(8, 8), 'must not be negative'),
    (torch.ones(8, 9), 'does not cover images of'),
    (torch.ones(3, 8, 8), 'does not match batch_size=2'),
])
def test_bad_saliency(saliency, says):
    with pytest.raises(ValueError, match=says):
        sample_positions('salient', 4, (8, 8), 2, saliency=saliency)


@pytest.mark.parametrize('kwargs, error, says', [
    (dict(sampler='isotopic'), ValueError, r"did you mean 'isotropic'\?.*center, gaussian, grid"),
    (dict(sampler=None), ValueError, 'the samplers are'),
    (dict(n_tokens=0), ValueError, 'n_tokens=0'),
    (dict(n_tokens=2.5), TypeError, 'n_tokens must be an int, got 2.5'),
    (dict(n_tokens=10 ** 12), ValueError, 'n_tokens=1000000000000 exceeds the 4096 pixels of an image of 64 x 64 px'),
    (dict(sampler='isotropic', n_tokens=2 ** 16 + 1), ValueError, 'n_tokens=65537 exceeds'),
    (dict(batch_size=0), ValueError, 'batch_size=0'),
    (dict(batch_size=2.), TypeError, 'batch_size must be an int, got 2.0'),
    (dict(batch_size=10 ** 12), ValueError, 'batch_size=1000000000000 placements of n_tokens=4 are more than'),
    (dict(sampler='grid', window=0), ValueError, 'window=0'),
    (dict(image_size=(64, float('nan'))), ValueError, 'image_size='),
    (dict(image_size=(64, 0)), ValueError, r'image_size=\(64, 0\)'),
])
def test_bad_arguments(kwargs, error, says):
    with pytest.raises(error, match=says):
        sample_positions(**{**dict(sampler='uniform', n_tokens=4, image_size=(64, 64)), **kwargs})


def test_gauss_is_gaussian():
    torch.testing.assert_close(
        sample_positions('gauss', 4, (64, 64), generator=generator()),
        sample_positions('gaussian', 4, (64, 64), generator=generator()))


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(samplers, '_SAMPLERS', dict(samplers._SAMPLERS))


def test_users_register_samplers(registry):
    @timm_spot.register_sampler('top_row')
    def top_row(n_tokens, batch_size, generator):
        x = torch.rand(batch_size, n_tokens, generator=generator)
        return torch.stack([torch.zeros_like(x), x], dim=-1)

    assert 'top_row' in timm_spot.list_samplers()
    assert sample_positions('top_row', 3, (64, 64), 2).shape == (2, 3, 2)
    with pytest.raises(ValueError, match="'top_row' is already a sampler"):
        timm_spot.register_sampler('top_row')
    with pytest.raises(ValueError, match='asks for temperature, but samplers are given n_tokens'):
        timm_spot.register_sampler('hot')(lambda temperature: None)
    timm_spot.register_sampler('short')(lambda n_tokens: torch.zeros(n_tokens - 1, 2))
    timm_spot.register_sampler('coarse')(lambda n_tokens: torch.zeros(n_tokens, 2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"'coarse' returned torch.bfloat16.*dtype=torch.float32"):
        sample_positions('coarse', 4, (64, 64))
    with pytest.raises(ValueError, match=r"'short' returned shape \(3, 2\), expected \(1, 4, 2\)"):
        sample_positions('short', 4, (64, 64))
