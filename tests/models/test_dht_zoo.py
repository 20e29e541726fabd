from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from conftest import random_vit
from dht_golden import DATA
from hub_server import HubServer
from safetensors.torch import load_file, save, save_file
from torch import nn

TINY = dict(embed_dim=32, depth=1, num_heads=4, num_classes=10)


@pytest.fixture(scope='module')
def vit():
    """A ViT that has no norm before its blocks, as most have none."""
    return random_vit(
        'vit_tiny_patch16_224', img_size=64, patch_size=8, norm_layer=partial(nn.LayerNorm, eps=1e-5), **TINY)


def create(pre_norm=None, **overlay):
    settings = TINY if pre_norm is None else dict(TINY, pre_norm=pre_norm)
    return timm.create_model(
        'dht_vit_pico_patch8_64', pretrained=True, pretrained_cfg_overlay=overlay, **settings).eval()


@pytest.mark.parametrize('form', ['state_dict', 'safetensors', 'training', 'parallel'])
def test_the_norm_before_the_blocks_goes_by_the_weights(form, vit, tmp_path):
    weights = vit.state_dict()
    if form == 'state_dict':
        overlay = dict(state_dict=weights)
    elif form == 'safetensors':
        overlay = dict(file=str(tmp_path / 'vit.safetensors'))
        save_file(weights, overlay['file'])
    else:
        overlay = dict(file=str(tmp_path / 'vit.pth.tar'))
        prefix = 'module.' if form == 'parallel' else ''
        torch.save(dict(epoch=3, state_dict={f'{prefix}{k}': v for k, v in weights.items()}), overlay['file'])
    model = create(**overlay)
    assert isinstance(model.norm_pre, nn.Identity)
    assert torch.equal(model.blocks[0].attn.qkv.weight, weights['blocks.0.attn.qkv.weight'])


def test_a_vit_with_the_norm_keeps_it(vit):
    weights = dict(vit.state_dict(), **{'norm_pre.weight': torch.full((32,), 2.), 'norm_pre.bias': torch.zeros(32)})
    assert (create(state_dict=weights).norm_pre.weight == 2).all()


def test_without_weights_there_is_the_norm():
    assert isinstance(timm.create_model('dht_vit_pico_patch8_64', **TINY).norm_pre, nn.LayerNorm)


def test_a_norm_asked_for_that_the_weights_lack_is_refused(vit):
    with pytest.raises(ValueError, match='no norm before its blocks: build the model with pre_norm=False'):
        timm.create_model(
            'dht_vit_pico_patch8_64', pretrained=True, pre_norm=True,
            pretrained_cfg_overlay=dict(state_dict=vit.state_dict()), **TINY)


@torch.no_grad()
def test_what_was_chosen_is_saved(vit, tmp_path):
    model = create(state_dict=vit.state_dict())
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / 'config.json').read_text())['model_args']['pre_norm'] is False
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(images), model(images))


@torch.no_grad()
def test_how_regions_merge_goes_by_the_weights(vit, tmp_path):
    """A ViT's know no regions: by Ward. Those made with the authors' rule tell nothing and keep it."""
    images = torch.randn(1, 3, 32, 32)
    for given, merge in ((None, 'ward'), ('keepers', 'keepers')):
        settings = {} if given is None else dict(tokenizer=dict(merge=given))
        model = timm.create_model(
            'dht_vit_pico_patch8_64', pretrained=True, pretrained_cfg_overlay=dict(state_dict=vit.state_dict()), **TINY,
            **settings).eval()
        assert model.patch_embed.tokenizer.merge == merge
        file = tmp_path / f'{merge}.safetensors'
        save_file(model.state_dict(), file)
        pretrained = create(file=str(file), pre_norm=False)
        plain = timm.create_model('dht_vit_pico_patch8_64', pre_norm=False, **TINY).eval()
        assert plain.patch_embed.tokenizer.merge == 'keepers'
        plain.load_state_dict(model.state_dict())
        for again in (pretrained, plain):
            assert again.patch_embed.tokenizer.merge == merge
            assert torch.equal(again(images), model(images))
    other = timm.create_model(
        'dht_vit_pico_patch8_64', pretrained=True, tokenizer=dict(merge='ward'), pre_norm=False,
        pretrained_cfg_overlay=dict(file=str(file)), **TINY)
    assert other.patch_embed.tokenizer.merge == 'ward'  # what is asked for comes before what the weights tell


