"""Lattices through the inverse distribution function of a density."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot.ops.density import density_loss, place_by_density, shape_density
from timm_spot.ops.lattices import isotropic


def density(height, width, seed=0, batch=2, dtype=torch.float64):
    maps = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return shape_density(maps, power=3., floor=0.05)


def test_by_hand():
    """A quarter of the density above, where it lies on the left; three quarters below, on the right."""
    maps = torch.tensor([[[0.25, 0.], [0., 0.75]]], dtype=torch.float64)
    points = torch.tensor([[0.125, 0.5], [0.25, 0.25], [0.625, 0.5], [1., 1.], [0., 0.]], dtype=torch.float64)
    expected = [
        [0.25, 0.25],  # half of the upper row's share, at its centre: that row alone
        [0.5, 0.5],  # between the rows both count: 0.25 and 0.75, of which the first quarter is the whole left half
        [0.75, 0.75],
        [1., 1.],
        [0., 0.]]
    torch.testing.assert_close(place_by_density(points, maps), torch.tensor([expected], dtype=torch.float64))


def test_an_even_density_leaves_the_lattice_and_its_cells():
    for n_tokens, size in ((9, (64, 64)), (11, (48, 96)), (100, (32, 1024))):
        lattice = isotropic(n_tokens, size)
        even = torch.full((1, 5, 7), 1 / 35, dtype=torch.float64)
        torch.testing.assert_close(place_by_density(lattice, even)[0], lattice)


def test_a_smooth_density_has_its_known_map():
    """(1 + 2 y) (1 + 3 x^2) / 4: rows and columns are independent, and each axis follows its own function."""
    at = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    maps = (1 + 2 * at)[:, None] * (1 + 3 * at ** 2) / (4 * 400 ** 2)
    points = torch.rand(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, x = place_by_density(points, maps[None] / maps.sum())[0].unbind(-1)
    torch.testing.assert_close((y + y ** 2) / 2, points[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close((x + x ** 3) / 2, points[:, 1], rtol=0, atol=1e-4)


def test_many_points_have_the_density():
    maps = density(6, 8, batch=1)
    placed = place_by_density(isotropic(40_000, (64, 64))[:, :2], maps)[0]
    bins = (placed[:, 0] * 6).long().clamp(max=5)
    torch.testing.assert_close(
        torch.bincount(bins, minlength=6).double() / 40_000, maps[0].sum(1), rtol=0, atol=5e-3)
    # The density of x at y, from the formula of linear interpolation, integrated over y.
    fine = torch.nn.functional.interpolate(maps[:, None], (600, 8), mode='bilinear')[0, 0]
    conditional = fine / fine.sum(1, keepdim=True) * maps[0].sum(1).repeat_interleave(100)[:, None] / 100
    columns = (placed[:, 1] * 8).long().clamp(max=7)
    torch.testing.assert_close(
        torch.bincount(columns, minlength=8).double() / 40_000, conditional.sum(0), rtol=0, atol=5e-3)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 150), h=st.integers(1, 40), w=st.integers(1, 40), H=st.integers(8, 1024),
       W=st.integers(8, 1024), seed=st.integers(0, 10 ** 6), zeros=st.floats(0, 0.98), single=st.booleans())
def test_any_density_gives_each_point_a_place_inside_in_the_lattice_s_order(n, h, w, H, W, seed, zeros, single):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(2, h, w, generator=generator) * (torch.rand(2, h, w, generator=generator) >= zeros)
    maps[:, -1, 0] += 1e-4
    maps = shape_density(maps if single else maps.double())
    lattice = isotropic(n, (H, W))
    placed = place_by_density(lattice, maps)
    assert placed.shape == (2, n, 4) and placed.dtype == maps.dtype
    assert placed.isfinite().all() and (placed >= 0).all() and (placed <= 1).all()
    order = placed[:, :, 0].diff(dim=1)
    assert (order >= -1e-6).all()  # rows stay rows, from the top down
    same = lattice[:, 0].diff() == 0
    assert (order[:, same] == 0).all() and (placed[:, :, 1].diff(dim=1)[:, same] >= -1e-6).all()


@pytest.mark.parametrize('n_tokens', [1, 9, 20, 100])
def test_carried_cells_tile_the_square(n_tokens):
    placed = place_by_density(isotropic(n_tokens, (64, 96)), density(7, 5, batch=3))
    for one in placed:
        rows = [one[one[:, 0] == y] for y in one[:, 0].unique()]
        assert sum(row[0, 2].item() for row in rows) == pytest.approx(1)
        for row in rows:
            assert (row[:, 2] == row[0, 2]).all() and row[:, 3].sum().item() == pytest.approx(1)


def test_cells_are_small_where_tokens_crowd():
    maps = torch.full((1, 8, 8), 0.5 / 64, dtype=torch.float64)
    maps[0, 2:4, 2:4] += 0.5 / 4
    placed = place_by_density(isotropic(64, (64, 64)), maps)[0]
    area = placed[:, 2] * placed[:, 3]
    crowded = ((placed[:, :2] > 0.25) & (placed[:, :2] < 0.5)).all(dim=1)
    assert crowded.sum() > 16 and area[crowded].median() < area[~crowded].median() / 3


def test_gradients_are_those_of_finite_differences():
    maps = density(4, 6, batch=1).requires_grad_()
    points = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, p: place_by_density(p, m / m.sum()), (maps, points))
    lattice = isotropic(5, (64, 64))
    assert torch.autograd.gradcheck(lambda m: place_by_density(lattice, m / m.sum()), (maps,))
    assert torch.autograd.gradcheck(lambda m: shape_density(m, 1.7, 0.1), (maps,))


def test_float32_is_precise_at_a_peak():
    """One bin with all but a hundredth of the density, in float32 as a placer has it."""
    maps = torch.full((1, 32, 32), 0.01 / 1024)
    maps[0, 13, 21] += 0.99
    lattice = isotropic(100, (64, 64))
    torch.testing.assert_close(
        place_by_density(lattice, maps), place_by_density(lattice, maps.double()).float(), rtol=0, atol=2e-5)


def test_autocast_leaves_coordinates_alone():
    maps, lattice = density(9, 9, dtype=torch.float32), isotropic(25, (64, 64))
    with torch.autocast('cpu', torch.bfloat16):
        placed = place_by_density(lattice, maps)
    assert torch.equal(placed, place_by_density(lattice, maps))


def test_each_density_stands_alone():
    maps = density(9, 9, batch=3, dtype=torch.float32)
    lattice = isotropic(25, (64, 64))
    together = place_by_density(lattice, maps)
    for i in range(3):
        torch.testing.assert_close(place_by_density(lattice, maps[i:i + 1])[0], together[i], rtol=0, atol=1e-6)
    maps[1, 2, 3] = math.nan
    broken = place_by_density(lattice, maps)
    assert torch.equal(broken[0], together[0]) and torch.equal(broken[2], together[2]) and broken[1].isnan().any()


def test_shapes_of_densities():
    maps = torch.tensor([[[0., 1.], [3., 0.]]])
    assert shape_density(maps)[0].tolist() == [[0., 0.25], [0.75, 0.]]
    assert shape_density(maps, power=2.)[0, 1, 0].item() == pytest.approx(0.9)
    assert shape_density(maps, floor=1.).unique().tolist() == [0.25]
    for scale in (1e-30, 1e30):  # powers of these alone are zero and infinite
        torch.testing.assert_close(shape_density(maps * scale, power=2.), shape_density(maps, power=2.))


def test_the_loss_is_the_divergence_from_maps_averaged_over_cells():
    maps = torch.rand(2, 8, 12, dtype=torch.float64)
    target = maps.unflatten(1, (4, 2)).unflatten(3, (4, 3)).mean(dim=(2, 4))
    target = target / target.sum(dim=(1, 2), keepdim=True)
    assert density_loss(target, maps).item() == pytest.approx(0., abs=1e-12)
    other = density(4, 4)
    expected = (target * (target / other).log()).sum() / 2
    assert density_loss(other, maps).item() == pytest.approx(expected.item())
    maps[0, :2] = 0.  # cells without any weight
    assert density_loss(other, maps).isfinite()
