from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import timm_spot
from timm_spot.models.placement import SampledPlacer, get_placer, list_placers, register_placer
from timm_spot.models.prior import Prior


def make_placer(**fields):
    """A placer whose two priors are equal, in eval mode."""
    prior = Prior(**{'window': 8, **fields})
    return SampledPlacer(prior, prior).eval()


def test_budget_follows_the_image_unless_given():
    placer = make_placer()
    assert placer.budget((64, 64)) == 64 and placer.budget((48, 81)) == 60
    assert placer(torch.rand(1, 3, 48, 81)).shape == (1, 60, 2)
    placer = placer.replaced(n_tokens=7)
    assert placer.budget((64, 64)) == 7
    assert placer(torch.rand(2, 3, 48, 81)).shape == (2, 7, 2)


def test_eval_placement_is_one_draw_for_all():
    placer = make_placer(n_tokens=5, sampler='uniform')
    images = torch.rand(3, 3, 32, 40)
    placement = placer(images)
    assert torch.equal(placement[0], placement[1])
    assert torch.equal(placement, placer(images))
    assert torch.equal(placement[:1], placer(images[2:]))
    assert not torch.equal(placement, placer.replaced(seed=1)(images))


@pytest.mark.parametrize('sampler', ['uniform', 'gaussian', 'sobol'])
def test_train_placement_is_drawn_anew(sampler):
    placer = make_placer(n_tokens=5, sampler=sampler).train()
    images = torch.rand(2, 3, 32, 32)
    torch.manual_seed(0)
    first = placer(images)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, placer(images))
    torch.manual_seed(0)
    assert torch.equal(first, placer(images))


def test_placement_is_what_sample_positions_draws():
    placer = make_placer(n_tokens=5, sampler='sobol', seed=3)
    expected = timm_spot.sample_positions('sobol', 5, (32, 40), generator=torch.Generator().manual_seed(3))
    assert torch.equal(placer(torch.rand(1, 3, 32, 40)), expected)


