"""Weights into models: by every way in, what is damaged, does not fit or is not filled is named."""
from __future__ import annotations

import json

import pytest
import timm
import torch
from conftest import SMALL, random_vit
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from toy_placer import NAME as TOY

import timm_spot
from timm_spot.models.loading import create_checked, read_config

PICO = 'spot_vit_pico_patch8_64'
TINY = dict(depth=1, img_size=64, num_classes=3)


@pytest.fixture
def folder(tmp_path):
    """A pico model with ten classes, saved as timm does."""
    torch.manual_seed(0)
    save_for_hf(timm.create_model(PICO, depth=1), str(tmp_path), safe_serialization=True)
    return tmp_path


def change_config(folder, **changes):
    config = json.loads((folder / 'config.json').read_text())
    for name, value in changes.items():
        section, _, name = name.rpartition('__')
        (config.setdefault(section, {}) if section else config)[name] = value
    (folder / 'config.json').write_text(json.dumps(config))


def change_weights(folder, drop=(), **changes):
    weights = load_file(folder / 'model.safetensors')
    weights = {k: v for k, v in weights.items() if not any(k.startswith(d) for d in drop)}
    save_file({**weights, **changes}, folder / 'model.safetensors')


def from_overlay(folder):
    overlay = dict(file=str(folder / 'model.safetensors'))
    return timm.create_model(PICO, depth=1, pretrained=True, pretrained_cfg_overlay=overlay)


def from_folder(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True)


def from_name(folder):
    return create_checked(f'local-dir:{folder}', pretrained=True)


def from_state_dict(folder):
    overlay = dict(state_dict=load_file(folder / 'model.safetensors'), file=None)
    return timm.create_model(PICO, depth=1, pretrained=True, pretrained_cfg_overlay=overlay)


WAYS = [from_overlay, from_folder, from_name, from_state_dict]


@pytest.mark.parametrize('way', WAYS)
def test_whole_weights_are_loaded_by_every_way(folder, way):
    weights = load_file(folder / 'model.safetensors')
    assert all(torch.equal(weights[k], v) for k, v in way(folder).state_dict().items())


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_refused_by_every_way(folder, way, value):
    change_weights(folder, **{'head.bias': torch.full((10,), value)})
    with pytest.raises(ValueError, match=r'NaN or infinity in head\.bias'):
        way(folder)


@pytest.mark.parametrize('way', WAYS)
def test_blocks_that_the_file_lacks_are_named_by_every_way(folder, way):
    change_weights(folder, drop=['blocks.0.attn.'])
    with pytest.raises(ValueError, match=rf'not those of {PICO}: it lacks blocks\.0\.attn\.qkv\.weight, .*bias\.'):
        way(folder)


@pytest.mark.parametrize('way', WAYS)
def test_position_weights_that_a_native_file_lacks_are_not_zero(folder, way):
    change_weights(folder, drop=['patch_embed.pos_proj'])
    with pytest.raises(ValueError, match=r"lacks 'patch_embed\.pos_proj\.weight'"):
        way(folder)


@pytest.mark.parametrize('way', WAYS)
def test_a_file_with_another_shape_or_a_stranger_is_named(folder, way):
    change_weights(folder, **{'norm.extra': torch.ones(1), 'cls_token': torch.ones(1, 1, 64)})
    says = r'the model has no norm\.extra; shapes differ: cls_token \(1, 1, 64\) instead of \(1, 1, 128\)'
    with pytest.raises(ValueError, match=says):
        way(folder)


@pytest.mark.parametrize('way', WAYS)
def test_weights_that_share_nothing_with_the_model_are_named(folder, way):
    save_file({'conv1.weight': torch.ones(3)}, folder / 'model.safetensors')
    with pytest.raises(ValueError, match=r"none of: .*first keys are 'conv1\.weight'"):
        way(folder)


def test_layer_scale_of_some_blocks_only_is_no_vit_without_layer_scale(tmp_path):
    vit = random_vit('vit_tiny_patch16_224', init_values=0.1, **dict(TINY, depth=2))
    weights = {k: v for k, v in vit.state_dict().items() if k != 'blocks.1.ls2.gamma'}
    overlay = dict(state_dict=weights, num_classes=3)
    with pytest.raises(ValueError, match=r'it lacks blocks\.1\.ls2\.gamma'):
        timm.create_model('spot_vit_tiny_patch16_in21k', pretrained=True, pretrained_cfg_overlay=overlay,
                          **dict(TINY, depth=2))


