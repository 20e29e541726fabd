from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import tiny_vit

from timm_spot.models.attention_saliency import attention_saliency

PICO = 'spot_vit_pico_patch8_64'


def test_attention_by_hand():
    vit = tiny_vit().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        x = vit.blocks[1].norm1(vit.blocks[0](x))
        q, k, _ = vit.blocks[1].attn.qkv(x).view(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / 4).softmax(dim=-1)[:, :, 0, 1:].mean(dim=1).view(2, 4, 4)
    maps = attention_saliency(vit, images)
    assert attention.std() > 0.01
    expected = F.interpolate(attention[:, None], (64, 64), mode='bilinear')[:, 0]
    torch.testing.assert_close(maps, expected / expected.sum(dim=(1, 2), keepdim=True), rtol=1e-4, atol=0)


@pytest.mark.parametrize('keywords', [
    dict(), dict(global_pool='avg'), dict(reg_tokens=4), dict(reg_tokens=4, no_embed_class=True),
    dict(dynamic_img_size=True), dict(qk_norm=True), dict(init_values=1e-3)])
def test_fused_and_unfused_attention_give_the_same_map(keywords):
    vit, images = tiny_vit(**keywords), torch.randn(2, 3, 96, 80)
    maps = []
    for fused in (True, False):
        for block in vit.blocks:
            block.attn.fused_attn = fused
        maps.append(attention_saliency(vit, images))
    assert maps[0].shape == (2, 96, 80) and (maps[0] >= 0).all()
    torch.testing.assert_close(maps[0].sum(dim=(1, 2)), torch.ones(2))
    scale = maps[0].amax()
    torch.testing.assert_close(maps[0] / scale, maps[1] / scale, rtol=0, atol=1e-5)


def test_attention_saliency_leaves_the_vit_unchanged():
    vit = tiny_vit(drop_rate=0.5, drop_path_rate=0.5)
    vit.blocks[0].eval()  # modes may be mixed
    before = copy.deepcopy(vit)
    attention_saliency(vit, torch.randn(1, 3, 64, 64))
    assert [(n, m.training, getattr(m, 'fused_attn', None), len(m._forward_pre_hooks)) for n, m in vit.named_modules()
            ] == [(n, m.training, getattr(m, 'fused_attn', None), 0) for n, m in before.named_modules()]
    for a, b in zip(vit.state_dict().values(), before.state_dict().values()):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in vit.parameters())


def test_attention_saliency_restores_the_vit_after_an_error():
    vit = tiny_vit()
    fused = vit.blocks[-1].attn.fused_attn
    with pytest.raises(RuntimeError):
        attention_saliency(vit, torch.randn(1, 5, 64, 64))
    assert vit.training and vit.blocks[-1].attn.fused_attn == fused
    assert not vit.blocks[-1].attn.attn_drop._forward_pre_hooks


def test_blocks_differ():
    vit, images = tiny_vit(), torch.randn(1, 3, 64, 64)
    first, last = attention_saliency(vit, images, block=0), attention_saliency(vit, images)
    assert not torch.allclose(first, last, rtol=1e-2)
    assert torch.equal(last, attention_saliency(vit, images, block=1))
    with pytest.raises(ValueError, match='block=2 does not exist, vit has 2 blocks'):
        attention_saliency(vit, images, block=2)


def test_attention_of_a_subpixel_vit_on_a_lattice():
    model = timm.create_model(PICO, n_tokens=12).eval()
    assert attention_saliency(model, torch.randn(1, 3, 96, 128)).shape == (1, 96, 128)
    model.set_placement(sampler='sobol')
    with pytest.raises(ValueError, match='no lattice'):
        attention_saliency(model, torch.randn(1, 3, 96, 128))


def test_attention_saliency_says_what_it_cannot_read():
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match='no class token'):
        attention_saliency(tiny_vit(class_token=False, global_pool='avg'), images)
    with pytest.raises(TypeError, match="got Linear without 'patch_embed'"):
        attention_saliency(torch.nn.Linear(2, 2), images)
    with pytest.raises(TypeError, match='attention of its own'):
        attention_saliency(timm.create_model('cait_xxs24_224', img_size=64, depth=1), images)
    with pytest.raises(ValueError, match=r'got \(3, 64, 64\)'):
        attention_saliency(tiny_vit(), images[0])


@pytest.mark.parametrize('name', ['eva02_tiny_patch14_224', 'vit_small_patch16_dinov3'])
def test_attention_with_rotary_positions_is_read_as_it_is(name):
    torch.manual_seed(0)
    size = 64 if 'dinov3' in name else 56
    vit = timm.create_model(name, img_size=size, depth=2)
    with torch.no_grad():
        for p in vit.parameters():  # fresh weights attend to everything alike
            if p.ndim > 1:
                p.normal_(std=0.2)
    images, layer, seen = torch.randn(2, 3, size, size), vit.blocks[-1].attn, []
    maps = attention_saliency(vit, images)
    assert vit.training and all(module.training for module in vit.modules())

    layer.fused_attn = False
    layer.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        vit.eval()(images)
    attention = seen[0][:, :, 0, -16:].mean(dim=1).unflatten(1, (4, 4))
    assert attention.std() > 0.001
    expected = F.interpolate(attention[:, None], (size, size), mode='bilinear')[:, 0]
    torch.testing.assert_close(maps, expected / expected.sum(dim=(1, 2), keepdim=True), rtol=1e-4, atol=1e-7)


def test_hooks_of_the_block_that_is_read_are_called():
    vit, calls = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2), []
    for module in (vit.blocks[1], vit.blocks[1].attn, vit.blocks[1].attn.qkv):
        module.register_forward_hook(lambda *_: calls.append(1))
    attention_saliency(vit, torch.randn(1, 3, 32, 32))
    assert len(calls) == 3


def test_attention_that_patches_receive_by_hand():
    """The mean over the patches as queries, with class token and without."""
    for keywords in (dict(), dict(class_token=False, global_pool='avg')):
        vit, images = tiny_vit(**keywords).eval(), torch.randn(2, 3, 64, 64)
        n = 16 + vit.num_prefix_tokens
        with torch.no_grad():
            x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
            x = vit.blocks[1].norm1(vit.blocks[0](x))
            q, k, _ = vit.blocks[1].attn.qkv(x).view(2, n, 3, 2, 16).permute(2, 0, 3, 1, 4)
            attention = (q @ k.transpose(-1, -2) / 4).softmax(dim=-1)[:, :, -16:, -16:].mean(dim=(1, 2)).view(2, 4, 4)
        expected = F.interpolate(attention[:, None], (64, 64), mode='bilinear')[:, 0]
        maps = attention_saliency(vit, images, queries='patches')
        torch.testing.assert_close(maps, expected / expected.sum(dim=(1, 2), keepdim=True), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="queries='all' must be 'class' or 'patches'"):
        attention_saliency(vit, images, queries='all')
