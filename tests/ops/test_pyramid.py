from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot import sample_windows
from timm_spot.ops.pyramid import build_pyramid, level_count, levels_between, sized_windows


def by_levels(image, position, spacing, window):
    """One window (C, k, k) of equal spacings, read level by level: what `sized_windows` must give, written out."""
    levels = [image]
    while len(levels) <= 6 and min(levels[-1].shape[-2:]) > 1:
        levels.append(F.avg_pool2d(levels[-1], 2))
    octave = torch.tensor(spacing, dtype=image.dtype).clamp(min=1.).log2().item()
    fine = min(int(octave), len(levels) - 1)
    share = octave - fine
    offsets = (torch.arange(window, dtype=image.dtype) - (window - 1) / 2) * spacing
    H, W = image.shape[-2:]
    y, x = 2 * (position[0] + offsets / H) - 1, 2 * (position[1] + offsets / W) - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing='ij')[::-1], dim=-1)[None]
    read = [F.grid_sample(level, grid, padding_mode='zeros', align_corners=False)[0] for level in levels]
    return read[fine] if share == 0 else (1 - share) * read[fine] + share * read[fine + 1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2 ** 20), window=st.integers(1, 8), spacing=st.floats(0.3, 7.9), H=st.sampled_from([32, 64]),
       W=st.sampled_from([32, 96]))
def test_windows_are_trilinear(seed, window, spacing, H, W):
    torch.manual_seed(seed)
    image = torch.rand(1, 2, H, W, dtype=torch.float64)
    positions = torch.rand(1, 3, 2, dtype=torch.float64) * 1.6 - 0.3
    read = sized_windows(image, positions, torch.full((1, 3, 2), spacing, dtype=torch.float64), window, range(5))
    for i in range(3):
        torch.testing.assert_close(
            read[0, :, i], by_levels(image, positions[0, i], spacing, window), rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2 ** 20), low=st.floats(0.5, 6.), high=st.floats(1., 8.), H=st.integers(20, 70),
       W=st.integers(20, 70))
def test_only_the_levels_that_are_needed_give_what_all_give(seed, low, high, H, W):
    torch.manual_seed(seed)
    image, positions = torch.rand(2, 1, H, W, dtype=torch.float64), torch.rand(2, 4, 2, dtype=torch.float64)
    spacing = low + (max(low, high) - low) * torch.rand(2, 4, 2, dtype=torch.float64)
    every = range(level_count((H, W), 4))
    few = levels_between(spacing, (H, W), 4)
    assert few.start >= every.start and few.stop <= every.stop
    torch.testing.assert_close(
        sized_windows(image, positions, spacing, 4, few), sized_windows(image, positions, spacing, 4, every),
        rtol=0, atol=1e-10)


def test_axes_have_scales_of_their_own():
    """Bars across x vanish in windows that are coarse along x, and stay in those that are coarse along y only."""
    bars = torch.tensor([0., 1.]).repeat(32).expand(1, 1, 64, 64)
    middle = torch.full((1, 1, 2), 0.5)
    wide = sized_windows(bars, middle, torch.tensor([[[1., 4.]]]), 4, range(4))
    tall = sized_windows(bars, middle, torch.tensor([[[4., 1.]]]), 4, range(4))
    torch.testing.assert_close(wide, torch.full_like(wide, 0.5))
    assert tall.flatten().unique().tolist() in ([0.5], [0., 1.])
    tall = sized_windows(bars, middle + torch.tensor([0., 0.5 / 64]), torch.tensor([[[4., 1.]]]), 3, range(4))
    assert sorted(tall.flatten().unique().tolist()) == [0., 1.]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2 ** 20), along=st.floats(1., 7.), across=st.floats(1., 7.))
