from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_spot
from timm_spot.tasks.evaluation.baselines import LowRes, patch_drop, random_patches, shrunk_grid, top_k


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model(
        'vit_tiny_patch16_224', img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=10).eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_all_patches_is_the_vit_itself(vit, images):
    full = vit.forward_features(images)
    torch.testing.assert_close(patch_drop(vit, images, torch.arange(64).expand(3, -1)), full)
    torch.testing.assert_close(LowRes(vit)(images, 64), full, atol=1e-4, rtol=1e-4)
    # In another order, which means nothing to a ViT.
    torch.testing.assert_close(
        vit.forward_head(top_k(vit, images, 64)), vit.forward_head(full), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_same_patches_of_a_vit_and_of_its_subpixel_twin(vit, images):
    spot = timm_spot.retrofit(vit).eval()
    kept = torch.stack([random_patches(64, 9, torch.Generator().manual_seed(i)) for i in range(3)])
    logits = vit.forward_head(patch_drop(vit, images, kept))
    torch.testing.assert_close(spot.forward_head(patch_drop(spot, images, kept)), logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        spot.forward_head(top_k(spot, images, 9)), vit.forward_head(top_k(vit, images, 9)), atol=1e-4, rtol=1e-4)
    centres = timm_spot.sample_positions('grid', 64, (64, 64), window=8)[0]
    torch.testing.assert_close(spot(images, centres[kept]), logits, atol=1e-4, rtol=1e-4)


def test_low_res_resamples_the_table_as_timm_does(vit, images):
    small = F.interpolate(images, (40, 40), mode='bicubic', antialias=True)
    resized = timm.create_model(
        'vit_tiny_patch16_224', img_size=40, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=10).eval()
    state = vit.state_dict()
    state['pos_embed'] = timm.layers.resample_abs_pos_embed(state['pos_embed'], [5, 5], old_size=[8, 8])
    resized.load_state_dict(state)
    with torch.inference_mode():
        torch.testing.assert_close(LowRes(vit)(images, 25), resized.forward_features(small), atol=1e-5, rtol=1e-4)
    assert vit.patch_embed.grid_size == (8, 8)


@torch.inference_mode()
def test_top_k_keeps_what_the_class_token_attends_to(vit, images):
    x = vit.blocks[0](vit._pos_embed(vit.patch_embed(images)))
    block = vit.blocks[1]  # a quarter of the depth in
    query, key, _ = block.attn.qkv(block.norm1(x)).view(3, 65, 3, 4, 16).unbind(dim=2)
    attention = torch.einsum('bhc,bnhc->bhn', query[:, 0], key).div(4.).softmax(dim=-1).mean(dim=1)
    kept = [[0] + sorted(1 + i for i in row.argsort(descending=True)[:9].tolist()) for row in attention[:, 1:]]
    x = block(x)
    x = torch.stack([tokens[rows] for tokens, rows in zip(x, kept)])
    expected = vit.norm(vit.blocks[3](vit.blocks[2](x)))
    torch.testing.assert_close(top_k(vit, images, 9), expected, atol=1e-5, rtol=1e-4)  # fused attention in the others


@torch.inference_mode()
def test_top_k_is_pruning_by_class_attention_at_one_stage(vit, images):
    sparse = timm_spot.sparsify(vit, 9 / 64, stages=(2,), scorer='cls-attention')
    torch.testing.assert_close(top_k(vit, images, 9), sparse.forward_features(images))
    assert sparse.kept_tokens(images)[0].shape == (3, 9)


@torch.inference_mode()
def test_top_k_leaves_the_vit_as_it_is_and_keeps_every_prefix_token(images):
    vit = timm.create_model(
        'vit_tiny_patch16_224', img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=4, reg_tokens=3).eval()
    def state():
        return {name: (m.training, getattr(m, 'fused_attn', None)) for name, m in vit.named_modules()}

    before = state()
    assert top_k(vit, images, 5).shape == (3, 1 + 3 + 5, 64)
    assert state() == before


@torch.inference_mode()
def test_a_pruning_model_is_a_baseline_like_any_vit(vit, images):
    sparse = timm_spot.sparsify(vit, 0.5, scorer='norm')
    torch.testing.assert_close(top_k(sparse, images, 9), top_k(vit, images, 9))
    kept = torch.arange(9).expand(3, -1)
    torch.testing.assert_close(patch_drop(sparse, images, kept), patch_drop(vit, images, kept))


def test_random_patches_are_distinct():
    drawn = random_patches(64, 25, torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == 25


@pytest.mark.parametrize('size, n, grid', [((224, 224), 49, (7, 7)), ((96, 128), 12, (3, 4)), ((64, 64), 1, (1, 1))])
def test_shrunk_grid(size, n, grid):
    assert shrunk_grid(size, n) == grid


def test_errors(vit, images, pico):
    with pytest.raises(ValueError, match='n_tokens=24 is no patch grid'):
        shrunk_grid((64, 64), 24)
    with pytest.raises(ValueError, match='n_tokens=65 exceeds the 64 patches'):
        random_patches(64, 65, torch.Generator())
    with pytest.raises(ValueError, match='n_tokens=65 exceeds the 64 patches'):
        top_k(vit, images, 65)
    pooled = timm.create_model('vit_tiny_patch16_224', img_size=64, patch_size=8, class_token=False, global_pool='avg')
    with pytest.raises(ValueError, match='top-k needs a class token'):
        top_k(pooled, images, 9)
