from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import PatchEmbed

import timm_spot
from timm_spot.models import SubpixelEmbed
from timm_spot.models.subpixel_embed import WindowProjection


def test_golden_tokens(golden):
    embed = SubpixelEmbed(embed_dim=64, convention='spot')
    weight = golden['authors']['embedder.emb.weight']
    with torch.no_grad():
        embed.proj.weight.copy_(weight[:, :768].view(64, 3, 16, 16))
        embed.proj.bias.copy_(golden['authors']['embedder.emb.bias'])
        embed.pos_proj.weight.copy_(weight[:, 768:])
        embed.n_sigma.copy_(torch.nn.functional.softplus(golden['authors']['tokenizer._n_sigma'])[0])
    tokens = embed(golden['image'], golden['positions'])  # the file has the class token before them
    torch.testing.assert_close(tokens, golden['embedded_tokens'][:, 1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize('size', [(64, 64), (48, 80), (50, 71)])
def test_grid_equals_timm_s_patch_embed(size):
    embed = SubpixelEmbed(patch_size=8, embed_dim=32)
    patch_embed = PatchEmbed(img_size=size, patch_size=8, embed_dim=32)
    patch_embed.proj = embed.proj
    torch.nn.init.zeros_(embed.pos_proj.weight)
    images = torch.randn(2, 3, *size)
    grid = timm_spot.sample_positions('grid', (size[0] // 8) * (size[1] // 8), size, window=8)[0]
    torch.testing.assert_close(embed(images, grid), patch_embed(images), rtol=0, atol=1e-4)


def test_coordinates_stay_float32():
    embed = SubpixelEmbed(patch_size=8, embed_dim=16)
    images, positions = torch.rand(1, 3, 64, 64), timm_spot.sample_positions('isotropic', 9, (64, 64))
    exact = embed(images, positions)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(embed(images, positions).float(), exact, rtol=0.02, atol=0.02)
    low = embed.bfloat16()(images.bfloat16(), positions)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0.03, atol=0.03)


def test_set_input_size_resamples_the_projection():
    embed = SubpixelEmbed(img_size=64, patch_size=16, embed_dim=16)
    embed.set_input_size(img_size=96)
    assert embed.num_patches == 36
    embed.proj.weight.requires_grad_(False)
    embed.set_input_size(patch_size=8)
    assert embed.window == 8 and embed.num_patches == 144 and embed.proj.weight.shape == (16, 3, 8, 8)
    assert not embed.proj.weight.requires_grad and embed.proj.bias.requires_grad
    assert embed(torch.rand(1, 3, 96, 96), torch.rand(7, 2)).shape == (1, 7, 16)
    with pytest.raises(ValueError, match="under convention='spot' the position feature is tied"):
        SubpixelEmbed(patch_size=16, embed_dim=16, convention='spot').set_input_size(patch_size=8)


@pytest.mark.parametrize('kwargs, error, says', [
    (dict(convention='vit'), ValueError, "convention='vit' is unknown"),
    (dict(patch_size=(16, 8)), ValueError, r'patch_size=\(16, 8\)'),
    (dict(convention='spot', pos_nodes=20), ValueError, r'pos_nodes=20 must equal the window \(16\)'),
    (dict(pos_nodes=1), ValueError, 'at least 2 nodes'),
])
def test_bad_arguments(kwargs, error, says):
    with pytest.raises(error, match=says):
        SubpixelEmbed(embed_dim=16, **kwargs)


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 6), H=st.integers(8, 40), W=st.integers(8, 40), n=st.integers(1, 5), seed=st.integers(0, 1000),
    convention=st.sampled_from(['patch', 'spot']))
def test_uint8_images_give_what_normalised_ones_give(k, H, W, n, seed, convention):
    g = torch.Generator().manual_seed(seed)
    embed = SubpixelEmbed(patch_size=max(k, 2), embed_dim=8, convention=convention)
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.25, 0.3])
    embed.set_normalization(mean.tolist(), std.tolist())
    images = torch.randint(256, (2, 3, H, W), generator=g, dtype=torch.uint8)
    normalised = (images / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    positions = (torch.rand(2, n, 2, generator=g) * 1.6 - 0.3).requires_grad_()  # some windows leave the image
    tokens, expected = embed(images, positions), embed(normalised, positions)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-4)
    weight = torch.randn(tokens.shape, generator=g)
    gradient, = torch.autograd.grad((tokens * weight).sum(), positions)
    plain, = torch.autograd.grad((expected * weight).sum(), positions)
    torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())


