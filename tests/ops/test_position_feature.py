from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot.models.subpixel_embed import patch_sigma
from timm_spot.ops import fit_position_weights, position_feature


def test_golden_position_maps(golden):
    H, W = golden['image'].shape[-2:]
    n_sigma = F.softplus(golden['authors']['tokenizer._n_sigma'])
    phi = position_feature(golden['positions'], 16, n_sigma * 16 / (H + W), scaled=True)
    expected = golden['windows_and_position_maps'][:, :, 3].flatten(2)
    torch.testing.assert_close(phi, expected, rtol=0, atol=1e-4)


def test_by_hand():
    phi = position_feature(torch.tensor([[[0.5, 1.0]]]), nodes=3, sigma=torch.tensor(0.5))
    e = math.exp(-0.5)  # one node away: 0.5^2 / (2 * 0.5^2)
    column = [math.exp(-2), e, 1.]
    expected = [[e * c for c in column], column, [e * c for c in column]]
    torch.testing.assert_close(phi.view(3, 3), torch.tensor(expected))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), nodes=st.integers(2, 20), seed=st.integers(0, 99), far=st.floats(0, 50))
def test_scaled_feature_peaks_at_one_in_each_image(n, nodes, seed, far):
    positions = torch.rand(3, n, 2, generator=torch.Generator().manual_seed(seed)) + far
    phi = position_feature(positions, nodes, torch.tensor(0.04), scaled=True)
    assert phi.isfinite().all()
    torch.testing.assert_close(phi.amax((1, 2)), torch.ones(3))
    alone = position_feature(positions[1:2], nodes, torch.tensor(0.04), scaled=True)
    torch.testing.assert_close(phi[1:2], alone, rtol=1e-5, atol=1e-6)  # exp of another shape may round differently


def test_no_subnormal_numbers():
    phi = position_feature(torch.rand(4, 50, 2), 16, patch_sigma(torch.ones(()), 16))
    tiny = torch.finfo(torch.float32).tiny
    assert ((phi == 0) | (phi >= tiny)).all()


def test_sigmas_of_the_conventions_agree_at_224():
    assert patch_sigma(torch.ones(()), 16).item() == pytest.approx(16 / (224 + 224))


def sine_cosine_table(side, dim):
    """MAE's table: sines and cosines of each axis at geometrically spaced frequencies."""
    frequency = 1 / 10000 ** (torch.arange(dim // 4) / (dim / 4))
    angle = torch.arange(side)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    return torch.cat([axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)], dim=2)


def relative_error(weights, nodes, table, positions):
    phi = position_feature(positions[None].double(), nodes, patch_sigma(torch.ones((), dtype=torch.float64), nodes))
    target = F.grid_sample(
        table.permute(2, 0, 1)[None].double(), 2 * positions.double().flip(-1)[None, None] - 1, mode='bicubic',
        padding_mode='border', align_corners=False)[0, :, 0].T
    return ((phi[0] @ weights.double().T - target).norm() / target.norm()).item()


def test_fit_reproduces_a_position_table():
    centres = torch.cartesian_prod((torch.arange(14) + 0.5) / 14, (torch.arange(14) + 0.5) / 14)
    between = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    field = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(1))
    smooth = F.interpolate(field, size=(14, 14), mode='bicubic', align_corners=False)[0].permute(1, 2, 0)
    # Measured: 2.0 % (MAE's table at its width of 768) and 3.4 % between the centres.
    for table, tolerance in ((sine_cosine_table(14, 768), 0.025), (smooth, 0.04)):
        weights = fit_position_weights(table.double(), 16, patch_sigma(torch.ones(()), 16))
        assert relative_error(weights, 16, table, centres) < 2e-6
        assert relative_error(weights, 16, table, between) < tolerance


def test_fit_needs_as_many_nodes_as_rows():
    with pytest.raises(ValueError, match='pos_nodes=16 cannot hold a position table of 37 x 20, use at least 37'):
        fit_position_weights(torch.zeros(37, 20, 4), 16, torch.tensor(0.1))
