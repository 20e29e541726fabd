from __future__ import annotations

import pytest
import torch
from onnx import helper
from PIL import Image

import timm_spot
from timm_spot.tasks.deploy import onnx_export
from timm_spot.tasks.deploy.onnx_export import OnnxOptions, export_onnx
from timm_spot.tasks.evaluation.flops import count_flops


@pytest.fixture
def noise(tmp_path):
    folder = tmp_path / 'noise'
    folder.mkdir()
    for i in range(6):
        Image.effect_noise((64, 64), 20 * (i + 1)).convert('RGB').save(folder / f'{i}.png')
    return str(folder)


def test_static_int8_is_compared_on_the_other_half(tiny, tmp_path, noise):
    path = tmp_path / 'static.onnx'
    difference, fidelity = export_onnx(
        tiny, path, OnnxOptions(n_tokens=9, precision='int8', calibrate=noise, force=True))
    assert (fidelity.pictures, fidelity.source, fidelity.accuracy) == (3, noise, None) and fidelity.cosine > 0.9
    assert difference > 0 and timm_spot.OnnxModel(path, threads=1).info.precision == 'int8'


def test_half_precision(tiny, tmp_path, noise):
    difference, fidelity = export_onnx(tiny, tmp_path / 'half.onnx', OnnxOptions(precision='float16', verify=noise))
    assert 0 < difference < 0.05 and fidelity.pictures == 6 and fidelity.cosine > 0.999
    assert tiny.head.weight.dtype == torch.float32


def test_what_loses_too_much_is_refused(tiny, tmp_path, noise, monkeypatch):
    path = tmp_path / 'bad.onnx'
    right = onnx_export.quantize_dynamic

    def wrong(proto):
        quantized = right(proto)
        last, = (node for node in quantized.graph.node if 'logits' in node.output)
        last.output[:] = ['right']
        quantized.graph.node.append(helper.make_node('Neg', ['right'], ['logits']))
        return quantized

    monkeypatch.setattr(onnx_export, 'quantize_dynamic', wrong)
    with pytest.raises(RuntimeError, match=r'in int8, but .* Nothing was kept: force keeps it nevertheless'):
        export_onnx(tiny, path, OnnxOptions(precision='int8'))
    assert not list(tmp_path.glob('*.onnx')) and not list(tmp_path.glob('.*'))
    export_onnx(tiny, path, OnnxOptions(precision='int8', force=True))
    assert path.exists()


def test_a_float_file_that_answers_otherwise_is_an_error(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, 'TOLERANCE', 1e-12)
    with pytest.raises(RuntimeError, match=r'm\.onnx was written, but its logits differ .* Nothing was kept'):
        export_onnx(tiny, tmp_path / 'm.onnx', OnnxOptions())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('n_tokens', [1, 25])
def test_operations_are_those_that_torch_counts(tiny, float_file, n_tokens):
    counted = count_flops(tiny, torch.zeros(1, 3, 64, 64), torch.zeros(n_tokens, 2))
    assert timm_spot.OnnxModel(float_file, threads=1).info.count_flops(n_tokens) == counted
