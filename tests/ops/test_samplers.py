from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.spatial import cKDTree

import timm_spot
from timm_spot import sample_positions
from timm_spot.ops import lattice_shape, samplers
from timm_spot.ops.samplers import check_seed, derive_seed

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
    if name in ('uniform', 'gaussian', 'sobol'):
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


@pytest.mark.parametrize('name', ['isotropic', 'center', 'sobol'])
def test_no_two_tokens_share_a_point(name):
    for n_tokens in range(1, 301):
        positions = sample_positions(name, n_tokens, (224, 224), generator=generator(n_tokens))[0]
        assert len(positions.unique(dim=0)) == n_tokens


def test_isotropic_is_nearly_a_square_lattice():
    for n_tokens in range(4, 301):
        points = sample_positions('isotropic', n_tokens, (224, 224))[0].numpy()
        nearest = cKDTree(points).query(points, k=2)[0][:, 1] * n_tokens ** 0.5
        assert nearest.min() >= 0.8 and nearest.max() <= 1.2, n_tokens


def test_isotropic_by_hand():
    assert sample_positions('isotropic', 1, (50, 90))[0].tolist() == [[0.5, 0.5]]
    square = sample_positions('isotropic', 9, (64, 64))[0].view(3, 3, 2)
    torch.testing.assert_close(square[:, 0, 0], torch.tensor([1 / 6, 0.5, 5 / 6]))
    # 6 tokens on an image twice as wide as high: cells are as square as can be in 2 rows of 3.
    assert lattice_shape(sample_positions('isotropic', 6, (100, 200))) == (2, 3)
    assert lattice_shape(sample_positions('isotropic', 140, (160, 224))) == (10, 14)


def test_center_by_hand():
    # Offsets -0.25 and 0.25: 0.25 * (1 - exp(-1.5625)) = 0.197597.
    torch.testing.assert_close(
        sample_positions('center', 4, (64, 64))[0, :, 1], torch.tensor([0.302403, 0.697597, 0.302403, 0.697597]))


def test_gaussian_moments():
    positions = sample_positions('gaussian', 300, (64, 64), 300, generator=generator())
    # Standard deviation 1 / pi, clamped at 0.5 / (1 / pi) = 1.571 sigma: P(outside) = 0.1162.
    outside = ((positions == 0) | (positions == 1)).double().mean().item()
    assert outside == pytest.approx(0.1162, abs=0.003)
    assert positions.mean().item() == pytest.approx(0.5, abs=0.003)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), share=st.floats(0, 1), k=st.sampled_from([7, 8, 16]))
def test_grid_takes_distinct_patches(rows, columns, share, k):
    n_tokens = max(1, round(share * rows * columns))
    H, W = rows * k + k // 2, columns * k
    positions = sample_positions('grid', n_tokens, (H, W), window=k)[0].double()
    patch = positions * torch.tensor([H, W]) / k - 0.5
    torch.testing.assert_close(patch, patch.round(), rtol=0, atol=1e-3)
    patch = patch.round()
    assert patch.min() >= 0 and (patch[:, 0] < rows).all() and (patch[:, 1] < columns).all()
    assert len(patch.unique(dim=0)) == n_tokens


def test_grid_in_full_is_the_patch_grid():
    positions = sample_positions('grid', 196, (224, 224))[0].view(14, 14, 2)
    torch.testing.assert_close(positions[:, 0, 0], (torch.arange(14) + 0.5) / 14)
    assert lattice_shape(positions.view(1, -1, 2)) == (14, 14)
    assert lattice_shape(sample_positions('grid', 49, (224, 224))) == (7, 7)
    with pytest.raises(ValueError, match='n_tokens=197 exceeds the 14 x 14 patches'):
        sample_positions('grid', 197, (224, 224))


def test_golden_lattices():
    for key, expected in load_file(DATA / 'lattices.safetensors').items():
        name, size, n_tokens = key.split('/')
        size = tuple(map(int, size.split('x')))
        positions = sample_positions(name, int(n_tokens), size)[0]
        torch.testing.assert_close(positions, expected, rtol=0, atol=1e-6)


def test_authors_lattices_name_another_sampler_where_they_do_not_exist():
    with pytest.raises(ValueError, match=r"n_tokens=26 .*'grid_uniform' .* \(its lattice has .*'isotropic'"):
        sample_positions('grid_uniform', 26, (224, 224))
    with pytest.raises(ValueError, match="'center' takes any budget"):
        sample_positions('grid_center', 300, (32, 32))


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


def test_salient_shares_its_numbers_among_the_maps_of_one_draw():
    saliency = torch.rand(3, 8, 8, generator=generator())
    together = sample_positions('salient', 9, (8, 8), 1, saliency=saliency, generator=generator(5))
    for i in range(3):
        alone = sample_positions('salient', 9, (8, 8), 1, saliency=saliency[i], generator=generator(5))
        assert torch.equal(together[i], alone[0])


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
    (dict(batch_size=0), ValueError, 'batch_size=0'),
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
    with pytest.raises(ValueError, match=r"'short' returned shape \(3, 2\), expected \(1, 4, 2\)"):
        sample_positions('short', 4, (64, 64))


def test_lattice_shape_needs_a_lattice():
    lattice = sample_positions('isotropic', 12, (96, 128))
    assert lattice_shape(lattice) == (3, 4)
    assert lattice_shape(lattice.expand(2, -1, -1)) == (3, 4)
    assert lattice_shape(sample_positions('center', 12, (96, 128))) == (3, 4)
    assert lattice_shape(lattice.flip(1)) is None
    assert lattice_shape(torch.cat([lattice, lattice + 0.01])) is None
    assert lattice_shape(sample_positions('uniform', 12, (96, 128))) is None
    assert lattice_shape(sample_positions('isotropic', 11, (96, 128))) is None


def test_derived_seeds_are_the_same_everywhere():
    # What blake2b says of '0,1': the first 8 of its bytes, halved. Saved runs rely on these numbers.
    assert derive_seed(0, 1) == 1506311409109703068
    assert derive_seed(5) == 5019829476155378896
    code = 'from timm_spot.ops.samplers import derive_seed; print(derive_seed(2, 3, 4))'
    for hash_seed in ('0', '1'):
        environment = dict(os.environ, PYTHONHASHSEED=hash_seed)
        result = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True)
        assert int(result.stdout) == 6977576423788688297


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=3).map(tuple), unique=True, min_size=2, max_size=20))
def test_derived_seeds_differ_and_suit_a_generator(numbers):
    seeds = [derive_seed(*n) for n in numbers]
    assert len(set(seeds)) == len(seeds)  # by chance once in 2**54 tries
    for seed in seeds:
        check_seed(seed)
        torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('numbers', [(), (0.5,), ('1',)])
def test_derived_seeds_take_whole_numbers(numbers):
    with pytest.raises(TypeError):
        derive_seed(*numbers)


def test_seeds_are_refused_where_a_generator_refuses_them():
    for seed in (-2 ** 63, 2 ** 64 - 1):
        check_seed(seed)
        torch.Generator().manual_seed(seed)
    for seed in (2 ** 70, 2 ** 64, -2 ** 63 - 1):
        with pytest.raises(ValueError, match=rf'seed={seed} is out of range'):
            check_seed(seed)
    for seed in (1.5, True, '3'):
        with pytest.raises(TypeError, match='seed must be an int'):
            check_seed(seed)
