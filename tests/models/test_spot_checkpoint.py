from __future__ import annotations

import pickle

import pytest
import timm
import torch
from conftest import SMALL, random_vit
from safetensors.torch import save_file

from timm_spot.models import checkpoint_filter_fn

REGISTERED = {  # a timm ViT and the registered model of its shape
    'vit_tiny_patch16_224': ('spot_vit_tiny_patch16_in21k', {}),
    'vit_base_patch32_224': ('spot_vit_base_patch32_in21k', {}),
    'vit_small_patch16_224': ('spot_vit_small_patch16_in21k', dict(depth=2)),
    'vit_base_patch16_224': ('spot_vit_base_patch16_in21k', dict(depth=2)),
}


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def check_same_logits(vit, name, tmp_path, size, **kwargs):
    file = tmp_path / 'vit.safetensors'
    save_file(vit.state_dict(), file)
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        for sampler in ('grid', 'isotropic'):
            model = timm.create_model(
                name, pretrained=True, sampler=sampler, img_size=size,
                pretrained_cfg_overlay=dict(file=str(file), num_classes=vit.num_classes), **kwargs).eval()
            assert relative(model(images), vit(images)) < 2e-4


@pytest.mark.parametrize('source', REGISTERED)
@pytest.mark.parametrize('size', [(224, 224), (160, 224)])
def test_vit_gives_its_logits(source, size, tmp_path):
    name, kwargs = REGISTERED[source]
    check_same_logits(random_vit(source, img_size=size, **kwargs), name, tmp_path, size, **kwargs)


@pytest.mark.parametrize('kwargs', [
    dict(reg_tokens=4),
    dict(reg_tokens=4, no_embed_class=True),
    dict(no_embed_class=True),
    dict(global_pool='avg'),
    dict(global_pool='map'),
    dict(pre_norm=True),
    dict(qk_norm=True),
    dict(class_token=False, global_pool='avg'),
    dict(init_values=0.1),
])
def test_vit_variants_give_their_logits(kwargs, tmp_path):
    shape = dict(SMALL, num_classes=10, **kwargs)
    vit = random_vit('vit_tiny_patch16_224', img_size=(64, 96), **shape)
    check_same_logits(vit, 'spot_vit_tiny_patch16_in21k', tmp_path, (64, 96), **shape)


@pytest.fixture(params=['pth', 'state_dict'])
def authors_overlay(request, golden, tmp_path):
    if request.param == 'state_dict':
        return dict(state_dict={'model': golden['authors']}, num_classes=10)
    file = tmp_path / 'authors file.pth'
    torch.save({'model': golden['authors']}, file)
    return dict(file=str(file), num_classes=10)


@pytest.mark.parametrize('convention', ['spot', None])
def test_golden_logits_through_create_model(golden, authors_overlay, convention):
    model = timm.create_model(
        golden['arch'], pretrained=True, pretrained_cfg_overlay=authors_overlay, convention=convention,
        num_classes=10, **SMALL).eval()
    positions = golden['positions'].requires_grad_()
    close = dict(rtol=0, atol=1e-4)
    torch.testing.assert_close(model.forward_features(golden['image'], positions), golden['all_tokens'], **close)
    logits = model(golden['image'], positions)
    torch.testing.assert_close(logits, golden['logits'], **close)
    loss = torch.nn.functional.cross_entropy(logits, golden['labels'], reduction='none')
    torch.testing.assert_close(loss, golden['loss'], **close)
    loss.sum().backward()
    scale = golden['positions_grad'].abs().max()
    torch.testing.assert_close(positions.grad / scale, golden['positions_grad'] / scale, rtol=0, atol=1e-3)


def test_authors_checkpoint_switches_the_convention(golden, authors_overlay, tmp_path):
    model = timm.create_model(
        golden['arch'], pretrained=True, pretrained_cfg_overlay=authors_overlay, num_classes=10, **SMALL).eval()
    assert model.patch_embed.convention == 'spot'
    timm.models.save_for_hf(model, tmp_path / 'saved')
    reloaded = timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True).eval()
    torch.testing.assert_close(reloaded(golden['image']), model(golden['image']))


