"""Models other than timm's VisionTransformer; that one is in tests/tasks/pictures/test_saliency_maps.py."""
from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_spot.models.attention_saliency import attention_saliency


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