def test_placement_drawn_in_inference_mode_serves_training():
    placer, weight = make_placer(n_tokens=11), torch.ones(1, requires_grad=True)
    with torch.inference_mode():
        placer(torch.rand(1, 3, 33, 35))
    (placer(torch.rand(1, 3, 33, 35)) * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_another_default_dtype_leaves_no_trace(dtype):
    """A placement drawn under it once stayed in the cache, wrong for the life of the process."""
    placer, images = make_placer(n_tokens=31, sampler='uniform', seed=int(dtype.itemsize)), torch.rand(1, 3, 32, 32)
    expected = timm_spot.sample_positions(
        'uniform', 31, (32, 32), generator=torch.Generator().manual_seed(int(dtype.itemsize)))
    try:
        torch.set_default_dtype(dtype)
        during = placer(images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(placer(images), expected)
    assert during.dtype == torch.float32


def test_a_default_device_leaves_no_trace():
    placer, images = make_placer(n_tokens=13, sampler='uniform'), torch.rand(1, 3, 32, 32)
    with torch.device('meta'):
        during = placer(images)
    assert not during.is_meta and torch.equal(during, placer(images))


def test_changing_a_placement_in_place_moves_nobody_else():
    placer, images = make_placer(n_tokens=5), torch.rand(1, 3, 32, 32)
    expected = placer(images).clone()
    placer(images).add_(1)
    assert torch.equal(placer(images), expected)


def test_saliency_by_map_by_function_and_by_name():
    maps = torch.zeros(2, 32, 32)
    maps[0, 3, 4] = maps[1, 20, 30] = 1
    images = torch.rand(2, 3, 32, 32)
    pixels = (make_placer(n_tokens=6, sampler='salient', saliency=maps)(images) * 32).floor()
    assert (pixels[0] == torch.tensor([3., 4.])).all() and (pixels[1] == torch.tensor([20., 30.])).all()

    placer = make_placer(n_tokens=6, sampler='salient', saliency=lambda x: x.mean(dim=1))
    together = placer(images)
    torch.testing.assert_close(together[1:], placer(images[1:]), rtol=0, atol=1e-6)  # sums over other shapes
    assert not torch.equal(placer.train()(images), together)
    placer = make_placer(n_tokens=6, sampler='salient', saliency='spectral_residual')
    torch.testing.assert_close(placer(images)[1:], placer(images[1:]), rtol=0, atol=1e-6)


def test_seed_counts_for_salient_samplers_too():
    placer = make_placer(n_tokens=6, sampler='salient', saliency='spectral_residual')
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(placer(images), placer(images))
    assert not torch.equal(placer(images), placer.replaced(seed=1)(images))


def test_a_network_as_saliency_is_part_of_the_placer():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Softplus(), torch.nn.Flatten(1, 2))
    placer = make_placer(n_tokens=6, sampler='salient', saliency=network)
    assert set(placer.state_dict()) == {'saliency_network.0.weight', 'saliency_network.0.bias'}
    assert placer.to(torch.bfloat16).saliency_network[0].weight.dtype == torch.float32
    assert placer(torch.rand(2, 3, 32, 32)).shape == (2, 6, 2)
    other = placer.replaced(saliency='spectral_residual')
    assert not other.state_dict() and placer.saliency_network is network


def test_saliency_of_another_batch_size_is_refused():
    placer = make_placer(n_tokens=6, sampler='salient', saliency=torch.ones(2, 32, 32))
    with pytest.raises(ValueError, match=r'saliency of shape \(2, 32, 32\) does not match a batch of 3 images'):
        placer(torch.rand(3, 3, 32, 32))


def test_lattice_of_the_sampler():
    assert make_placer(n_tokens=12).lattice((96, 128)) == (3, 4)
    assert make_placer(n_tokens=11).lattice((96, 128)) is None
    assert make_placer(n_tokens=12, sampler='uniform').lattice((96, 128)) is None
    assert make_placer(n_tokens=(4, 12)).train().lattice((96, 128)) is None


@pytest.mark.parametrize('fields, error, says', [
    (dict(sampler='triangle'), ValueError, "sampler='triangle' is unknown"),
    (dict(n_tokens=0), ValueError, 'n_tokens=0'),
    (dict(n_tokens=(9, 4)), ValueError, r'n_tokens=\(9, 4\) is out of order'),
    (dict(n_tokens=2.5), TypeError, 'n_tokens must be an int'),
    (dict(saliency='no such thing'), ValueError, "saliency='no such thing' is unknown"),
    (dict(saliency=3), TypeError, r'saliency must be .* got 3\.'),
    (dict(sampler='salient'), ValueError, "needs a saliency map: pass saliency='spectral_residual'"),
    (dict(seed=2 ** 70), ValueError, 'seed=1180591620717411303424 is out of range'),
])
def test_priors_that_are_none(fields, error, says):
    with pytest.raises(error, match=says):
        Prior(**fields)


def test_priors_are_values():
    prior = Prior(n_tokens=[9, 64])
    assert prior == Prior(n_tokens=(9, 64)) and hash(prior) == hash(Prior(n_tokens=(9, 64)))
    assert prior.draws_budget and not Prior(n_tokens=(9, 9)).draws_budget
    with pytest.raises(dataclasses.FrozenInstanceError):
        prior.seed = 1


@given(low=st.integers(1, 100), extra=st.integers(1, 100), seed=st.integers(0, 2 ** 31), batch=st.integers(0, 10 ** 6))
def test_drawn_budgets_stay_within_bounds(low, extra, seed, batch):
    placer = make_placer(n_tokens=(low, low + extra), seed=seed).train()
    placer.batches = batch
    assert low <= placer.budget((16, 16)) <= low + extra
    assert placer.eval().budget((16, 16)) == low + extra


def test_every_budget_of_a_range_is_drawn_small_ones_as_often_as_large_ones():
    placer = make_placer(n_tokens=(4, 64)).train()
    drawn = []
    for placer.batches in range(2000):
        drawn.append(placer.budget((64, 64)))
    assert set(drawn) == set(range(4, 65))
    # Log-uniform: between n and 2 n as many as between 2 n and 4 n. A quarter of 2,000, five standard errors.
    for low, high in itertools.pairwise((4, 8, 16, 32)):
        assert abs(sum(low <= n < high for n in drawn) - 2000 / 4.02) < 100


def test_budgets_do_not_lean_on_pythons_hash():
    program = (
        'from timm_spot.models.placement import SampledPlacer\n'
        'from timm_spot.models.prior import Prior\n'
        'placer = SampledPlacer(Prior(n_tokens=(1, 999)), Prior())\n'
        'for placer.batches in range(8): print(placer.budget((64, 64)))')
    outputs = {
        subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True, timeout=300,
                       env={'PYTHONHASHSEED': seed}).stdout for seed in ('1', '2')}
    placer = make_placer(n_tokens=(1, 999)).train()
    expected = []
    for placer.batches in range(8):
        expected.append(placer.budget((64, 64)))
    assert outputs == {''.join(f'{n}\n' for n in expected)}


def test_a_budget_beyond_the_pixels_is_refused():
    assert make_placer(n_tokens=64).budget((8, 8)) == 64
    with pytest.raises(ValueError, match='n_tokens=65 exceeds the pixels of an image of 8 x 8'):
        make_placer(n_tokens=65)(torch.rand(1, 3, 8, 8))


def test_registry_of_placers():
    assert 'sampled' in list_placers() and get_placer('sampled') is SampledPlacer
    with pytest.raises(ValueError, match=r"placer='sampeld' is unknown \(did you mean 'sampled'\?\)"):
        get_placer('sampeld')
    with pytest.raises(ValueError, match="name='sampled' is already a placer"):
        register_placer('sampled')
    with pytest.raises(TypeError, match=r"placer 'module' must be a subclass of timm_spot\.Placer"):
        register_placer('module')(torch.nn.Identity)
    with pytest.raises(NotImplementedError, match='Placer must define forward'):
        timm_spot.Placer(Prior(), Prior())(torch.rand(1, 3, 32, 32))


def test_a_sampler_of_one_s_own_may_follow_the_default_dtype():
    """Its draws are others in float64: they must not stay behind for those who come later."""
    @timm_spot.register_sampler('of_the_default_dtype')
    def of_the_default_dtype(n_tokens, generator, **_):
        return torch.rand(n_tokens, 2, generator=generator)

    placer, images = make_placer(n_tokens=7, sampler='of_the_default_dtype'), torch.rand(1, 3, 32, 32)
    try:
        torch.set_default_dtype(torch.float64)
        during = placer(images)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = torch.rand(7, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(placer(images)[0], expected) and not torch.equal(during[0], expected)
