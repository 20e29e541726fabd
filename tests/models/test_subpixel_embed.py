from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import PatchEmbed

import timm_spot
from timm_spot.models import SubpixelEmbed


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
    embed = SubpixelEmbed(patch_size=8, embed_dim=32, sampler='grid')
    patch_embed = PatchEmbed(img_size=size, patch_size=8, embed_dim=32)
    patch_embed.proj = embed.proj
    torch.nn.init.zeros_(embed.pos_proj.weight)
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(embed(images), patch_embed(images), rtol=0, atol=1e-4)


def test_budget_follows_the_image_unless_given():
    embed = SubpixelEmbed(img_size=64, patch_size=8, embed_dim=16)
    assert embed.num_patches == 64 and embed.grid_size == (8, 8)
    assert embed(torch.rand(1, 3, 48, 81)).shape == (1, 60, 16)
    embed.set_placement(n_tokens=7)
    assert embed.num_patches == 7
    assert embed(torch.rand(1, 3, 48, 81)).shape == (1, 7, 16)


def test_eval_placement_is_one_draw_for_all():
    embed = SubpixelEmbed(patch_size=8, embed_dim=16, n_tokens=5, sampler='uniform').eval()
    images = torch.rand(3, 3, 32, 40)
    placement = embed.place(images)
    assert torch.equal(placement[0], placement[1])
    assert torch.equal(placement, embed.place(images))
    assert torch.equal(placement[:1], embed.place(images[2:]))
    embed.set_placement(seed=1)
    assert not torch.equal(placement, embed.place(images))


@pytest.mark.parametrize('sampler', ['uniform', 'gaussian', 'sobol'])
def test_train_placement_is_drawn_anew(sampler):
    embed = SubpixelEmbed(patch_size=8, embed_dim=16, n_tokens=5, sampler=sampler).train()
    images = torch.rand(2, 3, 32, 32)
    torch.manual_seed(0)
    first = embed.place(images)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, embed.place(images))
    torch.manual_seed(0)
    assert torch.equal(first, embed.place(images))


def test_placement_drawn_in_inference_mode_serves_training():
    embed = SubpixelEmbed(patch_size=8, embed_dim=16, n_tokens=11, sampler='isotropic')
    with torch.inference_mode():
        embed(torch.rand(1, 3, 33, 35))
    embed(torch.rand(1, 3, 33, 35)).sum().backward()
    assert embed.pos_proj.weight.grad is not None


def test_saliency_of_a_model():
    maps = torch.zeros(2, 32, 32)
    maps[0, 3, 4] = maps[1, 20, 30] = 1
    embed = SubpixelEmbed(patch_size=8, embed_dim=16, n_tokens=6, sampler='salient', saliency=maps).eval()
    images = torch.rand(2, 3, 32, 32)
    pixels = (embed.place(images) * 32).floor()
    assert (pixels[0] == torch.tensor([3., 4.])).all() and (pixels[1] == torch.tensor([20., 30.])).all()

    embed.set_placement(saliency=lambda x: x.mean(dim=1))
    together = embed.place(images)
    # Sums over a batch and over one image may round differently; 1e-6 is a thirty-thousandth of a pixel.
    torch.testing.assert_close(together[1:], embed.place(images[1:]), rtol=0, atol=1e-6)
    assert not torch.equal(embed.train().place(images), together)
    embed.set_placement(saliency='spectral_residual')
    torch.testing.assert_close(embed.eval().place(images)[1:], embed.place(images[1:]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="saliency='no such thing' is unknown"):
        embed.set_placement(saliency='no such thing')
    with pytest.raises(TypeError, match=r"saliency must be .* got 3\."):
        embed.set_placement(saliency=3)
    with pytest.raises(ValueError, match="needs a saliency map: pass saliency='spectral_residual'"):
        SubpixelEmbed(patch_size=8, embed_dim=16, n_tokens=6, sampler='salient')


def test_a_network_as_saliency_adds_no_weights_to_the_model():
    embed = SubpixelEmbed(patch_size=8, embed_dim=16, n_tokens=6, sampler='salient', saliency=lambda x: x.mean(dim=1))
    names = set(embed.state_dict())
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Softplus(), torch.nn.Flatten(1, 2))
    embed.set_placement(saliency=network)
    assert set(embed.state_dict()) == names
    assert embed.saliency is network
    assert embed.place(torch.rand(2, 3, 32, 32)).shape == (2, 6, 2)


