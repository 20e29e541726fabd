from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot.ops.sizes import (
    SIZE_NODES,
    add_sizes,
    cell_spacing,
    check_coverage,
    check_n_coarse,
    default_coarse,
    neighbour_cells,
    size_feature,
)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), H=st.integers(16, 300), W=st.integers(16, 300), seed=st.integers(0, 99))
def test_cells_of_scattered_tokens_have_the_area_of_the_image(n, H, W, seed):
    positions = torch.rand(2, n, 2, generator=torch.Generator().manual_seed(seed))
    cells = neighbour_cells(positions, (H, W))
    assert cells.shape == (2, n, 2) and (cells > 0).all()
    torch.testing.assert_close(cells.prod(dim=-1).sum(dim=1), torch.ones(2), rtol=1e-4, atol=0)
    if n > 1:
        pixels = cells * torch.tensor([H, W])
        fits = (cells < 0.999).all(dim=-1)
        torch.testing.assert_close(pixels[fits][:, 0], pixels[fits][:, 1], rtol=1e-4, atol=0)  # square


def test_cells_by_neighbours_on_a_lattice_are_its_cells():
    axis = (torch.arange(4) + 0.5) / 4
    lattice = torch.cartesian_prod(axis, axis)[None]
    torch.testing.assert_close(neighbour_cells(lattice, (64, 64)), torch.full((1, 16, 2), 0.25))


@pytest.mark.parametrize('size', [(16, 160), (160, 16)])
def test_no_cell_is_larger_than_the_image(size):
    positions = torch.rand(8, 3, 2, generator=torch.Generator().manual_seed(0))
    cells = neighbour_cells(positions, size)
    assert cells.amax() <= 1 + 1e-6 and cells.amax(dim=(0, 1)).amax() > 0.999
    torch.testing.assert_close(cells.prod(dim=-1).sum(dim=1), torch.ones(8))
    square = neighbour_cells(positions, (64, 64))
    torch.testing.assert_close(square[..., 0], square[..., 1])


def test_tokens_on_one_spot_have_cells_too():
    assert neighbour_cells(torch.full((1, 3, 2), 0.5), (64, 32)).isfinite().all()


def test_small_where_dense():
    positions = torch.tensor([[[0.1, 0.1], [0.1, 0.15], [0.15, 0.1], [0.8, 0.8]]])
    cells = neighbour_cells(positions, (64, 64))[0, :, 0]
    assert cells[3] > 5 * cells[:3].max()


@pytest.mark.parametrize('coverage, expected', [(0., 1.), (0.5, 2.), (1., 4.)])
def test_spacing_between_pixels_and_cells(coverage, expected):
    cells = torch.full((1, 4, 2), 0.5)  # 64 px of 128, for windows of 16
    assert cell_spacing(cells, (128, 128), 16, coverage).unique().tolist() == [expected]


def test_cells_smaller_than_a_window_are_read_pixel_by_pixel():
    cells = torch.tensor([[[0.01, 0.5], [0.5, 0.5]]])
    assert cell_spacing(cells, (128, 128), 16, 1.)[0].tolist() == [[1., 4.], [4., 4.]]
    many = torch.full((1, 400, 2), 1 / 20)  # more tokens than patches: an even lattice of 11.2 px
    assert cell_spacing(many, (224, 224), 16, 1.)[0, 0].tolist() == pytest.approx([0.7, 0.7])
    assert cell_spacing(many / 4, (224, 224), 16, 1.)[0, 0].tolist() == pytest.approx([0.35, 0.35])


@pytest.mark.parametrize('value, error, says', [
    (1.5, ValueError, r'coverage=1.5 lies outside \[0, 1\]'),
    (-0.1, ValueError, 'lies outside'),
    (float('nan'), ValueError, 'lies outside'),
    ((0.8, 0.2), ValueError, r'out of order: give the smaller first, \(0.2, 0.8\)'),
    ('1', TypeError, "coverage='1' must be one number"),
    (True, TypeError, 'must be one number'),
    ((0., 0.5, 1.), TypeError, 'one number in .* or two'),
    (None, TypeError, 'must be one number'),
])
def test_coverages_that_are_none(value, error, says):
    with pytest.raises(error, match=says):
        check_coverage(value)


def test_coverages():
    assert check_coverage(1) == (1., 1.) and check_coverage([0, 0.5]) == (0., 0.5)


def test_what_a_token_is_told_of_its_size():
    spacing = torch.tensor([[[1., 1.], [2., 1.], [math.sqrt(8), 0.5], [1e-6, 1e6]]])
    told = size_feature(spacing)[0].view(4, 2, len(SIZE_NODES))
    assert not told[0].any()
    assert told[1, 0].tolist() == [0, 0, 1, 0, 0, 0, 0, 0] and not told[1, 1].any()
    torch.testing.assert_close(told[2, 0], torch.tensor([0, 0, 0.5, 0.5, 0, 0, 0, 0]))
    assert told[2, 1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert told[3, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0] and told[3, 1].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]


@given(n=st.integers(1, 500), asked=st.integers(1, 500))
def test_coarse_tokens_never_exceed_the_budget(n, asked):
    assert check_n_coarse(asked, n) == min(asked, n)
    default = check_n_coarse(None, n)
    assert 1 <= default == default_coarse(n) <= n and math.isqrt(default) ** 2 == default


@pytest.mark.parametrize('value, error', [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_counts_of_coarse_tokens_that_are_none(value, error):
    with pytest.raises(error, match='n_coarse'):
        check_n_coarse(value, 25)


def test_sizes_by_the_distances_between_tokens():
    positions = torch.tensor([[[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]])
    assert add_sizes(positions, (64, 64), 8, 0.) is positions
    torch.testing.assert_close(add_sizes(positions, (64, 64), 8, 1.)[..., 2:], torch.full((1, 4, 2), 4.))
    assert torch.equal(add_sizes(positions, (64, 64), 8, 1.)[..., :2], positions)
