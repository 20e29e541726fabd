from __future__ import annotations

import sys

import onnxruntime
import pytest
import timm
import torch
from click.testing import CliRunner
from timm.utils.onnx import onnx_export
from toy_placer import NAME as TOY

import timm_spot
from timm_spot.cli import main


@pytest.fixture(scope='module')
def model():
    return timm.create_model('spot_vit_pico_patch8_64', n_tokens=9, depth=1, num_classes=10).eval()


@pytest.mark.parametrize('name, positions_as_input', [
    ('model.pt2', False), ('model.pt2', True), ('model.onnx', False), ('model.onnx', True)])
def test_written_file_answers_as_the_model(model, tmp_path, name, positions_as_input):
    path = tmp_path / name
    assert timm_spot.export_model(model, path, positions_as_input) < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == [name]  # one file, weights included
    images, positions = torch.randn(4, 3, 64, 64), torch.rand(4, 5, 2)
    inputs = dict(images=images, positions=positions) if positions_as_input else dict(images=images)
    if path.suffix == '.onnx':
        session = onnxruntime.InferenceSession(path)
        assert [i.name for i in session.get_inputs()] == list(inputs)
        answer = torch.from_numpy(session.run(['logits'], {k: v.numpy() for k, v in inputs.items()})[0])
    else:
        answer = torch.export.load(path).module()(*inputs.values())
    torch.testing.assert_close(answer, model(*inputs.values()), rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', ['model.pt2', 'model.onnx'])
def test_positions_and_sizes_are_an_input(tmp_path, name):
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', n_tokens=9, depth=1, num_classes=10, coverage=1.).eval()
    torch.nn.init.normal_(model.patch_embed.size_proj.weight)
    assert timm_spot.export_model(model, tmp_path / name, positions_as_input=True) < 1e-4
    images, placement = torch.randn(4, 3, 64, 64), torch.rand(4, 5, 4)
    placement[..., 2:] = torch.tensor([0.5, 1., 1.5, 4., 8.])[:, None]  # to windows as large as the picture
    if name.endswith('.onnx'):
        inputs = dict(images=images.numpy(), positions=placement.numpy())
        answer = torch.from_numpy(onnxruntime.InferenceSession(tmp_path / name).run(None, inputs)[0])
    else:
        answer = torch.export.load(tmp_path / name).module()(images, placement)
    torch.testing.assert_close(answer, model(images, placement), rtol=0, atol=1e-4)


@pytest.mark.parametrize('sampler, coverage', [('center', 0.5), ('coarse+center', 0.)])
def test_sizes_are_part_of_the_file(tmp_path, sampler, coverage):
    model = timm.create_model(
        'spot_vit_pico_patch8_64', n_tokens=9, depth=1, num_classes=10, sampler=sampler, coverage=coverage).eval()
    assert timm_spot.export_model(model, tmp_path / 'model.onnx') < 1e-4


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')  # of timm's exporter
@pytest.mark.parametrize('use_dynamo', [False, True])
def test_timm_s_own_onnx_export(model, tmp_path, use_dynamo):
    # Without --dynamo timm's onnx_export.py traces: sizes are tensors then, and aten::threshold has no counterpart.
    onnx_export(model, str(tmp_path / 'model.onnx'), use_dynamo=use_dynamo, input_size=(3, 64, 64))
    images = torch.randn(3, 3, 64, 64)
    answer = onnxruntime.InferenceSession(tmp_path / 'model.onnx').run(None, {'input0': images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(answer), model(images), rtol=0, atol=1e-4)


def test_a_file_that_answers_differently_is_an_error(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        'timm_spot.tasks.publishing.export._read_program', lambda path: lambda images: model(images) + 1e-3)
    (tmp_path / 'model.pt2').write_bytes(b'an older one')
    with pytest.raises(RuntimeError, match=r'model\.pt2 was written, but its logits differ .* by 0\.001\. Nothing was'):
        timm_spot.export_model(model, tmp_path / 'model.pt2', overwrite=True)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [('model.pt2', b'an older one')]


@pytest.mark.parametrize('name, positions_as_input', [
    ('model.pt2', False), ('model.pt2', True), ('model.onnx', False), ('model.onnx', True)])
def test_a_placement_network_is_part_of_the_file(tmp_path, name, positions_as_input):
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', depth=1, placer=TOY, n_tokens=9).eval()
    torch.nn.init.normal_(model.placer.net.weight, std=3.)
    assert timm_spot.export_model(model, tmp_path / name, positions_as_input) < 1e-4
    images, positions = torch.rand(2, 3, 64, 64), torch.rand(2, 5, 2)
    images[1] *= -1
    assert (model.place(images)[0] - model.place(images)[1]).abs().max() > 0.01  # so that a constant would show
    inputs = dict(images=images, positions=positions) if positions_as_input else dict(images=images)
    if name.endswith('.onnx'):
        answer = onnxruntime.InferenceSession(tmp_path / name).run(None, {k: v.numpy() for k, v in inputs.items()})[0]
        answer = torch.from_numpy(answer)
    else:
        answer = torch.export.load(tmp_path / name).module()(*inputs.values())
    torch.testing.assert_close(answer, model(*inputs.values()), rtol=0, atol=1e-4)


def test_what_cannot_be_exported(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must end in '\.onnx' or '\.pt2'"):
        timm_spot.export_model(model, tmp_path / 'model.pth')
    salient = timm.create_model('spot_vit_pico_patch8_64', sampler='salient', saliency='spectral_residual').eval()
    with pytest.raises(ValueError, match=r"'salient' places tokens by the image.*positions_as_input=True"):
        timm_spot.export_model(salient, tmp_path / 'model.pt2')
    with pytest.raises(TypeError, match='must be a subpixel ViT, got Linear'):
        timm_spot.export_model(torch.nn.Linear(1, 1), tmp_path / 'model.pt2')
    with pytest.raises(TypeError, match='got DhtVisionTransformer'):
        timm_spot.export_model(timm.create_model('dht_vit_pico_patch8_64', depth=1).eval(), tmp_path / 'model.pt2')
    with pytest.raises(ValueError, match=r'in train mode.*model\.eval\(\)'):
        timm_spot.export_model(timm.create_model('spot_vit_pico_patch8_64', depth=1), tmp_path / 'model.pt2')
    with pytest.raises(FileNotFoundError, match=r'in which model\.pt2 is to be written, is no folder'):
        timm_spot.export_model(model, tmp_path / 'no' / 'model.pt2')
    for options, says in (
            (dict(int8=True, fp16=True), 'two files'), (dict(calibrate='digits'), 'ask for that too'),
            (dict(force=True), 'for int8 and fp16')):
        with pytest.raises(ValueError, match=says):
            timm_spot.export_model(model, tmp_path / 'model.onnx', **options)
    for options in (dict(int8=True), dict(fp16=True), dict(uint8=True)):
        with pytest.raises(ValueError, match=r'are ONNX, ending in \.onnx'):
            timm_spot.export_model(model, tmp_path / 'model.pt2', **options)
    bare = timm_spot.retrofit(timm.create_model('vit_tiny_patch16_224', depth=1)).eval()
    bare.patch_embed.normalization = None
    with pytest.raises(ValueError, match='does not say how to normalise'):
        timm_spot.export_model(bare, tmp_path / 'model.onnx', uint8=True)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxruntime: pip install 'timm-spot\[export\]'"):
        timm_spot.export_model(model, tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())


def test_command(tmp_path):
    out = tmp_path / 'digits.pt2'
    result = CliRunner().invoke(
        main, ['export', 'spot_vit_pico_patch8_64', str(out), '--n-tokens', '9'], catch_exceptions=False)
    assert result.exit_code == 0 and 'largest difference' in result.output
    digits = timm.create_model('spot_vit_pico_patch8_64', pretrained=True, n_tokens=9).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.export.load(out).module()(images), digits(images), rtol=0, atol=1e-4)
    result = CliRunner().invoke(main, ['export', 'spot_vit_pico_patch8_64', str(tmp_path / 'digits.pth')])
    assert result.exit_code == 1 and "must end in '.onnx' or '.pt2'" in result.output


@pytest.mark.parametrize('name', ['model.pt2', 'model.onnx'])
def test_nothing_is_written_over_unasked(model, tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_bytes(b'an older one')
    with monkeypatch.context() as patch:
        patch.setattr('torch.export.export', None)  # refused before any work
        with pytest.raises(FileExistsError, match=r'is there already: give --overwrite \(from Python overwrite=True\)'):
            timm_spot.export_model(model, path)
        result = CliRunner().invoke(main, ['export', 'spot_vit_pico_patch8_64', str(path)])
        assert result.exit_code == 1 and 'is there already: give --overwrite' in result.output
    assert path.read_bytes() == b'an older one'
    assert timm_spot.export_model(model, path, overwrite=True) < 1e-4
    assert path.read_bytes() != b'an older one'


@pytest.mark.parametrize('name', ['m\u00f6del \u6a21.pt2', 'caf\udce9.pt2', 'new\nline.pt2'])
def test_names_of_every_kind(model, tmp_path, name):
    assert timm_spot.export_model(model, tmp_path / name) < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_onnx_under_a_name_that_is_no_utf8_is_refused_before_any_work(model, tmp_path):
    with pytest.raises(ValueError, match='lies under a name that is no UTF-8'):
        timm_spot.export_model(model, tmp_path / 'caf\udce9.onnx')
    assert not any(tmp_path.iterdir())