@torch.no_grad()
def test_merging_by_ward_keeps_a_budget_exactly():
    model = timm.create_model('dht_vit_pico_patch8_64', n_tokens=50, tokenizer=dict(merge='ward'), **TINY).eval()
    images = torch.randn(2, 3, 64, 64)
    images[1] = 0.
    features = model.forward_features(images)
    assert features.regions.counts.tolist() == [50, 50] and features.mask.all()


def test_features_only_chooses_as_well(vit):
    features = timm.create_model(
        'dht_vit_pico_patch8_64', pretrained=True, features_only=True, out_indices=(0,),
        pretrained_cfg_overlay=dict(state_dict=vit.state_dict()), **TINY)
    assert isinstance(features.model.norm_pre, nn.Identity)


CLIENT = """
import timm, timm_spot
for name in ('org/vit', 'org/old'):
    model = timm.create_model(
        'dht_vit_pico_patch8_64', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=name),
        embed_dim=32, depth=1, num_heads=4)
    print(type(model.norm_pre).__name__, model.blocks[0].attn.qkv.weight.sum().item())
"""


def test_weights_on_the_hub(vit, tmp_path):
    """In a process of its own, as the client reads its settings when it is imported."""
    torch.save(vit.state_dict(), tmp_path / 'vit.bin')
    server = HubServer()
    server.repos['org/vit'] = {'main': {'model.safetensors': save(vit.state_dict())}}
    server.repos['org/old'] = {'main': {'pytorch_model.bin': (tmp_path / 'vit.bin').read_bytes()}}
    try:
        result = subprocess.run(
            [sys.executable, '-c', CLIENT], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2],
            env=dict(os.environ, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path), HF_HUB_DISABLE_XET='1'))
    finally:
        server.close()
    assert result.returncode == 0, result.stderr
    total = vit.blocks[0].attn.qkv.weight.sum().item()
    assert [line.split()[0] for line in result.stdout.splitlines()] == ['Identity'] * 2
    assert [float(line.split()[1]) for line in result.stdout.splitlines()] == pytest.approx([total] * 2)


@pytest.mark.parametrize('name, expected', [
    ('saved_0_1_from_vit', dict(n_tokens=9)), ('saved_0_1_from_authors', dict(pos_scale=8, pos_size=4))])
@torch.no_grad()
def test_folders_saved_by_0_1_load(name, expected):
    """A budget that was changed after the model had been built, a norm left out, positions resized."""
    model = timm.create_model(f'local-dir:{DATA / name}', pretrained=True).eval()
    assert {key: getattr(model.patch_embed, key) for key in expected} == expected
    example = load_file(DATA / name / 'example.safetensors')
    # Other processors add in another order.
    torch.testing.assert_close(model(example['image']), example['logits'], atol=1e-5, rtol=0)


def test_names_are_as_they_were():
    assert timm.list_models('dht_*') == [
        'dht_vit_base_patch16_in1k', 'dht_vit_base_patch16_in21k', 'dht_vit_pico_patch8_64',
        'dht_vit_small_patch16_in1k', 'dht_vit_small_patch16_in21k']
    assert timm.list_pretrained('dht_*') == [
        'dht_vit_base_patch16_in1k.augreg_in1k', 'dht_vit_base_patch16_in21k.augreg2_in21k_ft_in1k',
        'dht_vit_small_patch16_in1k.augreg_in1k', 'dht_vit_small_patch16_in21k.augreg_in21k_ft_in1k']


def test_no_weights_anywhere():
    with pytest.raises(RuntimeError, match=r'dht_vit_base_patch16_in1k.dht_in1k has no pretrained weights.*file=PATH'):
        timm.create_model('dht_vit_base_patch16_in1k.dht_in1k', pretrained=True)
