from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from conftest import random_vit
from dht_golden import load, make_model
from safetensors.torch import save_file

from timm_spot.models import Regions
from timm_spot.models.dht_checkpoint import checkpoint_filter_fn
from timm_spot.ops.regions.features import position_histogram


def patch_regions(images, side):
    """The patch grid of a ViT as if the tokenizer had found it, with every colour the mean that it replaces."""
    B, _, H, W = images.shape
    grid = (torch.arange(H)[:, None] // side) * (W // side) + torch.arange(W) // side
    n = grid.max().item() + 1
    y, x = torch.arange(n) // (W // side) * side, torch.arange(n) % (W // side) * side
    boxes = torch.stack([y, x, y + side - 1, x + side - 1]).repeat(1, B)
    return Regions(
        pieces=grid, segmentation=grid + n * torch.arange(B)[:, None, None], injected=images.permute(0, 2, 3, 1),
        boxes=boxes, counts=torch.full((B,), n), colors=torch.zeros(B * n, 3), sizes=torch.full((B * n,), side ** 2),
        image=torch.arange(B).repeat_interleave(n), gradient=None, hierarchy=None)


@pytest.mark.parametrize('source, name', [
    ('vit_small_patch16_224', 'dht_vit_small_patch16_in21k'), ('vit_base_patch16_224', 'dht_vit_base_patch16_in1k')])
@torch.no_grad()
def test_regions_that_are_patches_give_the_logits_of_the_vit(source, name, tmp_path, monkeypatch):
    vit = random_vit(source, depth=2, norm_layer=partial(torch.nn.LayerNorm, eps=1e-5))  # timm's eps is 1e-6
    file = tmp_path / 'vit.safetensors'
    save_file(vit.state_dict(), file)
    model = timm.create_model(name, pretrained=True, depth=2, pretrained_cfg_overlay=dict(file=str(file))).eval()
    images = torch.randn(2, 3, 224, 224)
    monkeypatch.setattr(model.patch_embed.tokenizer, 'forward', lambda images, *_, **__: patch_regions(images, 16))
    expected = vit(images)
    assert (model(images) - expected).norm() < 2e-4 * expected.norm()


@torch.no_grad()
def test_a_saved_model_comes_back(tmp_path):
    model = timm.create_model('dht_vit_pico_patch8_64', embed_dim=32, depth=1, n_tokens=9).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(1, 3, 32, 32)
    assert again.n_tokens == 9
    torch.testing.assert_close(again(images), model(images))


def test_q_norm_and_k_norm_change_places():
    tensors, _ = load('dense_64x64')
    model = timm.create_model(
        'dht_vit_pico_patch8_64', embed_dim=32, depth=2, num_heads=4, qk_norm=True, pos_size=4,
        tokenizer=dict(hid_ch=8, compute_grad=True))
    weights = {k.removeprefix('model.'): v for k, v in tensors.items() if k.startswith('model.')}
    out = checkpoint_filter_fn(weights, model)
    assert torch.equal(out['blocks.1.attn.q_norm.weight'], weights['blocks.1.attn.k_norm.weight'])
    assert torch.equal(out['blocks.1.attn.k_norm.bias'], weights['blocks.1.attn.q_norm.bias'])


@torch.no_grad()
def test_resized_positions_mean_the_same():
    """Quarters of the old cells, each with a quarter of the share and, by the new scale, a quarter of its value."""
    tensors, config = load('classifier_64x64')
    weights = {k.removeprefix('model.'): v for k, v in tensors.items() if k.startswith('model.')}
    weights['embedder.proj.weight'][:, 192:] = torch.linspace(-1, 1, 32)[:, None]  # constant: resizing changes nothing
    old = make_model(tensors, config, prefix='model.', depth=2, num_heads=4)
    new = timm.create_model(
        'dht_vit_pico_patch8_64', embed_dim=32, depth=2, pos_size=16, tokenizer=dict(compute_grad=True))
    for model in (old, new):
        before = dict(model.patch_embed.__dict__), type(model.norm_pre), dict(getattr(model, '_model_args', {}))
        model.load_state_dict(checkpoint_filter_fn(weights, model))
        # The filter leaves the model as it is.
        assert (dict(model.patch_embed.__dict__), type(model.norm_pre), getattr(model, '_model_args', {})) == before
    assert (new.patch_embed.grad_proj.weight == 0).all()
    segmentation = torch.arange(64).view(8, 8).repeat_interleave(8, 0).repeat_interleave(8, 1)[None] // 3
    sizes = torch.bincount(segmentation.flatten())
    tokens = [
        model.patch_embed.pos_proj(position_histogram(
            segmentation, sizes, model.patch_embed.pos_size, model.patch_embed.pos_scale).flatten(1))
        for model in (old, new)]
    torch.testing.assert_close(tokens[1], tokens[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('key', ['embedder.cls_token', 'extractor.pixel_mask_token'])
def test_an_authors_checkpoint_without_a_tensor_is_refused(key):
    weights = {k.removeprefix('model.'): v for k, v in load('classifier_64x64')[0].items() if k.startswith('model.')}
    del weights[key]
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        checkpoint_filter_fn(weights, timm.create_model('dht_vit_pico_patch8_64', embed_dim=32, depth=2))


@pytest.mark.parametrize('weights, match', [
    ({'conv1.weight': torch.zeros(1)}, "none of.*'conv1.weight'"),
    ({'patch_embed.proj.weight': torch.zeros(1), 'patch_embed.pos_proj.weight': torch.zeros(1)}, 'none of'),
])
def test_unknown_checkpoints_are_refused(weights, match):
    model = timm.create_model('dht_vit_pico_patch8_64', embed_dim=32, depth=1)
    with pytest.raises(ValueError, match=match):
        checkpoint_filter_fn(weights, model)


def test_other_windows_are_refused():
    weights = {k.removeprefix('model.'): v for k, v in load('classifier_64x64')[0].items() if k.startswith('model.')}
    model = timm.create_model('dht_vit_pico_patch8_64', embed_dim=32, depth=2, patch_size=16)
    with pytest.raises(ValueError, match='windows of 8 px'):
        checkpoint_filter_fn(weights, model)