def test_authors_checkpoint_adapts_to_one_channel(golden, authors_overlay):
    model = timm.create_model(
        golden['arch'], pretrained=True, pretrained_cfg_overlay=authors_overlay, in_chans=1, num_classes=10, **SMALL)
    grey = golden['authors']['embedder.emb.weight'][:, :768].view(64, 3, 16, 16).sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), grey)


def test_authors_prior_over_positions_is_dropped(golden):
    model = timm.create_model(golden['arch'], convention='spot', num_classes=10, **SMALL)
    authors = dict(golden['authors'], **{'tokenizer.logprior': torch.zeros(3)})
    model.load_state_dict(checkpoint_filter_fn(authors, model))


def test_authors_unknown_keys_are_named(golden):
    model = timm.create_model(golden['arch'], convention='spot', num_classes=10, **SMALL)
    with pytest.raises(ValueError, match=r'unknown keys: decoder\.weight'):
        checkpoint_filter_fn(dict(golden['authors'], **{'decoder.weight': torch.zeros(1)}), model)


def test_conventions_that_do_not_suit_the_weights(golden):
    model = timm.create_model('spot_vit_pico_patch8_64', pos_nodes=20, **SMALL)
    with pytest.raises(ValueError, match="windows of 16 px needs convention='spot'"):
        checkpoint_filter_fn(golden['authors'], model)
    model = timm.create_model('spot_vit_tiny_patch16_in21k', convention='spot', depth=1)
    with pytest.raises(ValueError, match="a ViT's checkpoint needs convention='patch'"):
        checkpoint_filter_fn(timm.create_model('vit_tiny_patch16_224', depth=1).state_dict(), model)


def test_native_checkpoint_is_unchanged(pico):
    state_dict = pico.state_dict()
    assert checkpoint_filter_fn(state_dict, pico) is state_dict


def test_unknown_checkpoint_names_its_first_keys(pico):
    with pytest.raises(ValueError, match=r"none of: .*first keys are 'conv1.weight', 'bn1.weight'"):
        checkpoint_filter_fn({'conv1.weight': torch.zeros(1), 'bn1.weight': torch.zeros(1)}, pico)


def test_patch_size_is_resampled():
    vit = random_vit('vit_tiny_patch16_224', depth=1)
    model = timm.create_model('spot_vit_tiny_patch16_in21k', patch_size=8, depth=1)
    model.load_state_dict(checkpoint_filter_fn(vit.state_dict(), model))
    expected = timm.layers.resample_patch_embed(vit.patch_embed.proj.weight, [8, 8])
    torch.testing.assert_close(model.patch_embed.proj.weight, expected)


class Bomb:
    exploded = False

    def __reduce__(self):
        return setattr, (Bomb, 'exploded', True)


def test_pickled_objects_are_refused_not_executed(tmp_path):
    file = tmp_path / 'weights.pth'
    torch.save({'model': Bomb()}, file)
    with pytest.raises(ValueError, match='could run any code, so nothing was loaded'):
        timm.create_model('spot_vit_pico_patch8_64', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    file.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ValueError, match='could run any code, so nothing was loaded'):
        timm.create_model('spot_vit_pico_patch8_64', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    assert not Bomb.exploded


def test_damaged_and_missing_files_are_named(pico, tmp_path):
    file = tmp_path / 'weights.safetensors'
    save_file(pico.state_dict(), file)
    whole = file.read_bytes()

    def load():
        overlay = dict(file=str(file))
        return timm.create_model('spot_vit_pico_patch8_64', pretrained=True, pretrained_cfg_overlay=overlay)

    for damaged in (whole[:len(whole) // 2], whole[:5], b'', b'\xff' * 8 + whole[8:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r'weights\.safetensors is damaged'):
            load()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r'weights\.safetensors does not exist'):
        load()