def test_saliency_of_another_batch_size_is_refused():
    maps = torch.ones(2, 32, 32)
    embed = SubpixelEmbed(patch_size=8, embed_dim=16, n_tokens=6, sampler='salient', saliency=maps).eval()
    with pytest.raises(ValueError, match=r'saliency of shape \(2, 32, 32\) does not match a batch of 3 images'):
        embed(torch.rand(3, 3, 32, 32))


def test_coordinates_stay_float32():
    embed = SubpixelEmbed(patch_size=8, embed_dim=16, n_tokens=9)
    images = torch.rand(1, 3, 64, 64)
    exact = embed(images)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(embed(images).float(), exact, rtol=0.02, atol=0.02)
    assert embed.place(images.bfloat16()).dtype == torch.float32
    low = embed.bfloat16()(images.bfloat16())
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
    assert embed(torch.rand(1, 3, 96, 96)).shape == (1, 144, 16)
    with pytest.raises(ValueError, match="under convention='spot' the position feature is tied"):
        SubpixelEmbed(patch_size=16, embed_dim=16, convention='spot').set_input_size(patch_size=8)


def test_map_size_of_the_sampler():
    embed = SubpixelEmbed(patch_size=8, embed_dim=16, n_tokens=12)
    assert embed.dynamic_feat_size((96, 128)) == (3, 4)
    embed.set_placement(n_tokens=11)
    with pytest.raises(ValueError, match=r"'isotropic' places 11 tokens on no lattice of .* 96 x 128 px.*'NLC'"):
        embed.dynamic_feat_size((96, 128))
    embed.set_placement(n_tokens=12, sampler='uniform')
    with pytest.raises(ValueError, match="'uniform' places 12 tokens on no lattice"):
        embed.dynamic_feat_size((96, 128))


@pytest.mark.parametrize('kwargs, error, says', [
    (dict(sampler='triangle'), ValueError, "sampler='triangle' is unknown"),
    (dict(convention='vit'), ValueError, "convention='vit' is unknown"),
    (dict(n_tokens=0), ValueError, 'n_tokens=0'),
    (dict(patch_size=(16, 8)), ValueError, r'patch_size=\(16, 8\)'),
    (dict(convention='spot', pos_nodes=20), ValueError, r'pos_nodes=20 must equal the window \(16\)'),
    (dict(pos_nodes=1), ValueError, 'at least 2 nodes'),
])
def test_bad_arguments(kwargs, error, says):
    with pytest.raises(error, match=says):
        SubpixelEmbed(embed_dim=16, **kwargs)


def test_place_is_what_sample_positions_draws():
    embed = SubpixelEmbed(patch_size=8, embed_dim=16, n_tokens=5, sampler='sobol', seed=3).eval()
    expected = timm_spot.sample_positions('sobol', 5, (32, 40), generator=torch.Generator().manual_seed(3))
    assert torch.equal(embed.place(torch.rand(1, 3, 32, 40)), expected)


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
        embed.set_placement(n_tokens=n_tokens)
        torch.testing.assert_close(embed(images), embed(images / 127.5 - 1), rtol=0, atol=2e-4)


def test_uint8_images_need_a_known_normalisation():
    embed = SubpixelEmbed(patch_size=8, embed_dim=16, n_tokens=4, in_chans=1)
    image = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r'uint8.*set_normalization\(mean, std\)'):
        embed(image)
    embed.set_normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))  # of colour images: the average
    torch.testing.assert_close(embed(image), embed(torch.full((1, 1, 32, 32), 2.)))


def test_shared_placement_gives_what_its_copies_give():
    embed = SubpixelEmbed(patch_size=8, embed_dim=16, n_tokens=9)
    images, position = torch.randn(3, 3, 64, 64), torch.rand(9, 2, requires_grad=True)
    copies = position.detach().repeat(3, 1, 1).requires_grad_()
    torch.testing.assert_close(embed(images, position), embed(images, copies))
    torch.testing.assert_close(embed(images), embed(images, embed.place(images).clone()))
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