def test_uint8_images_at_the_sizes_of_a_base_model():
    embed = SubpixelEmbed(embed_dim=8)
    embed.set_normalization((0.5,) * 3, (0.5,) * 3)
    images = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    for n_tokens in (25, 196):  # by blocks, and by converting whole images
        positions = timm_spot.sample_positions('isotropic', n_tokens, (224, 224))[0]
        torch.testing.assert_close(embed(images, positions), embed(images / 127.5 - 1, positions), rtol=0, atol=2e-4)


def test_uint8_images_need_a_known_normalisation():
    embed = SubpixelEmbed(patch_size=8, embed_dim=16, in_chans=1)
    image, positions = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8), torch.tensor([[0.25, 0.25], [0.5, 0.75]])
    with pytest.raises(TypeError, match=r'uint8.*set_normalization\(mean, std\)'):
        embed(image, positions)
    embed.set_normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))  # of colour images: the average
    torch.testing.assert_close(embed(image, positions), embed(torch.full((1, 1, 32, 32), 2.), positions))


def test_shared_placement_gives_what_its_copies_give():
    embed = SubpixelEmbed(patch_size=8, embed_dim=16)
    images, position = torch.randn(3, 3, 64, 64), torch.rand(9, 2, requires_grad=True)
    copies = position.detach().repeat(3, 1, 1).requires_grad_()
    torch.testing.assert_close(embed(images, position), embed(images, copies))
    shared, = torch.autograd.grad(embed(images, position).square().sum(), position)
    each, = torch.autograd.grad(embed(images, copies).square().sum(), copies)
    torch.testing.assert_close(shared, each.sum(dim=0), rtol=1e-4, atol=1e-3)


def test_gradient_of_an_expanded_placement_stays_with_each_image():
    """All images' gradient of the position feature once went to the first image, where they shared memory."""
    embed = SubpixelEmbed(patch_size=8, embed_dim=16)
    images, position = torch.randn(3, 3, 64, 64), torch.rand(9, 2)
    expanded, copies = position.expand(3, -1, -1).requires_grad_(), position.repeat(3, 1, 1).requires_grad_()
    actual, = torch.autograd.grad(embed(images, expanded).square().sum(), expanded)
    expected, = torch.autograd.grad(embed(images, copies).square().sum(), copies)
    torch.testing.assert_close(actual, expected)


def test_the_projection_is_called_as_a_module():
    """Its weight once was read past it: hooks, adapters and offloading had no effect and said nothing."""
    embed = SubpixelEmbed(patch_size=8, embed_dim=16)
    called = []
    embed.proj.register_forward_hook(lambda module, inputs, output: called.append(output.shape) or 2 * output)
    embed.pos_proj.register_forward_hook(lambda module, inputs, output: called.append(output.shape))
    images, positions = torch.rand(2, 3, 32, 32), torch.rand(2, 5, 2)
    doubled = embed(images, positions)
    assert called == [(10, 16, 1, 1), (2, 5, 16)]
    embed.proj._forward_hooks.clear()
    torch.testing.assert_close(doubled - embed(images, positions), embed.proj(
        timm_spot.sample_windows(images, positions, 8).flatten(0, 1)).view(2, 5, 16))


def test_window_projection_is_the_convolution():
    projection = WindowProjection(3, 16, kernel_size=8, stride=8)
    windows = torch.randn(5, 3, 8, 8)
    expected = torch.nn.functional.conv2d(windows, projection.weight, projection.bias, stride=8)
    torch.testing.assert_close(projection(windows), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('shape, says', [
    ((2, 1, 64, 64), r'\(2, 1, 64, 64\) have 1 channels, the model takes 3'),
    ((2, 4, 64, 64), r'\(2, 4, 64, 64\) have 4 channels, the model takes 3'),
    ((0, 3, 64, 64), r'\(0, 3, 64, 64\) hold no image: give at least one'),
])
def test_images_of_other_channels_or_none_are_refused(shape, says):
    model = timm.create_model('spot_vit_pico_patch8_64', depth=1)
    images = torch.zeros(shape)
    with pytest.raises(ValueError, match=says):
        model(images)
    with pytest.raises(ValueError, match=says):
        model.place(images)
    with pytest.raises(ValueError, match=says):
        model(images, positions=torch.full((4, 2), 0.5))
