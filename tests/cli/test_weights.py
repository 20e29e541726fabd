from __future__ import annotations

import pytest
import timm
from commands import run
from conftest import SMALL
from safetensors.torch import save_file

import timm_spot


def test_convert_then_dry_run_of_push(tmp_path, pico):
    save_file(pico.state_dict(), tmp_path / 'pico.safetensors')
    out = str(tmp_path / 'out')
    result = run('convert', str(tmp_path / 'pico.safetensors'), out, '--model', 'spot_vit_pico_patch8_64')
    assert result.exit_code == 0, result.output
    assert f'mapped        {len(pico.state_dict())} tensors' in result.output
    assert 'verified      loaded back' in result.output
    assert f"'local-dir:{out}'" in result.output

    (tmp_path / 'out' / 'notes.txt').write_text('mine')
    result = run('push', out, 'lab/pico', '--dry-run', '--private', '--revision', 'v1')
    assert result.exit_code == 0, result.output
    assert 'would send model.safetensors' in result.output and 'to lab/pico@v1 (private)' in result.output
    assert 'notes.txt is no part of the model' in result.output


def test_convert_and_push_report_mistakes_in_one_line(tmp_path):
    result = run('convert', str(tmp_path / 'no.pth'), str(tmp_path / 'out'))
    assert result.exit_code == 1 and 'no.pth is no file' in result.output and 'Traceback' not in result.output
    result = run('push', str(tmp_path), 'lab/name', '--dry-run')
    assert result.exit_code == 1 and 'lacks model.safetensors' in result.output


def test_export_refuses_models_that_place_no_tokens(dht, tmp_path):
    result = run('export', f'local-dir:{dht}/model', tmp_path / 'x.onnx')
    assert result.exit_code == 1 and 'tokens are regions that it finds itself' in result.output


@pytest.mark.parametrize('arguments', [('--coverage', 0.5, '--positions-as-input'), ('--sampler', 'coarse+center')])
def test_export_with_sizes(saved, tmp_path, arguments):
    result = run('export', saved, tmp_path / 'x.pt2', '--n-tokens', 4, *arguments)
    assert result.exit_code == 0 and 'largest difference to the model' in result.output, result.output


def test_export_takes_the_size_that_the_config_says(tmp_path):
    model = timm.create_model('spot_vit_tiny_patch16_in21k', img_size=64, **SMALL)
    model.pretrained_cfg['input_size'] = (3, 48, 48)
    timm.models.save_for_hf(model, tmp_path / 'saved')
    result = run('export', tmp_path / 'saved', tmp_path / 'm.onnx', '--n-tokens', 4)
    assert result.exit_code == 0, result.output
    assert timm_spot.OnnxModel(tmp_path / 'm.onnx').info.image_size == (48, 48)


def test_export_of_bytes_and_what_predict_makes_of_it(saved, pictures, tmp_path):
    out = tmp_path / 'm.onnx'
    result = run('export', saved, out, '--int8', '--calibrate', pictures, '--force', '--n-tokens', 4)
    assert result.exit_code == 0 and 'on 1 pictures of' in result.output, result.output
    result = run('predict', pictures, '--model', out)
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 2, result.output
    for arguments, says in (
            (('--n-tokens', 9), 'm.onnx has 4 tokens alone'), (('--sampler', 'center'), 'leave out --sampler'),
            (('--weights', out), 'as it was exported: leave out --weights')):
        result = run('predict', pictures, '--model', out, *arguments)
        assert result.exit_code == 1 and says in result.output and 'Traceback' not in result.output, result.output
    result = run('draw', '--model', out, pictures / 'a.png', '--out', tmp_path / 'a.svg')
    assert result.exit_code == 1 and 'exported file, which predict and evaluate take' in result.output
    out.write_bytes(out.read_bytes()[:1000])
    result = run('predict', pictures, '--model', out)
    assert result.exit_code == 1 and 'm.onnx is damaged' in result.output and 'Traceback' not in result.output
    result = run('export', saved, out, '--int8', '--fp16')
    assert result.exit_code == 1 and 'two files' in result.output
    result = run('predict', pictures, '--model', tmp_path / 'no.onnx')
    assert result.exit_code == 1 and 'no.onnx does not exist' in result.output