@pytest.mark.parametrize('name', ['spot_vit_tiny_patch16_in21k', 'dht_vit_small_patch16_in21k'])
def test_a_vit_without_its_position_table_is_not_one_without_positions(name):
    vit = random_vit('vit_tiny_patch16_224', **TINY)
    weights = {k: v for k, v in vit.state_dict().items() if k != 'pos_embed'}
    with pytest.raises(ValueError, match="no positions, neither 'pos_embed'"):
        timm.create_model(
            name, pretrained=True, embed_dim=192, num_heads=3,
            pretrained_cfg_overlay=dict(state_dict=weights, num_classes=3), **TINY)


def test_a_native_dht_file_without_its_pixel_token_is_not_a_vit():
    weights = timm.create_model('dht_vit_pico_patch8_64', depth=1).state_dict()
    weights = {k: v for k, v in weights.items() if k not in ('patch_embed.pixel_token', 'patch_embed.pos_proj.weight')}
    with pytest.raises(ValueError, match=r"lacks 'patch_embed\.pixel_token'"):
        timm.create_model(
            'dht_vit_pico_patch8_64', depth=1, pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights))


def test_a_config_cannot_ask_for_random_blocks(folder):
    change_weights(folder, drop=['blocks.0.mlp'])
    change_config(folder, model_args__pretrained_strict=False)
    for way in (from_folder, from_name):
        with pytest.raises(ValueError, match=r'it lacks blocks\.0\.mlp\.fc1\.weight'):
            way(folder)


def test_the_caller_can_ask_for_random_blocks(folder):
    change_weights(folder, drop=['blocks.0.mlp'])
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, pretrained_strict=False)
    assert torch.equal(model.cls_token, load_file(folder / 'model.safetensors')['cls_token'])


def test_a_config_with_two_numbers_of_classes_gives_no_random_head(folder):
    change_config(folder, model_args__num_classes=5)
    with pytest.raises(ValueError, match=r'it lacks head\.weight, head\.bias; .*num_classes=10, the model has 5'):
        from_folder(folder)
    with pytest.raises(ValueError, match=r'config\.json contradicts itself: num_classes=10 .*, 5 of the model'):
        from_name(folder)


@pytest.mark.parametrize('num_classes', [5, 0])
def test_the_caller_can_ask_for_another_head(folder, num_classes):
    change_config(folder, model_args__num_classes=10)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=num_classes)
    weights = load_file(folder / 'model.safetensors')
    assert model.num_classes == num_classes
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items() if not k.startswith('head.'))


def test_features_need_no_head(folder):
    change_weights(folder, drop=['head.'])
    with pytest.raises(ValueError, match=r'it lacks head\.weight, head\.bias'):
        from_folder(folder)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, features_only=True, out_indices=1)
    assert torch.equal(model.model.cls_token, load_file(folder / 'model.safetensors')['cls_token'])


def test_channels_are_adapted_as_in_timm(folder):
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, in_chans=1)
    weights = load_file(folder / 'model.safetensors')
    torch.testing.assert_close(model.patch_embed.proj.weight, weights['patch_embed.proj.weight'].sum(1, keepdim=True))


def test_a_file_in_the_overlay_comes_before_the_folder(folder, tmp_path):
    other = timm.create_model(PICO, depth=1)
    save_file(other.state_dict(), tmp_path / 'other.safetensors')
    overlay = dict(file=str(tmp_path / 'other.safetensors'))
    for create in (timm.create_model, create_checked):
        model = create(f'local-dir:{folder}', pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(model.cls_token, other.cls_token)


def test_a_model_remembers_where_its_weights_come_from(folder):
    model = from_folder(folder)
    assert model.pretrained_cfg['source'] == 'local-dir' and model.pretrained_cfg['file'] == str(folder)
    assert model.default_cfg is model.pretrained_cfg


def config(**changes):
    return json.dumps(dict(architecture=PICO, **changes))


CONFIGS = {
    'no JSON': ('{"architecture":', 'is damaged, it is no JSON'),
    'bytes': (b'\xff\xfe\x00', 'is damaged, it is no JSON'),
    'list': ('[]', "no config of timm's"),
    'text': ('"vit"', "no config of timm's"),
    'no architecture': ('{}', "no config of timm's"),
    'architecture that is no name': ('{"architecture": 3}', "no config of timm's"),
    'unknown architecture': ('{"architecture": "resnet0"}', "architecture 'resnet0', which timm does not know"),
    'cfg that is no object': (config(pretrained_cfg=3), 'pretrained_cfg=3 must be an object'),
    'arguments that are none': (config(model_args=[]), r'model_args=\[\] must be an object'),
    'mean of words': (config(pretrained_cfg=dict(mean=['a'])), 'must be a list of numbers'),
    'mean of NaN': (config(pretrained_cfg=dict(mean=[float('nan')])), 'must be a list of numbers'),
    'size of two': (config(pretrained_cfg=dict(input_size=[3, 64])), 'three whole numbers'),
    'classes in words': (config(pretrained_cfg=dict(num_classes='ten')), 'a whole number'),
}


@pytest.mark.parametrize('kind', CONFIGS)
def test_a_damaged_config_is_named_with_what_is_wrong(folder, kind):
    content, says = CONFIGS[kind]
    (folder / 'config.json').write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf'config\.json.*{says}'):
        create_checked(f'local-dir:{folder}', pretrained=True)


