from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from timm_spot import register_sampler, sample_positions
from timm_spot.ops import samplers
from timm_spot.ops.placements import sample_placement

EVERY = ('uniform', 'gaussian', 'sobol', 'isotropic', 'center')


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(EVERY), coarse=st.booleans(), n=st.integers(1, 120), H=st.integers(20, 300),
       W=st.integers(20, 300), coverage=st.sampled_from([0., 0.3, 1.]), batch=st.integers(1, 3))
def test_any_placement_is_exact_and_its_positions_are_those_without_sizes(name, coarse, n, H, W, coverage, batch):
    name = f'coarse+{name}' if coarse else name
    placement = sample_placement(name, n, (H, W), batch, generator=generator(3), window=8, coverage=coverage)
    assert placement.dtype == torch.float32
    assert placement.shape == (batch, n, 4 if coarse or coverage else 2)
    assert (placement[..., 2:] > 0).all() and placement.isfinite().all()
    assert torch.equal(
        placement[..., :2], sample_positions(name, n, (H, W), batch, generator=generator(3), window=8))


def covered(placement, size, window):
    """Share of the pixels whose centre lies in a window, which may end a thousandth of a pixel early."""
    seen = np.zeros(size, dtype=bool)
    for y, x, height, width in placement.tolist():
        inside = [np.abs(np.arange(length) + 0.5 - at * length) < window * spacing / 2 + 1e-3
                  for length, at, spacing in zip(size, (y, x), (height, width))]
        seen |= inside[0][:, None] & inside[1]
    return seen.mean()


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(['isotropic', 'center']), n=st.integers(1, 90), H=st.integers(40, 200),
       W=st.integers(40, 200))
def test_at_coverage_1_the_windows_of_a_lattice_tile_the_picture(name, n, H, W):
    placement = sample_placement(name, n, (H, W), window=8, coverage=1.)[0]
    if name == 'isotropic':
        assert covered(placement, (H, W), 8) == 1.
        area = (8 * placement[:, 2:]).prod(dim=-1).sum().item()
        assert area == pytest.approx(H * W, rel=1e-4) or placement[:, 2:].min() <= 1.
    else:
        assert covered(placement, (H, W), 8) > 0.98  # the pull leaves a thousandth of the image at its edges


def test_even_cells_by_hand():
    placement = sample_placement('isotropic', 25, (224, 224), window=14, coverage=1.)
    torch.testing.assert_close(placement[0, 0], torch.tensor([0.1, 0.1, 3.2, 3.2]))
    assert placement[..., 2:].unique().numel() == 1
    torch.testing.assert_close(
        sample_placement('isotropic', 12, (96, 128), window=8, coverage=1.)[0, :, 2:], torch.full((12, 2), 4.))
    grid = sample_placement('grid', 64, (64, 64), window=8, coverage=1.)
    torch.testing.assert_close(grid[..., 2:], torch.ones(1, 64, 2))  # the patches themselves


def test_center_is_fine_in_the_middle_and_coarse_outside():
    placement = sample_placement('center', 49, (224, 224), window=14, coverage=1.)[0]
    distance = (placement[:, :2] - 0.5).abs()
    assert placement[distance.amax(dim=1) < 0.02, 2:].max() == 1.
    assert placement[distance.amin(dim=1) > 0.1, 2:].min() > 2.


def test_scattered_tokens_share_the_picture():
    placement = sample_placement('sobol', 49, (224, 224), 3, generator=generator(), window=14, coverage=1.)
    for one in placement:
        assert (14 * one[:, 2:]).prod(dim=-1).sum().item() == pytest.approx(224 ** 2, rel=0.02)
        assert covered(one, (224, 224), 14) > 0.65


def test_mixed_placements():
    placement = sample_placement('coarse+center', 25, (224, 224), window=14)[0]
    assert torch.equal(placement[:16], sample_placement('isotropic', 16, (224, 224), window=14, coverage=1.)[0])
    assert torch.equal(placement[16:, :2], sample_positions('center', 9, (224, 224))[0])
    assert placement[16:, 2:].unique().tolist() == [1.]
    sized = sample_placement('coarse+center', 25, (224, 224), window=14, coverage=1., n_coarse=4)[0]
    assert torch.equal(sized[:4], sample_placement('isotropic', 4, (224, 224), window=14, coverage=1.)[0])
    assert torch.equal(sized[4:], sample_placement('center', 21, (224, 224), window=14, coverage=1.)[0])
    assert sample_placement('coarse+gauss', 1, (64, 64), window=8).shape == (1, 1, 4)


def test_mixed_placements_from_maps():
    maps = torch.rand(3, 32, 32)
    one = sample_placement('coarse+salient', 8, (32, 32), 1, maps, generator(), window=8)
    assert one.shape == (3, 8, 4)
    assert torch.equal(one[0, :4], one[2, :4]) and not torch.equal(one[0, 4:], one[2, 4:])


def test_a_sampler_of_one_s_own_may_give_cells(monkeypatch):
    monkeypatch.setattr(samplers, '_SAMPLERS', dict(samplers._SAMPLERS))

    @register_sampler('halves', deterministic=True)
    def halves(n_tokens):
        return torch.tensor([[0.5, 0.25, 1., 0.5], [0.5, 0.75, 1., 0.5]])

    assert sample_positions('halves', 2, (64, 64)).shape == (1, 2, 2)
    assert sample_placement('halves', 2, (64, 64), window=8, coverage=1.)[0, :, 2:].tolist() == [[8., 4.]] * 2

    register_sampler('three')(lambda n_tokens: torch.rand(n_tokens, 3))
    with pytest.raises(ValueError, match=r"'three' returned shape \(2, 3\), expected .* or 4 columns"):
        sample_positions('three', 2, (64, 64))


@pytest.mark.parametrize('name, says', [
    ('coarse+centre', "sampler='centre' is unknown .did you mean 'center'"),
    ('coarse+', "sampler='' is unknown"),
    ('coarse+coarse+center', "sampler='coarse\\+center' is unknown"),
])
def test_mixed_placements_of_nothing(name, says):
    with pytest.raises(ValueError, match=says):
        sample_placement(name, 9, (64, 64))


def test_the_prefix_of_mixed_placements_is_no_name():
    with pytest.raises(ValueError, match="'coarse\\+' in front of a name"):
        register_sampler('coarse+mine')(lambda n_tokens: torch.rand(n_tokens, 2))


@pytest.mark.parametrize('sampler', ['isotropic', 'center', 'coarse+center'])
def test_a_placement_without_its_cells_is_saved_without_them(sampler, tmp_path):
    placements = [sample_positions(sampler, 9, (64, 64)), sample_placement(sampler, 9, (64, 64))]
    for placement in placements:
        assert placement.is_contiguous() and placement.untyped_storage().nbytes() == placement.nbytes
        save_file(dict(placement=placement), tmp_path / 'placement.safetensors')
