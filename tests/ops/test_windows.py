from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot import sample_windows
from timm_spot.ops.windows import gather_blocks, read_windows


def by_hand(image, index_y, index_x):
    """Bilinear interpolation of one channel at one index, zero outside."""
    H, W = image.shape
    y0, x0 = math.floor(index_y), math.floor(index_x)
    value = 0.
    for y, x in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
        if 0 <= y < H and 0 <= x < W:
            value += image[y, x].item() * (1 - abs(index_y - y)) * (1 - abs(index_x - x))
    return value


def test_golden_windows(golden):
    windows = sample_windows(golden['image'], golden['positions'], 16, 'spot')
    torch.testing.assert_close(windows, golden['windows_and_position_maps'][:, :, :3], rtol=0, atol=5e-4)


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 5), H=st.integers(5, 12), W=st.integers(5, 12),
    y=st.floats(-0.25, 1.25, width=32), x=st.floats(-0.25, 1.25, width=32))
def test_patch_windows_follow_the_formula(k, H, W, y, x):
    image = torch.rand(1, 1, H, W, generator=torch.Generator().manual_seed(H * W + k), dtype=torch.float64)
    windows = sample_windows(image, torch.tensor([[y, x]], dtype=torch.float64), k)
    expected = [
        [by_hand(image[0, 0], y * H - 0.5 + i - (k - 1) / 2, x * W - 0.5 + j - (k - 1) / 2) for j in range(k)]
        for i in range(k)]
    torch.testing.assert_close(windows[0, 0, 0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(2, 5), H=st.integers(5, 12), W=st.integers(5, 12),
    y=st.floats(-0.25, 1.25, width=32), x=st.floats(-0.25, 1.25, width=32))
def test_spot_windows_follow_the_formula(k, H, W, y, x):
    image = torch.rand(1, 1, H, W, generator=torch.Generator().manual_seed(H * W + k), dtype=torch.float64)
    windows = sample_windows(image, torch.tensor([[y, x]], dtype=torch.float64), k, 'spot')[0, 0, 0]
    for i in range(k):
        for j in range(k):
            index_y = y * H + 2 * H / (H + W) * k / (k - 1) * (i - (k - 1) / 2)
            index_x = x * W + 2 * W / (H + W) * k / (k - 1) * (j - (k - 1) / 2)
            if min(abs(index_y), abs(index_x), abs(index_y - H + 1), abs(index_x - W + 1)) < 1e-9:
                continue  # on the border itself rounding decides
            inside = 0 <= index_y < H - 1 and 0 <= index_x < W - 1
            expected = by_hand(image[0, 0], index_y, index_x) if inside else 0.
            assert windows[i, j].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize('k, H, W', [(16, 224, 224), (8, 64, 96), (14, 98, 70), (32, 96, 224)])
def test_patch_grid_gives_the_patches(k, H, W):
    image = torch.randn(2, 3, H, W)
    y, x = (torch.arange(H // k) + 0.5) * k / H, (torch.arange(W // k) + 0.5) * k / W
    windows = sample_windows(image, torch.cartesian_prod(y, x), k)
    patches = F.unfold(image, k, stride=k).transpose(1, 2).reshape(2, -1, 3, k, k)
    torch.testing.assert_close(windows, patches, rtol=0, atol=2e-4)


def test_gradient_on_pixel_centres_is_the_symmetric_difference():
    # f(x + 1/2 px) - f(x - 1/2 px) of a ramp of squares: at pixel i, ((i + 1)^2 - (i - 1)^2) / 2 = 2 i.
    image = (torch.arange(9.) ** 2).expand(1, 1, 9, 9).contiguous()
    position = torch.tensor([[[4.5 / 9, 4.5 / 9]]], requires_grad=True)
    sample_windows(image, position, 1).sum().backward()
    assert position.grad[0, 0].tolist() == pytest.approx([0., 8. * 9], abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, 4))
def test_gradient_equals_half_pixel_finite_difference(seed, k):
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 2, 9, 7, generator=g, dtype=torch.float64)
    positions = (torch.rand(2, 3, 2, generator=g, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    weight = torch.randn(2, 3, 2, k, k, generator=g, dtype=torch.float64)

    def loss(p):
        return (sample_windows(image, p, k) * weight).sum((2, 3, 4))  # B N

    loss(positions).sum().backward()
    with torch.no_grad():
        for axis, size in ((0, 9), (1, 7)):
            half = torch.zeros(2, dtype=torch.float64)
            half[axis] = 0.5 / size
            difference = (loss(positions + half) - loss(positions - half)) * size
            torch.testing.assert_close(positions.grad[..., axis], difference)


def test_gradient_to_images_under_patch():
    image = torch.randn(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.rand(1, 2, 2, dtype=torch.float64)
    plain, = torch.autograd.grad(sample_windows(image, positions, 3).square().sum(), image)
    with_positions, _ = torch.autograd.grad(
        sample_windows(image, positions.requires_grad_(), 3).square().sum(), (image, positions))
    torch.testing.assert_close(plain, with_positions)


def test_spot_gradient_is_the_plain_one():
    image = torch.randn(1, 2, 12, 10, dtype=torch.float64)
    positions = 0.3 + 0.4 * torch.rand(1, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: sample_windows(image, p, 3, 'spot'), positions.requires_grad_())


def test_dtypes():
    positions = torch.rand(4, 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert sample_windows(torch.rand(1, 3, 16, 16).to(dtype), positions, 4).dtype == dtype
    image = (torch.rand(1, 3, 16, 16) * 255).to(torch.uint8)
    torch.testing.assert_close(sample_windows(image, positions, 4), sample_windows(image.float(), positions, 4))


@pytest.mark.parametrize('positions, error, says', [
    ([[0.5, 0.5]], TypeError, 'positions must be a tensor'),
    (torch.zeros(3, 2, dtype=torch.int64), TypeError, 'int64'),
    (torch.zeros(3, 2, dtype=torch.bfloat16), TypeError, 'bfloat16'),
    (torch.zeros(3, 3), ValueError, r'\(3, 3\)'),
    (torch.zeros(3, 4, 2), ValueError, r'\(2, N, 2\)'),
    (torch.zeros(0, 2), ValueError, 'N >= 1'),
    (torch.zeros(3, 2, device='meta'), ValueError, 'meta'),
    (torch.tensor([[0.5, 0.5], [0.5, float('nan')]]), ValueError, r'NaN or infinity, first at index \(1, 1\)'),
    (torch.tensor([[0.5, 0.5], [8., 0.5]]), ValueError, r'hold 8 at index \(1, 0\): .* pixels by \(16, 20\)'),
    (torch.tensor([[[0.5, -5.01]]] * 2), ValueError, r'hold -5.01 at index \(0, 0, 1\): .*never beyond -5 to 6'),
])
def test_bad_positions(positions, error, says):
    with pytest.raises(error, match=says):
        sample_windows(torch.rand(2, 3, 16, 20), positions, 4)


def test_positions_outside_the_image_are_taken():
    """A search moves them there; five image sides away no window sees anything."""
    windows = sample_windows(torch.ones(1, 1, 8, 8), torch.tensor([[-5., 6.], [0., 0.5]]), 4)
    assert not windows[0, 0].any() and windows[0, 1].sum() == 8


def test_bad_images_and_conventions():
    positions = torch.rand(4, 2)
    with pytest.raises(ValueError, match='10 x 20 px are smaller than one window of 16 x 16'):
        sample_windows(torch.rand(1, 3, 10, 20), positions, 16)
    with pytest.raises(ValueError, match=r'\(B, C, H, W\), got \(3, 20, 20\)'):
        sample_windows(torch.rand(3, 20, 20), positions, 16)
    with pytest.raises(ValueError, match="'grid' is unknown, use one of 'patch', 'spot'"):
        sample_windows(torch.rand(1, 3, 20, 20), positions, 16, 'grid')
    with pytest.raises(ValueError, match='at least 2 pixels'):
        sample_windows(torch.rand(1, 3, 20, 20), positions, 1, 'spot')


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 6), H=st.integers(6, 20), W=st.integers(6, 20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    quarters=st.lists(st.tuples(st.integers(-40, 120), st.integers(-40, 120)), min_size=1, max_size=4))
def test_windows_read_for_the_gradient_are_the_plain_ones(k, H, W, dtype, quarters):
    # Quarters of pixels: on pixel centres, between them, at the border and outside.
    image = torch.rand(2, 2, H, W, generator=torch.Generator().manual_seed(k), dtype=dtype)
    positions = torch.tensor(quarters, dtype=dtype) / 4 / torch.tensor([H, W])
    plain = sample_windows(image, positions, k)
    torch.testing.assert_close(
        sample_windows(image, positions.requires_grad_(), k).detach(), plain, rtol=0,
        atol=1e-4 if dtype == torch.float32 else 1e-9)


def test_spot_reads_nothing_at_the_last_pixel_itself():
    """A sample counts where 0 <= index < L - 1: index 0 does, index L - 1 does not."""
    image = torch.arange(1., 17.).view(1, 1, 4, 4)
    # Samples of a 2 px window lie at p * 4 +- 1: at 1 and 3, and at 0 and 2.
    assert sample_windows(image, torch.tensor([[0.5, 0.5]]), 2, 'spot').flatten().tolist() == [6., 0., 0., 0.]
    assert sample_windows(image, torch.tensor([[0.25, 0.25]]), 2, 'spot').flatten().tolist() == [
        1., 3., 9., 11.]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2 ** 20), window=st.integers(1, 9), H=st.integers(9, 40), W=st.integers(9, 40))
def test_spacing_1_is_the_window_of_single_pixels_to_the_last_bit(seed, window, H, W):
    torch.manual_seed(seed)
    images, positions = torch.rand(2, 3, H, W), torch.rand(2, 4, 2) * 1.4 - 0.2
    plain = sample_windows(images, positions, window)
    for spacing in (1, 1., torch.ones(2, 4), torch.ones(2, 4, 2)):
        assert torch.equal(sample_windows(images, positions, window, spacing=spacing), plain)
    mixed = torch.ones(2, 4, 2)
    mixed[:, 2] = 3.3
    read = sample_windows(images, positions, window, spacing=mixed)
    assert torch.equal(read[:, [0, 1, 3]], plain[:, [0, 1, 3]])
    followed = sample_windows(images, positions, window, spacing=torch.ones(2, 4, 2, requires_grad=True))
    assert torch.equal(followed, plain) and followed.requires_grad


def test_spacing_of_both_axes_alike_is_one_number():
    images, positions = torch.rand(2, 3, 48, 40), torch.rand(2, 4, 2)
    one = sample_windows(images, positions, 6, spacing=2.6)
    assert torch.equal(one, sample_windows(images, positions, 6, spacing=torch.full((2, 4), 2.6)))
    assert torch.equal(one, sample_windows(images, positions, 6, spacing=torch.full((2, 4, 2), 2.6)))
    shared = sample_windows(images, positions[0], 6, spacing=torch.full((4,), 2.6))
    torch.testing.assert_close(shared[0], one[0])


@pytest.mark.parametrize('n, exactly', [(16, True), (4, True), (25, False)])
def test_an_even_lattice_at_its_cells_reads_the_resized_picture(n, exactly):
    """Of 224 px and windows of 14: halved and quartered exactly; resized to 70 px to the error of the blur."""
    side = int(n ** 0.5)
    y, x = torch.meshgrid(torch.linspace(0, 6, 224), torch.linspace(0, 4, 224), indexing='ij')
    images = torch.stack([y.sin() * x.cos(), (x * y / 4).sin(), x - y])[None]
    axis = (torch.arange(side) + 0.5) / side
    read = sample_windows(images, torch.cartesian_prod(axis, axis), 14, spacing=224 / side / 14)
    small = F.interpolate(images, (14 * side, 14 * side), mode='area' if exactly else 'bilinear', antialias=not exactly)
    patches = small.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    if exactly:
        torch.testing.assert_close(read, patches, rtol=0, atol=1e-5)
    else:
        inside = (read - patches)[..., 1:-1, 1:-1].reshape(1, side, side, 3, 12, 12)
        assert inside.abs().max() < 0.02


def test_a_small_step_of_size_from_single_pixels_has_a_derivative():
    """At spacing 1 the value is that without a size, but there is a way on, towards coarser windows."""
    y = torch.linspace(0, 1, 64).sin()[:, None].expand(64, 64)[None, None]
    spacing = torch.ones(1, 1, requires_grad=True)
    rows = sample_windows(y, torch.full((1, 1, 2), 0.5), 8, spacing=spacing)[0, 0, 0, :, 0]
    first, = torch.autograd.grad(rows[0], spacing, retain_graph=True)
    last, = torch.autograd.grad(rows[-1], spacing)
    wider = sample_windows(y, torch.full((1, 1, 2), 0.5), 8, spacing=1.1)[0, 0, 0, :, 0]
    assert first.item() == pytest.approx((wider[0] - rows[0]).item() / 0.1, rel=0.2)
    assert last.item() == pytest.approx((wider[-1] - rows[-1]).item() / 0.1, rel=0.2)


@pytest.mark.parametrize('spacing, error, says', [
    (0., ValueError, r'spacing of shape \(1, 3, 2\) is 0 at index \(0, 0, 0\)'),
    (-1., ValueError, 'lies above 0'),
    (float('nan'), ValueError, 'is nan at index'),
    (100., ValueError, 'at most the longer side of the image, 20'),
    (torch.ones(1, 4), ValueError, r'number or have shape \(1, 3\) or \(1, 3, 2\).*got \(1, 4\)'),
    (torch.ones(1, 3, dtype=torch.float16), TypeError, 'spacing must be float32'),
])
def test_spacings_that_are_none(spacing, error, says):
    with pytest.raises(error, match=says):
        sample_windows(torch.rand(1, 3, 16, 20), torch.rand(1, 3, 2), 4, spacing=spacing)


def test_sizes_are_for_patch_and_have_an_argument_of_their_own():
    images = torch.rand(1, 3, 16, 20)
    with pytest.raises(ValueError, match=r"spacing=2\.0 sizes windows, but under convention='spot'"):
        sample_windows(images, torch.rand(1, 3, 2), 4, 'spot', spacing=2.)
    with pytest.raises(ValueError, match=r'shape \(1, N, 2\) or \(N, 2\), got \(1, 3, 3\): spacings are given by'):
        sample_windows(images, torch.rand(1, 3, 3), 4)


def test_a_window_may_be_as_coarse_as_the_longer_side():
    images, middle = torch.rand(1, 1, 4, 6), torch.tensor([[0.5, 0.5]])
    assert sample_windows(images, middle, 2, spacing=6.).shape == (1, 1, 1, 2, 2)
    with pytest.raises(ValueError, match=r'is at most the longer side of the image, 6'):
        sample_windows(images, middle, 2, spacing=6.01)


@pytest.mark.parametrize('window', [3, 4])
def test_a_block_holds_all_that_its_window_reads(window):
    images, positions = torch.rand(2, 3, 12, 15), torch.rand(2, 300, 2, requires_grad=True)
    blocks, inside = gather_blocks(images, positions, window)
    found = read_windows(blocks, inside, window, 'patch').view(2, 300, 3, window, window)
    expected = read_windows(images, positions, window, 'patch')
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = torch.randn_like(found)
    # The derivative reads half a pixel further on both sides.
    gradients = [torch.autograd.grad((out * weights).sum(), positions)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-2)