def test_a_folder_without_config_or_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'config\.json does not exist'):
        create_checked(f'local-dir:{tmp_path}', pretrained=True)
    (tmp_path / 'config.json').write_text(f'{{"architecture": "{PICO}", "pretrained_cfg": {{}}}}')
    assert read_config(tmp_path / 'config.json')['architecture'] == PICO
    with pytest.raises(FileNotFoundError, match=r'holds no weights: expected is model\.safetensors'):
        create_checked(f'local-dir:{tmp_path}', pretrained=True)


@pytest.mark.parametrize('build', [
    lambda name: timm_spot.retrofit(name, pretrained=True),
    lambda name: timm_spot.sparsify(name, pretrained=True),
    lambda name: timm.create_model('spot_retrofit', backbone=name, pretrained=True),
    lambda name: timm.create_model('relevance_vit', backbone=name, pretrained=True, scorer='norm'),
    lambda name: create_checked(name, pretrained=True),
])
def test_models_of_timm_s_own_are_checked_too(tmp_path, build):
    save_for_hf(random_vit('vit_tiny_patch16_224', **dict(TINY, depth=4)), str(tmp_path), safe_serialization=True)
    name = f'local-dir:{tmp_path}'
    build(name)
    whole = (tmp_path / 'model.safetensors').read_bytes()
    (tmp_path / 'model.safetensors').write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r'model\.safetensors is damaged'):
        build(name)
    (tmp_path / 'model.safetensors').write_bytes(whole)
    change_weights(tmp_path, **{'cls_token': torch.full((1, 1, 192), torch.nan)})
    with pytest.raises(ValueError, match='NaN or infinity in cls_token'):
        build(name)
    (tmp_path / 'model.safetensors').write_bytes(whole)
    change_weights(tmp_path, drop=['blocks.1.norm1'])
    with pytest.raises(ValueError, match=r'are not those of vit_tiny_patch16_224: .*blocks\.1\.norm1\.weight'):
        build(name)


def test_pruning_models_are_checked_too(tmp_path):
    deit = random_vit('deit_tiny_patch16_224', depth=4)
    overlay = dict(state_dict={k: v for k, v in deit.state_dict().items() if k != 'blocks.3.norm2.bias'})
    with pytest.raises(ValueError, match=r'relevance_deit_tiny_patch16_224: it lacks blocks\.3\.norm2\.bias'):
        timm.create_model(
            'relevance_deit_tiny_patch16_224', depth=4, pretrained=True, pretrained_cfg_overlay=overlay,
            scorer='norm')


def test_masked_autoencoders_are_checked_too(tmp_path):
    name = 'spot_mae_vit_pico_patch8_64'
    keywords = dict(depth=1, embed_dim=32, num_heads=2, decoder_depth=1)
    weights = timm.create_model(name, **keywords).state_dict()
    torch.save({k: v for k, v in weights.items() if k != 'mask_token'}, tmp_path / 'x.pth')
    overlay = dict(file=str(tmp_path / 'x.pth'))
    with pytest.raises(ValueError, match=f'{name}: it lacks mask_token'):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **keywords)
    torch.save(weights, tmp_path / 'x.pth')
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **keywords)
    assert torch.equal(model.mask_token, weights['mask_token'])


def test_a_placer_that_its_own_file_lacks_is_named_and_one_that_is_asked_for_is_fresh(tmp_path):
    model = timm.create_model(PICO, depth=1, placer=TOY, n_tokens=9)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert torch.equal(from_folder(tmp_path).placer.net.weight, model.placer.net.weight)
    change_weights(tmp_path, drop=['placer.'])
    with pytest.raises(ValueError, match=r'it lacks placer\.net\.weight, placer\.net\.bias'):
        from_folder(tmp_path)
    overlay = dict(file=str(tmp_path / 'model.safetensors'))
    fresh = timm.create_model(
        PICO, depth=1, pretrained=True, pretrained_cfg_overlay=overlay, placer=TOY, n_tokens=9)
    assert torch.equal(fresh.cls_token, model.cls_token)


def test_small_authors_file_is_read_as_before(golden, tmp_path):
    torch.save(dict(model=golden['authors']), tmp_path / 'x.pth')
    overlay = dict(file=str(tmp_path / 'x.pth'), num_classes=10)
    model = timm.create_model(
        golden['arch'], pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10, **SMALL)
    assert model.patch_embed.convention == 'spot'
