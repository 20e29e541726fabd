from __future__ import annotations

import pytest
import timm
import torch
from conftest import random_vit
from safetensors.torch import save_file

from timm_spot.models import checkpoint_filter_fn
from timm_spot.models.vit_checkpoint import fold_prefix, split_table


def test_position_table_of_an_unknown_shape_is_refused(pico):
    state_dict = timm.create_model('vit_tiny_patch16_224', img_size=(96, 224), depth=1).state_dict()
    model = timm.create_model('spot_vit_tiny_patch16_in21k', depth=1)
    with pytest.raises(ValueError, match='holds 84 or 85 patches, which fit neither the image size of the model'):
        checkpoint_filter_fn(state_dict, model)


def test_mae_weights_get_a_zero_head_and_a_warning(tmp_path):
    mae = random_vit('vit_base_patch16_224', num_classes=0, depth=1)
    save_file(mae.state_dict(), tmp_path / 'mae.safetensors')
    overlay = dict(file=str(tmp_path / 'mae.safetensors'))
    arguments = dict(pretrained=True, pretrained_cfg_overlay=overlay, depth=1)
    with pytest.warns(UserWarning, match='no classifier: the head is zero.*train.py'):
        model = timm.create_model('spot_vit_base_patch16_mae', **arguments).eval()
    assert model(torch.randn(1, 3, 224, 224)).abs().max() == 0
    torch.testing.assert_close(model.fc_norm.weight, mae.norm.weight)
    fresh = timm.create_model('spot_vit_base_patch16_mae', num_classes=7, **arguments)
    assert fresh.head.weight.abs().max() > 0
    features = timm.create_model('spot_vit_base_patch16_mae', num_classes=0, **arguments).eval()
    images = torch.randn(1, 3, 224, 224)
    expected = mae.norm(mae.forward_intermediates(images, output_fmt='NLC')[1][-1].mean(dim=1))
    torch.testing.assert_close(features(images), expected, rtol=0, atol=2e-4 * expected.abs().max().item())


def test_prefix_rows_go_to_their_tokens():
    state_dict = dict(cls_token=torch.ones(1, 1, 2), reg_token=torch.zeros(1, 2, 2))
    fold_prefix(state_dict, torch.arange(6.).view(1, 3, 2))
    assert state_dict['cls_token'].tolist() == [[[1., 2.]]]
    assert state_dict['reg_token'].tolist() == [[[2., 3.], [4., 5.]]]


def test_a_table_is_split_by_the_size_that_the_model_states():
    model = timm.create_model('spot_vit_tiny_patch16_in21k', depth=1, img_size=(32, 64))
    table = torch.arange(9.).view(1, 9, 1)  # class token, then 2 x 4 patches
    prefix, patches = split_table(table, dict(cls_token=torch.zeros(1, 1, 1)), model, torch.zeros(1, 3, 16, 16))
    assert prefix.tolist() == [[[0.]]] and patches[..., 0].tolist() == [[1., 2., 3., 4.], [5., 6., 7., 8.]]
