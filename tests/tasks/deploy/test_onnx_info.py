from __future__ import annotations

import json

import pytest
import timm
from toy_placer import NAME as TOY

from timm_spot.tasks.deploy.onnx_info import EACH, INSIDE, LATTICE, SHARED, OnnxInfo, describe


@pytest.mark.parametrize('keywords, options, placement, any_size, budgets', [
    ({}, {}, SHARED, True, True),
    ({}, dict(n_tokens=9), INSIDE, False, False),
    ({}, dict(positions_as_input=True), EACH, True, True),
    (dict(coverage=1.), {}, SHARED, False, True),  # how often windows are blurred depends on the size of the image
    (dict(placer='density'), {}, LATTICE, True, True),
    (dict(placer='density', coverage=1.), {}, INSIDE, False, False),
    (dict(placer=TOY), {}, INSIDE, False, False),
    (dict(placer=TOY), dict(positions_as_input=True), EACH, True, False),
    (dict(sampler='salient', saliency='energy'), dict(positions_as_input=True), EACH, True, False),
])
def test_what_a_file_takes(keywords, options, placement, any_size, budgets):
    model = timm.create_model('spot_vit_pico_patch8_64', depth=1, **keywords).eval()
    options = dict(dict(n_tokens=None, positions_as_input=False, uint8=False, precision='float32'), **options)
    info = describe(model, **options)
    assert (info.placement, info.any_size, info.takes_budgets) == (placement, any_size, budgets)
    assert info.columns == (4 if 'coverage' in keywords else 2)
    assert OnnxInfo.from_json(info.to_json(), 'm.onnx') == info


def test_models_without_a_budget_of_their_own_keep_having_none(tiny):
    asked = dict(positions_as_input=False, uint8=True, precision='int8')
    info = describe(tiny, None, **asked)
    assert info.n_tokens is None and describe(tiny, 9, **asked).n_tokens == tiny.n_tokens  # as it was set before
    assert info.class_names == info.label_names == ['ape', 'bee', 'cow']
    assert info.config['input_size'] == (3, 64, 64) and info.images == 'uint8'


def test_pictures_become_what_a_file_of_one_size_takes(tiny):
    model = timm.create_model('spot_vit_tiny_patch16_in21k', img_size=64, depth=1).eval()
    asked = dict(positions_as_input=False, uint8=False, precision='float32')
    assert describe(model, 4, **asked).config['input_size'] == (3, 64, 64)
    assert describe(model, None, **asked).config['input_size'] == (3, 224, 224)


def test_operations_are_a_polynomial(tiny):
    info = describe(tiny, None, False, False, 'float32')
    assert OnnxInfo(**dict(vars(info), flops=(7., 5., 2.))).count_flops(3) == 7 + 15 + 18


@pytest.mark.parametrize('change, says', [
    (lambda values: 'not JSON', 'metadata are damaged'),
    (lambda values: json.dumps([]), 'metadata are damaged'),
    (lambda values: json.dumps(dict(values, version=2)), 'm.onnx is of version 2, this timm_spot reads 1'),
    (lambda values: json.dumps({k: v for k, v in values.items() if k != 'seed'}), 'm.onnx is damaged: .* seed'),
])
def test_records_that_cannot_be_read(tiny, change, says):
    text = describe(tiny, None, False, False, 'float32').to_json()
    with pytest.raises(ValueError, match=says):
        OnnxInfo.from_json(change(json.loads(text)), 'm.onnx')
