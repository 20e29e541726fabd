from __future__ import annotations

import pytest
import timm
import torch
from conftest import SMALL
from timm.optim import create_optimizer_v2

import timm_spot  # noqa: F401  registers the models
from timm_spot.models import SpotPretrainedCfg
from timm_spot.models.spot_zoo import find_weights
from timm_spot.tasks.pictures.digits import draw_canvases, load_digits, to_input

PICO = 'spot_vit_pico_patch8_64'
# Of version 0.1 (9e25808), on the image below.
EXPECTED = torch.tensor([
    3.91776, -0.48841, -0.35333, -0.80235, -0.40612, -0.77662, -0.30174, -0.81019, -0.10025, 0.15094])


def create(name=PICO, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs})


def test_names_and_tags():
    assert timm.list_models('spot_vit_*') == sorted([
        'spot_vit_base_patch16_mae', 'spot_vit_base_patch16_in21k', 'spot_vit_base_patch16_in1k',
        'spot_vit_tiny_patch16_in21k', 'spot_vit_small_patch16_in21k', 'spot_vit_large_patch16_in21k',
        'spot_vit_base_patch32_in21k', 'spot_vit_large_patch16_mae', 'spot_vit_pico_patch8_64'])
    pretrained = timm.list_pretrained('spot_vit_*')
    assert 'spot_vit_base_patch16_mae.mae' in pretrained and f'{PICO}.digits' in pretrained
    assert 'spot_vit_base_patch16_mae.spot_in1k' not in pretrained


@pytest.mark.parametrize('tagged, source', [
    ('spot_vit_base_patch16_mae.mae', 'vit_base_patch16_224.mae'),
    ('spot_vit_base_patch16_in21k.augreg2_in21k_ft_in1k', 'vit_base_patch16_224.augreg2_in21k_ft_in1k'),
    ('spot_vit_base_patch32_in21k.augreg_in21k_ft_in1k', 'vit_base_patch32_224.augreg_in21k_ft_in1k'),
])
def test_hub_tags_take_their_data_config_from_timm(tagged, source):
    ours, theirs = timm.get_pretrained_cfg(tagged), timm.get_pretrained_cfg(source)
    for field in ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'hf_hub_id', 'license', 'classifier'):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.num_classes == 1000 and not ours.fixed_input_size
    assert timm.get_pretrained_cfg(tagged.split('.')[0]).tag == tagged.split('.')[1]  # the default tag


@pytest.mark.parametrize('tagged', [
    'spot_vit_base_patch16_mae.spot_in1k', 'spot_vit_base_patch16_in21k.spot_in21k_ft_in1k',
    'spot_vit_base_patch16_in1k.spot_in1k'])
def test_authors_tags(tagged):
    cfg = timm.get_pretrained_cfg(tagged)
    assert (cfg.crop_mode, cfg.crop_pct, cfg.interpolation, cfg.convention) == ('squash', 0.875, 'bicubic', 'spot')
    assert create(tagged).patch_embed.convention == 'spot'
    with pytest.raises(RuntimeError, match=r'dsb-ifi.github.io/SPoT.*pretrained_cfg_overlay=dict\(file=PATH\)'):
        timm.create_model(tagged, pretrained=True)


def test_shipped_placer_loads_offline_and_serves_every_budget():
    model = timm.create_model(f'{PICO}.digits_placed', pretrained=True, n_tokens=9).eval()
    assert model.placer.name == 'density' and model.pretrained_cfg['label_names'] == tuple('0123456789')
    held_out, labels = load_digits('held_out')
    images = to_input(draw_canvases(held_out, torch.Generator().manual_seed(11)), model)
    with torch.inference_mode():
        for n_tokens, least in ((9, 0.97), (16, 0.98), (25, 0.98)):  # of 359 canvases; docs/placement.md has more
            model.set_placement(n_tokens=n_tokens)
            assert model.placer(images).shape == (359, n_tokens, 2)
            assert (model(images).argmax(dim=1) == labels).float().mean() >= least
    assert 'placer' not in timm.create_model(PICO, pretrained=True)._model_args  # the default has none


def test_shipped_digits_load_offline():
    model = timm.create_model(PICO, pretrained=True)
    assert model.pretrained_cfg['label_names'] == tuple('0123456789')
    assert model.pretrained_cfg['tag'] == 'digits'


def test_weights_of_the_authors_lie_with_an_organisation(monkeypatch):
    cfg = timm.get_pretrained_cfg('spot_vit_base_patch16_mae.spot_in1k')
    with pytest.raises(RuntimeError, match='set TIMM_SPOT_HUB_ORG=ORG'):
        find_weights('spot_vit_base_patch16_mae', cfg)
    monkeypatch.setenv('TIMM_SPOT_HUB_ORG', 'lab')
    found = find_weights('spot_vit_base_patch16_mae', cfg)
    assert found.hf_hub_id == 'lab/spot_vit_base_patch16_mae.spot_in1k' and cfg.hf_hub_id is None
    with pytest.raises(RuntimeError, match='toy has no pretrained weights: use pretrained=False'):
        find_weights('toy', SpotPretrainedCfg())


def test_shipped_weights_answer_as_before():
    """Logits of the digits model of version 0.1 on one image, at 25 isotropic tokens."""
    model = timm.create_model(PICO, pretrained=True, n_tokens=25).eval()
    image = torch.linspace(-1, 1, 3 * 64 * 64).sin().view(1, 3, 64, 64)
    torch.testing.assert_close(model(image)[0], EXPECTED, rtol=0, atol=1e-4)


@pytest.mark.parametrize('train_only, name', [('position', 'patch_embed.pos_proj.weight'), ('head', 'head.weight')])
def test_train_only_leaves_every_other_parameter_bit_identical(train_only, name):
    model = create(n_tokens=(4, 16), sampler='uniform', num_classes=10, train_only=train_only).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-2, weight_decay=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([1, 2])).backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {name} | ({'head.bias'} if train_only == 'head' else set())


def test_train_only_of_a_retrofitted_vit():
    model = timm.create_model('spot_retrofit', backbone='test_vit', train_only='position')
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ['patch_embed.pos_proj.weight']


def test_train_only_what_is_not_there():
    with pytest.raises(ValueError, match="train_only='body' must be 'position' or 'head'"):
        create(train_only='body')
    with pytest.raises(ValueError, match='has no head'):
        create(train_only='head', num_classes=0)
