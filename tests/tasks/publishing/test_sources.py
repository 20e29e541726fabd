from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_spot.tasks.publishing.sources import load_source, recognise, timm_name


def test_sources_as_timm_names_them(tmp_path):
    (tmp_path / 'file.pth').write_bytes(b'')
    assert timm_name('hf-hub:a/b') == 'hf-hub:a/b' and timm_name('org/name') == 'hf-hub:org/name'
    assert timm_name(tmp_path) == f'local-dir:{tmp_path}'
    assert timm_name(tmp_path / 'file.pth') is None
    assert timm_name('missing/file.pth') is None and timm_name('a/b/c') is None


def test_weights_that_do_not_say_whose_they_are():
    authors = {'embedder.emb.weight': torch.zeros(768, 1024), 'blocks.11.norm1.weight': torch.zeros(768)}
    assert recognise({**authors, 'fc_norm.weight': torch.zeros(768)}, 'f') == 'spot_vit_base_patch16_mae.spot_in1k'
    with pytest.raises(ValueError, match='f fits two models: say whether'):
        recognise(authors, 'f')
    with pytest.raises(ValueError, match=r"f does not say whose weights it holds.*first keys are head\.weight"):
        recognise({'head.weight': torch.zeros(1)}, 'f')


def test_a_file_becomes_a_filled_model(tmp_path, pico):
    save_file(pico.state_dict(), tmp_path / 'weights.safetensors')
    source = load_source(tmp_path / 'weights.safetensors', 'spot_vit_pico_patch8_64')
    assert source.origin == 'the file weights.safetensors, weights of spot_vit_pico_patch8_64' and source.entry == ''
    assert not source.model.training and 'label_names' not in source.model.pretrained_cfg
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(source.model(images), pico(images))
    with pytest.raises(FileNotFoundError, match='nowhere is no file'):
        load_source(tmp_path / 'nowhere')


def test_a_model_far_larger_than_its_weights_is_refused(tmp_path, pico):
    save_file(pico.state_dict(), tmp_path / 'weights.safetensors')
    with pytest.raises(ValueError, match=r'are not those of spot_vit_base_patch16_mae: .* numbers for a model of'):
        load_source(tmp_path / 'weights.safetensors', 'spot_vit_base_patch16_mae')
    assert timm.is_model('spot_vit_base_patch16_mae')


def test_weights_that_are_told_sizes_say_so_themselves(tmp_path):
    model = timm.create_model('spot_vit_pico_patch8_64', coverage=1., num_classes=10).eval()
    torch.nn.init.normal_(model.patch_embed.size_proj.weight)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    built = load_source(tmp_path / 'weights.safetensors', 'spot_vit_pico_patch8_64').model
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(built(images, model.place(images)), model(images))
