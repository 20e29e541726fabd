from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import timm_spot
from timm_spot.models.pruning_vit import RelevanceVisionTransformer
from timm_spot.tasks.pictures.digits import draw_canvases, load_digits, to_input


def images(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('build', [
    lambda: timm.create_model('relevance_vit', backbone='vit_tiny_patch16_224', img_size=32, depth=3, scorer='norm'),
    lambda: timm_spot.sparsify('vit_tiny_patch16_224', keep_rate=0.3, stages=(1, 2), read='last', img_size=48, depth=3),
    lambda: timm_spot.sparsify(
        timm.create_model('spot_vit_pico_patch8_64', n_tokens=9, sampler='sobol', seed=3), keep_rate=0.5),
    lambda: timm_spot.sparsify(timm_spot.retrofit('vit_tiny_patch16_224', depth=2, img_size=32, n_tokens=7)),
    lambda: timm.create_model('relevance_deit_tiny_patch16_224', keep_rate=0.4, depth=2, img_size=32),
    lambda: timm.create_model('relevance_spot_vit_base_patch16_mae', depth=2, embed_dim=48, n_tokens=5, num_heads=4),
], ids=['by name', 'sparsify', 'spot', 'retrofit', 'deit', 'spot base'])
def test_saved_and_reloaded(tmp_path, build):
    model = build().eval()
    model.set_keep_rate(0.6)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'].startswith('relevance_')
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert type(again) is type(model) and again.stages == model.stages and again.keep_rate == 0.6
    x = images(2, max(model.patch_embed.img_size))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_weights_of_the_backbone_are_loaded_and_the_predictors_fresh_where_they_may_be(tmp_path):
    deit = timm.create_model('deit_tiny_patch16_224', depth=2).eval()
    save_file(deit.state_dict(), tmp_path / 'deit.safetensors')
    model = timm.create_model(
        'relevance_deit_tiny_patch16_224', pretrained=True, depth=2, keep_rate=1, fresh_predictors=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'deit.safetensors'))).eval()
    assert type(model) is RelevanceVisionTransformer and model.pretrained_cfg['tag'] == 'fb_in1k'
    x = images(1, 224)
    with torch.no_grad():
        assert torch.equal(model(x), deit(x))
        assert model.set_keep_rate(0.5) is None and model(x).isfinite().all()
    assert timm.get_pretrained_cfg('relevance_deit_base_patch16_224').hf_hub_id == 'timm/deit_base_patch16_224.fb_in1k'


def test_relevance_vit_takes_the_weights_of_its_backbone():
    model = timm.create_model(
        'relevance_vit', backbone='spot_vit_pico_patch8_64', pretrained=True, keep_rate=0.9, n_tokens=25,
        scorer='norm').eval()
    source = timm.create_model('spot_vit_pico_patch8_64', pretrained=True, n_tokens=25).eval()
    assert model.keep_rate == 0.9 and model.pretrained_cfg['mean'] == (0.1, 0.1, 0.1)
    model.set_keep_rate(1)
    with torch.no_grad():
        assert torch.equal(model(images(2, 64)), source(images(2, 64)))


@torch.no_grad()
def test_shipped_predictors_find_the_digit():
    model = timm.create_model('relevance_spot_vit_pico_patch8_64', pretrained=True, keep_rate=0.5).eval()
    source = timm.create_model('spot_vit_pico_patch8_64', pretrained=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.state_dict().items())
    digits, labels = load_digits('held_out')
    x = to_input(draw_canvases(digits[:100], torch.Generator().manual_seed(0)), model)
    right = (model(x).argmax(dim=1) == labels[:100]).sum().item()
    assert right >= 95
    model.set_scorer('random')
    assert (model(x).argmax(dim=1) == labels[:100]).sum().item() < right - 20


@pytest.fixture
def deit_file(tmp_path):
    file = tmp_path / 'deit.safetensors'
    save_file(timm.create_model('deit_tiny_patch16_224', depth=4).state_dict(), file)
    return str(file)


