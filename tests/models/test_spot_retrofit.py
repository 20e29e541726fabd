"""retrofit: any timm VisionTransformer with its weights, and `spot_retrofit` in timm's registry."""
from __future__ import annotations

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

import timm_spot
from timm_spot.models import SubpixelVisionTransformer

# One narrow block of each holds everything that retrofit touches; recipes/retrofit_table.py tries them whole.
NARROW = dict(depth=1, embed_dim=96, num_heads=4)
SOURCES = {
    'vit_tiny_patch16_224': (224, 224),
    'vit_small_patch16_224': (96, 160),
    'vit_base_patch16_224': (160, 96),
    'vit_large_patch16_224': (96, 96),
    'vit_base_patch32_224': (224, 160),
    'vit_base_patch8_224': (64, 96),
    'vit_small_patch14_dinov2': (112, 112),
    'vit_small_patch14_reg4_dinov2': (224, 154),
    'vit_base_patch16_clip_224': (224, 224),
    'vit_base_patch16_siglip_224': (160, 224),
    'deit3_small_patch16_224': (224, 224),
    'deit_base_patch16_224': (128, 96),
    'vit_medium_patch16_reg4_gap_256': (256, 256),
    'vit_so150m_patch16_reg4_gap_256': (192, 256),
    'vit_giant_patch14_reg4_dinov2': (98, 98),  # SwiGLU
    'vit_intern300m_patch14_448': (112, 112),
    'vit_base_patch32_plus_256': (256, 256),
    'vit_large_patch14_xp_224': (112, 112),  # pre_norm and no_embed_class
}


def source(name, **kwargs):
    """A ViT whose random weights all matter: fresh LayerScales and zero biases would hide what hangs on them."""
    torch.manual_seed(0)
    vit = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for key, p in vit.named_parameters():
            if key.endswith('gamma'):
                p.uniform_(0.1, 1)
            elif p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
            elif key in ('cls_token', 'reg_token', 'pos_embed'):
                p.normal_(std=0.5)
    return vit


def tiny(**kwargs):
    return source('vit_tiny_patch16_224', depth=2, img_size=64, **kwargs)


def difference(model, vit, **kwargs):
    images = torch.randn(2, 3, *vit.patch_embed.img_size)
    with torch.no_grad():
        expected = vit(images)
        return ((model(images, **kwargs) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize('name', SOURCES)
def test_logits_are_those_of_the_source_on_the_full_grid(name):
    vit = source(name, img_size=SOURCES[name], **NARROW)
    assert difference(timm_spot.retrofit(vit, sampler='grid'), vit) < 2e-4


@pytest.mark.parametrize('name', SOURCES)
def test_position_feature_is_the_interpolated_table_between_patches(name):
    vit = source(name, img_size=SOURCES[name], **NARROW)
    grid = vit.patch_embed.grid_size
    table = F.interpolate(torch.randn(1, vit.embed_dim, 4, 4), size=grid, mode='bicubic', align_corners=False)
    with torch.no_grad():
        vit.pos_embed[:, -grid[0] * grid[1]:] = table.flatten(2).transpose(1, 2)
        embed = timm_spot.retrofit(vit).patch_embed
        positions = torch.rand(1, 1000, 2)
        expected = F.grid_sample(
            table, 2 * positions.flip(-1)[:, None] - 1, mode='bicubic', padding_mode='border',
            align_corners=False)[0, :, 0].T
        actual = embed.pos_proj(embed.position_feature(positions, *vit.patch_embed.img_size))[0]
    assert (actual - expected).norm() / expected.norm() < 0.04


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.booleans(), st.booleans())
def test_every_grid_and_prefix(rows, columns, reg_tokens, class_token, no_embed_class):
    vit = VisionTransformer(
        img_size=(8 * rows, 8 * columns), patch_size=8, embed_dim=16, depth=1, num_heads=2, reg_tokens=reg_tokens,
        class_token=class_token, no_embed_class=no_embed_class, global_pool='avg').eval()
    assert difference(timm_spot.retrofit(vit, sampler='grid'), vit) < 2e-4


def test_a_grid_that_could_be_another_is_read_as_it_is():
    # 7 x 28 = 14 x 14 patches, and the config says 224 x 224.
    vit = source('vit_tiny_patch16_224', depth=1, img_size=(112, 448))
    assert difference(timm_spot.retrofit(vit, sampler='grid'), vit) < 2e-4


@pytest.mark.parametrize('size', [100, (79, 64), (70, 111)])
def test_an_image_that_is_no_multiple_of_the_patch_loses_its_last_pixels_as_in_the_source(size):
    # As vit_so400m_patch14_siglip_384 has it: 27 patches of 14 px in 384 px.
    vit = source('vit_tiny_patch16_224', depth=1, img_size=size)
    assert difference(timm_spot.retrofit(vit, sampler='grid'), vit) < 2e-4


def test_nodes_follow_the_table():
    nodes = {size: timm_spot.retrofit(source('vit_tiny_patch16_224', depth=1, img_size=size)).patch_embed.pos_nodes
             for size in (64, 256, (64, 272))}
    assert nodes == {64: 16, 256: 16, (64, 272): 19}
    assert timm_spot.retrofit(tiny(), pos_nodes=20).patch_embed.pos_nodes == 20
    with pytest.raises(ValueError, match=r'pos_nodes=3 cannot hold a position table of 4 x 4'):
        timm_spot.retrofit(tiny(), pos_nodes=3)


def test_an_instance_is_left_as_it_was_and_may_be_changed_by_hand():
    vit = tiny()
    vit.blocks[0].mlp = torch.nn.Identity()
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    model = timm_spot.retrofit(vit, sampler='grid')
    assert type(vit) is VisionTransformer and type(model) is SubpixelVisionTransformer
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    assert difference(model, vit) < 2e-4
    model.cls_token.data.zero_()
    assert torch.equal(vit.cls_token, before['cls_token'])


def test_mode_dtype_and_config_carry_over():
    vit = tiny(dtype=torch.bfloat16).train()
    model = timm_spot.retrofit(vit)
    assert model.training and model.patch_embed.training
    assert {v.dtype for v in model.state_dict().values()} == {torch.bfloat16}
    assert model.pretrained_cfg['mean'] == vit.pretrained_cfg['mean']
    assert not timm_spot.retrofit(tiny()).patch_embed.training


def test_a_name_builds_the_source_first():
    torch.manual_seed(1)
    vit = timm.create_model('vit_tiny_patch16_224', depth=1, num_classes=7).eval()
    torch.manual_seed(1)
    model = timm_spot.retrofit('vit_tiny_patch16_224', depth=1, num_classes=7, n_tokens=196, sampler='grid').eval()
    assert difference(model, vit) < 2e-4


def test_a_vit_without_position_table_keeps_having_no_position():
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, pos_embed='none').eval()
    assert difference(timm_spot.retrofit(vit, sampler='grid'), vit) < 2e-4


