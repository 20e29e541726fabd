from __future__ import annotations

import pytest
import torch
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.spatial import cKDTree

from timm_spot import sample_positions
from timm_spot.ops import lattice_shape


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


def test_lattice_shape_needs_a_lattice():
    lattice = sample_positions('isotropic', 12, (96, 128))
    assert lattice_shape(lattice) == (3, 4)
    assert lattice_shape(lattice.expand(2, -1, -1)) == (3, 4)
    assert lattice_shape(sample_positions('center', 12, (96, 128))) == (3, 4)
    assert lattice_shape(lattice.flip(1)) is None
    assert lattice_shape(torch.cat([lattice, lattice + 0.01])) is None
    assert lattice_shape(sample_positions('uniform', 12, (96, 128))) is None
    assert lattice_shape(sample_positions('isotropic', 11, (96, 128))) is None


def test_authors_lattice_by_hand():
    # 224 / 5 = 44.8 px apart: every 45th pixel from 22 on, as fractions of 224.
    positions = sample_positions('grid_uniform', 25, (224, 224))[0].view(5, 5, 2)
    expected = torch.tensor([22., 67., 112., 157., 202.]) / 224
    torch.testing.assert_close(positions[:, 0, 0], expected)
    torch.testing.assert_close(positions[0, :, 1], expected)
    # 26 / 4 = 6.5 px apart: halves are rounded to even, 6.
    positions = sample_positions('grid_uniform', 16, (26, 26))[0].view(4, 4, 2)
    torch.testing.assert_close(positions[:, 0, 0], torch.tensor([3., 9., 15., 21.]) / 26)
    # An image twice as wide as high: rows are read first.
    positions = sample_positions('grid_uniform', 8, (40, 80))[0].view(2, 4, 2)
    torch.testing.assert_close(positions[:, 0, 0], torch.tensor([10., 30.]) / 40)
    torch.testing.assert_close(positions[0, :, 1], torch.tensor([10., 30., 50., 70.]) / 80)