def relevance_deit(file, **keywords):
    return timm.create_model(
        'relevance_deit_tiny_patch16_224', pretrained=True, depth=4, pretrained_cfg_overlay=dict(file=file), **keywords)


@pytest.mark.parametrize('name', ['relevance_deit_tiny_patch16_224', 'relevance_spot_vit_pico_patch8_64'])
def test_weights_without_predictors_are_refused_by_the_names_that_they_lack(name, deit_file):
    keywords = dict(depth=4) if 'deit' in name else {}
    file = deit_file if 'deit' in name else timm.get_pretrained_cfg('spot_vit_pico_patch8_64').file
    with pytest.raises(ValueError, match=(
            r"scorer='relevance' needs trained predictors, and the weights lack predictors\.0\.proj\.weight, .* and 18 "
            "more.*scorer='cls-attention'.*fresh_predictors=True.*sparsify")):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=file), **keywords)


def test_weights_without_some_of_the_predictors_are_refused_even_where_fresh_ones_may_be(deit_file, tmp_path):
    model = relevance_deit(deit_file, fresh_predictors=True)
    state = {name: value for name, value in model.state_dict().items() if name != 'predictors.1.head.bias'}
    save_file(state, tmp_path / 'some.safetensors')
    for keywords in (dict(), dict(fresh_predictors=True)):
        with pytest.raises(ValueError, match=r'the weights lack predictors\.1\.head\.bias\. Give'):
            relevance_deit(str(tmp_path / 'some.safetensors'), **keywords)


def test_fresh_predictors_take_those_of_the_weights_where_there_are_some(deit_file, tmp_path):
    model = relevance_deit(deit_file, fresh_predictors=True)
    save_file(model.state_dict(), tmp_path / 'all.safetensors')
    again = relevance_deit(str(tmp_path / 'all.safetensors'), fresh_predictors=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_saved_model_does_not_ask_for_fresh_predictors_again(deit_file, tmp_path):
    save_for_hf(relevance_deit(deit_file, fresh_predictors=True), str(tmp_path / 'saved'), safe_serialization=True)
    timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    file = tmp_path / 'saved' / 'model.safetensors'
    state = {name: value for name, value in load_file(file).items() if not name.startswith('predictors.')}
    save_file(state, file)
    with pytest.raises(ValueError, match='the weights lack predictors'):
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)


@torch.no_grad()
def test_a_scorer_that_needs_no_training_needs_no_predictors(deit_file):
    assert not relevance_deit(deit_file, scorer='cls-attention').predictors
    trained = timm.create_model('relevance_spot_vit_pico_patch8_64', pretrained=True, keep_rate=0.5).eval()
    other = timm.create_model(  # the file has predictors
        'relevance_spot_vit_pico_patch8_64', pretrained=True, keep_rate=0.5, scorer='norm').eval()
    x = images(2, 64)
    assert torch.equal(other(x), trained.pruned(scorer='norm')(x))


def test_weights_of_a_backbone_have_no_predictors():
    keywords = dict(backbone='spot_vit_pico_patch8_64', pretrained=True)
    with pytest.raises(ValueError, match=r'backbone spot_vit_pico_patch8_64 have none \(predictors\.\*\)'):
        timm.create_model('relevance_vit', **keywords)
    model = timm.create_model('relevance_vit', fresh_predictors=True, **keywords)
    sparse = timm_spot.sparsify('spot_vit_pico_patch8_64', pretrained=True)  # says so in its documentation
    assert len(model.predictors) == len(sparse.predictors) == 3
    assert torch.equal(model.blocks[0].attn.qkv.weight, sparse.blocks[0].attn.qkv.weight)


def test_without_weights_nothing_is_asked():
    assert len(timm.create_model('relevance_deit_tiny_patch16_224', depth=4).predictors) == 3
    assert len(timm.create_model('relevance_vit', depth=4, fresh_predictors=True).predictors) == 3
