from __future__ import annotations

import pytest
import timm
import torch

import timm_spot
from timm_spot.models.density_placer import DensityPlacer

PICO = 'spot_vit_pico_patch8_64'


def test_any_subpixel_vit_is_given_one():
    images = torch.rand(2, 3, 64, 64)
    model = timm.create_model(PICO, pretrained=True, n_tokens=9).eval()
    before = model(images)
    assert timm_spot.add_placer(model, 'density') is model
    assert isinstance(model.placer, DensityPlacer) and not model.placer.training
    assert model.placer(images).shape == (2, 9, 2) and model.placer.density(images).shape == (2, 16, 16)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)  # it starts as the lattice
    assert 'placer.stem.weight' in model.state_dict()
    retrofitted = timm_spot.retrofit('vit_tiny_patch16_224', img_size=64, depth=1, num_classes=0, n_tokens=4)
    assert timm_spot.add_placer(retrofitted).eval()(images).shape == (2, 192)


def test_a_saved_model_is_loaded_with_it(tmp_path):
    model = timm_spot.add_placer(timm.create_model(PICO, n_tokens=(4, 16), coverage=0.5))
    with torch.no_grad():
        model.placer.head.weight.normal_(std=0.1)
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(again.place(images), model.eval().place(images)) and again.n_tokens == 16
    assert torch.equal(again(images), model(images))


def test_it_is_taken_off_again(tmp_path):
    model = timm_spot.add_placer(timm.create_model(PICO, n_tokens=9).eval())
    reduction = timm.create_model(PICO, n_tokens=9).feature_info[0]['reduction']
    timm_spot.add_placer(model, 'sampled')
    assert model.feature_info[0]['reduction'] == reduction and model.lattice((64, 64)) == (3, 3)
    timm.models.save_for_hf(model, tmp_path)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).placer.name == 'sampled'


def test_what_is_no_subpixel_vit_or_no_placer_is_named():
    with pytest.raises(TypeError, match=r'got VisionTransformer: timm_spot\.retrofit makes one'):
        timm_spot.add_placer(timm.create_model('vit_tiny_patch16_224', depth=1))
    model = timm.create_model(PICO)
    with pytest.raises(ValueError, match=r"placer='densities' is unknown .did you mean 'density'"):
        timm_spot.add_placer(model, 'densities')
    assert model.placer.name == 'sampled'
