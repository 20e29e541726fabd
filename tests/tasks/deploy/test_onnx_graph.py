from __future__ import annotations

import onnx
import pytest
import timm
import torch

import timm_spot
from timm_spot.tasks.deploy.onnx_graph import Deployed, placement_inputs
from timm_spot.tasks.deploy.onnx_info import describe


@pytest.mark.parametrize('keywords', [
    {}, dict(coverage=0.5), dict(placer='density'), dict(placer='density', in_chans=1),
    dict(placer='density', in_chans=4)])
@pytest.mark.parametrize('size', [(64, 64), (48, 72)])
def test_a_model_as_its_file_is_called(keywords, size):
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', depth=1, num_classes=3, n_tokens=7, **keywords).eval()
    if 'placer' in keywords:
        torch.nn.init.normal_(model.placer.head.weight, std=0.1)
    info = describe(model, None, False, True, 'float32')
    images = torch.randint(256, (2, info.channels, *size), dtype=torch.uint8)
    with torch.no_grad():
        answer = Deployed(model, info)(images, *placement_inputs(info, 7, size).values())
        torch.testing.assert_close(answer, model(images), rtol=0, atol=1e-5)


def test_each_image_has_a_placement_of_its_own_where_that_is_an_input(tiny):
    placed = placement_inputs(describe(tiny, None, True, False, 'float32'), 4, (64, 64))['positions']
    assert torch.equal(placed, timm_spot.sample_positions('isotropic', 4, (64, 64)))


def test_defaults_are_the_model_s_own_placement(float_file):
    graph = onnx.load(float_file).graph
    default, = (tensor for tensor in graph.initializer if tensor.name == 'positions')
    assert [i.name for i in graph.input] == ['images', 'positions']
    expected = timm_spot.sample_positions('isotropic', 64, (64, 64))[0]
    assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(default).copy()), expected)