def test_the_scale_across_stripes_changes_nothing(seed, along, across):
    torch.manual_seed(seed)
    stripes = torch.rand(1, 2, 1, 96, dtype=torch.float64).expand(-1, -1, 96, -1)
    positions = 0.4 + 0.2 * torch.rand(1, 3, 2, dtype=torch.float64)
    spacing = torch.tensor([across, along], dtype=torch.float64).expand(1, 3, 2)
    read = sized_windows(stripes, positions, spacing, 5, range(5))
    turned = sized_windows(stripes.mT, positions.flip(-1), spacing.flip(-1), 5, range(5))
    for i in range(3):
        expected = by_levels(stripes, positions[0, i], along, 5)
        torch.testing.assert_close(read[0, :, i], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(turned[0, :, i], expected.mT, rtol=0, atol=1e-10)


def test_no_aliasing():
    """A checkerboard of pixels is grey at any larger size, wherever the samples fall."""
    board = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float()[None, None]
    positions = 0.4 + 0.2 * torch.rand(1, 50, 2)
    for spacing in (2., 2.7, 3.9, 5.3):
        read = sized_windows(board, positions, torch.full((1, 50, 2), spacing), 4, range(4))
        torch.testing.assert_close(read, torch.full_like(read, 0.5), rtol=0, atol=1e-5)


def smooth(H=256, W=192):
    """An image without a kink to speak of: derivatives of its interpolation are those of the function."""
    y, x = torch.meshgrid(
        torch.linspace(0, 3, H, dtype=torch.float64), torch.linspace(0, 3, W, dtype=torch.float64), indexing='ij')
    return torch.stack([torch.sin(2 * y + x), torch.cos(x * y) + x ** 2])[None]


@pytest.mark.parametrize('spacing', [(0.7, 0.9), (1.5, 1.5), (2.3, 5.1), (6.2, 3.)])
def test_derivatives_agree_with_finite_differences(spacing):
    torch.manual_seed(0)
    image, weights = smooth(), torch.rand(1, 2, 4, 6, 6, dtype=torch.float64)
    start = torch.cat([
        0.3 + 0.4 * torch.rand(1, 4, 2, dtype=torch.float64),
        torch.tensor(spacing, dtype=torch.float64).expand(1, 4, 2) + 0.1 * torch.rand(1, 4, 2, dtype=torch.float64),
    ], dim=-1).requires_grad_()

    def energy(placement):
        return (sized_windows(image, placement[..., :2], placement[..., 2:], 6, range(5)) * weights).sum()

    gradient, = torch.autograd.grad(energy(start), start)
    for column in range(4):
        step = 0.04 if column > 1 else 0.02  # wide enough to average over the kinks of interpolation
        for token in range(4):
            change = torch.zeros_like(start)
            change[0, token, column] = step
            with torch.no_grad():
                difference = (energy(start + change) - energy(start - change)) / (2 * step)
            scale = gradient[..., column].abs().max()
            assert abs(gradient[0, token, column] - difference) < 0.05 * scale, (column, token)


def test_the_derivative_to_the_image_is_exact():
    torch.manual_seed(1)
    image = torch.rand(1, 1, 9, 7, dtype=torch.float64, requires_grad=True)
    positions, spacing = torch.rand(1, 3, 2, dtype=torch.float64), 1 + 2 * torch.rand(1, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sized_windows(x, positions, spacing, 3, range(3)), image)


def test_across_a_pixel_s_centre_the_derivative_is_symmetric():
    """A peak: both one-sided slopes are wrong, the symmetric one is 0."""
    image = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    image[0, 0, 8:10, 8:10] = 1.  # one pixel of the copy of half the size
    positions = torch.full((1, 1, 2), 9 / 16, dtype=torch.float64, requires_grad=True)
    spacing = torch.full((1, 1, 2), 2., dtype=torch.float64)
    sized_windows(image, positions, spacing, 1, range(3)).sum().backward()
    assert positions.grad.tolist() == [[[0., 0.]]]


def test_copies_never_see_each_other():
    """Windows at and beyond every edge of a bright image hold no more than the image."""
    image = torch.ones(1, 1, 30, 22)  # of sides that no level but the first divides
    positions = torch.rand(1, 200, 2) * 3 - 1
    spacing = (0.5 + 7 * torch.rand(1, 200, 2)).requires_grad_()
    positions.requires_grad_()
    read = sized_windows(image, positions, spacing, 4, range(level_count((30, 22), 4)))
    assert read.min() >= 0 and read.max() <= 1 + 1e-6
    read.sum().backward()
    assert positions.grad.isfinite().all() and spacing.grad.isfinite().all()
    far = sized_windows(image, torch.full((1, 1, 2), 3.), torch.full((1, 1, 2), 2.), 4, range(3))
    assert not far.any()


def test_a_window_as_large_as_the_picture():
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    read = sized_windows(
        image, torch.full((1, 1, 2), 0.5, dtype=torch.float64), torch.full((1, 1, 2), 16., dtype=torch.float64), 4,
        range(level_count((64, 64), 4)))
    torch.testing.assert_close(read[:, :, 0], F.avg_pool2d(image, 16))


def test_levels():
    assert level_count((224, 224), 14) == 5 and level_count((224, 224), 224) == 1 and level_count((14, 448), 14) == 6
    assert levels_between(torch.tensor([0.2, 1.]), (224, 224), 14) == range(1)
    assert levels_between(torch.tensor([2., 4.]), (224, 224), 14) == range(1, 3)
    assert levels_between(torch.tensor([2., 4.]).requires_grad_(), (224, 224), 14) == range(1, 4)
    assert levels_between(torch.tensor([200.]), (224, 224), 14) == range(4, 5)  # the coarsest
    assert build_pyramid(torch.rand(1, 1, 10, 6), range(1, 3)).shape[-2:] == (6 + 2 + 3 + 2, 4 + 2 + 2 + 2)


def test_second_derivatives_are_refused_in_words():
    image, positions = torch.rand(1, 1, 16, 16), torch.rand(1, 2, 2, requires_grad=True)
    energy = sample_windows(image, positions, 4, spacing=2.5).square().sum()
    gradient, = torch.autograd.grad(energy, positions, create_graph=True)
    with pytest.raises(RuntimeError, match='nor any of windows with a spacing'):
        gradient.sum().backward()


def test_transforms_of_torch_func():
    image, positions, spacing = torch.rand(3, 1, 16, 16), torch.rand(3, 2, 2), 1 + torch.rand(3, 2, 2)

    def energy(image, positions, spacing):
        return sample_windows(image[None], positions[None], 4, spacing=spacing[None]).square().sum()

    each = torch.func.vmap(torch.func.grad(energy, argnums=(1, 2)))(image, positions, spacing)
    for i in range(3):
        leaves = positions[i].clone().requires_grad_(), spacing[i].clone().requires_grad_()
        expected = torch.autograd.grad(energy(image[i], *leaves), leaves)
        for found, value in zip(each, expected):
            torch.testing.assert_close(found[i], value, rtol=1e-4, atol=1e-5)