@pytest.mark.parametrize('name, reason', [
    ('eva02_tiny_patch14_224', 'Eva rotates queries and keys'),
    ('vit_small_patch16_dinov3', 'Eva rotates queries and keys'),
    ('vit_tiny_r_s16_p8_224', 'stem is a HybridEmbed'),
    ('vitamin_small_224', 'stem is a HybridEmbed'),
    ('deit_tiny_distilled_patch16_224', 'distillation token'),
    ('beit_base_patch16_224', 'relative grid positions'),
    ('samvit_base_patch16_224', 'relative grid positions'),
    ('swin_tiny_patch4_window7_224', 'relative grid positions'),
    ('hiera_tiny_224', 'within windows'),
    ('resnet18', 'is a ResNet'),
    ('spot_vit_pico_patch8_64', 'subpixel ViT already'),
])
def test_other_models_are_refused_by_name_and_reason(name, reason):
    with torch.device('meta'):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=f'^{name} cannot be retrofitted: .*{reason}'):
        timm_spot.retrofit(model)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="convention='spot' does not suit"):
        timm_spot.retrofit(tiny(), convention='spot')
    with pytest.raises(TypeError, match='already built takes no num_classes'):
        timm_spot.retrofit(tiny(), num_classes=3)
    with pytest.raises(TypeError, match='got int'):
        timm_spot.retrofit(3)
    with pytest.raises(ValueError, match='patches of 8 x 16 px are not square'):
        timm_spot.retrofit(VisionTransformer(img_size=32, patch_size=(8, 16), embed_dim=16, depth=1, num_heads=2))


def test_registered_name_works_as_it_is():
    model = timm.create_model('spot_retrofit').eval()
    assert model(torch.randn(1, 3, 96, 128)).shape == (1, 1000)


def test_registered_name_takes_the_backbones_weights(tmp_path):
    vit = tiny(num_classes=5)
    save_for_hf(vit, str(tmp_path), safe_serialization=True)
    model = timm.create_model('spot_retrofit', backbone=f'local-dir:{tmp_path}', pretrained=True, sampler='grid').eval()
    assert model.num_classes == 5 and len(model.blocks) == 2
    assert difference(model, vit) < 2e-4


def test_registered_name_takes_keywords_and_config_of_the_backbone():
    model = timm.create_model(
        'spot_retrofit', backbone='vit_small_patch14_reg4_dinov2.lvd142m', depth=1, n_tokens=9, sampler='sobol',
        in_chans=1, num_classes=3, pretrained_cfg_overlay=dict(crop_pct=0.5))
    assert model.num_reg_tokens == 4 and model.patch_embed.pos_nodes == 39
    assert model.pretrained_cfg['mean'] == (0.485, 0.456, 0.406) and model.pretrained_cfg['crop_pct'] == 0.5
    assert model(torch.randn(2, 1, 98, 70)).shape == (2, 3)


@pytest.mark.parametrize('registered', [True, False])
def test_saved_and_reloaded(tmp_path, registered):
    torch.manual_seed(0)
    keywords = dict(depth=2, img_size=64, n_tokens=9, sampler='uniform', seed=3, num_classes=4)
    model = (
        timm.create_model('spot_retrofit', backbone='vit_tiny_patch16_224', **keywords) if registered
        else timm_spot.retrofit('vit_tiny_patch16_224', **keywords)).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == 'spot_retrofit'
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.place(images), model.place(images))
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_scripts_of_timm_can_build_it():
    # What validate.py does with --model spot_retrofit --model-kwargs backbone=...
    keywords = timm.models.resolve_model_input_args(
        'spot_retrofit', backbone='vit_tiny_patch16_224.augreg_in21k', depth=1, n_tokens=4)
    model = timm.create_model(**keywords)
    assert model.num_classes == 21843
    assert timm.data.resolve_data_config(model=model)['mean'] == (0.5, 0.5, 0.5)


def test_features_only_and_meta_device():
    model = timm.create_model('spot_retrofit', depth=2, features_only=True, out_indices=(0, 1))
    assert [f.shape for f in model(torch.randn(1, 3, 64, 96))] == [(1, 192, 4, 6)] * 2
    model = timm.create_model('spot_retrofit', device='meta')
    assert {p.device.type for p in model.parameters()} == {'meta'}
