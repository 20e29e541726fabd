from __future__ import annotations

from pathlib import Path

import click
import pytest
import timm
from conftest import SMALL

from timm_spot.cli import params


@pytest.mark.parametrize('kind, value', [
    (params.BUDGET, '0'), (params.BUDGET, '-1'), (params.BUDGET, '1000000000000'), (params.BUDGET, 'nan'),
    (params.BUDGET, '1.5'), (params.SEED, '-1'), (params.SEED, str(2 ** 70)), (params.STEPS, '-1'),
    (params.POSITIVE, '0'), (params.POSITIVE, '-1'), (params.POSITIVE, 'nan'), (params.POSITIVE, 'inf'),
    (params.POSITIVE, 'much'), (params.POSITIVE, '1e999'), (params.SHARE, '0'), (params.SHARE, '1.01'),
    (params.COUNT, '0'),
])
def test_a_number_out_of_its_range_is_refused_with_the_range(kind, value):
    with pytest.raises(click.ClickException, match=f'^number={value} must be a.* number (above|of at least) '):
        kind.convert(value, click.Option(['--number']), None)


@pytest.mark.parametrize('kind, value, expected', [
    (params.BUDGET, '1', 1), (params.BUDGET, '1000000', 10 ** 6), (params.SEED, '0', 0),
    (params.SEED, str(2 ** 32 - 1), 2 ** 32 - 1), (params.STEPS, '0', 0), (params.POSITIVE, '1e-3', 1e-3),
    (params.SHARE, '1', 1.),
])
def test_the_ends_of_a_range_are_taken(kind, value, expected):
    number = kind.convert(value, None, None)
    assert number == expected and type(number) is type(expected)


def test_lists_are_of_values_each_checked():
    assert params.Items(params.BUDGET).convert('9, 25', None, None) == (9, 25)
    assert params.Items(params.BUDGET).convert('', None, None) == ()
    with pytest.raises(click.ClickException, match='0 must be a whole number of at least 1'):
        params.Items(params.BUDGET).convert('9,0', None, None)


def test_a_folder_with_a_config_is_a_model(tmp_path, monkeypatch):
    timm.models.save_for_hf(timm.create_model('spot_vit_pico_patch8_64', **SMALL), tmp_path / 'a:b' / 'saved')
    folder = tmp_path / 'a:b' / 'saved'
    for name in (folder, f'local-dir:{folder}', f'local_dir:{folder}'):
        assert params.check_model_name(str(name)) == f'local-dir:{folder}'
    monkeypatch.chdir(folder.parent)
    assert params.check_model_name('saved') == 'local-dir:saved'
    # A registered name is that model, whatever lies in this folder.
    Path('spot_vit_pico_patch8_64').mkdir()
    assert params.check_model_name('spot_vit_pico_patch8_64') == 'spot_vit_pico_patch8_64'


@pytest.mark.parametrize('name, says', [
    ('{empty}', 'holds no config.json'),
    ('local-dir:{empty}', 'holds no config.json'),
    ('spot_vit_bse_patch16_mae', 'Did you mean spot_vit_base_patch16_mae'),
    ('spot_vit_pico_patch8_64.letters', "has no weights 'letters': spot_vit_pico_patch8_64.digits"),
    ('resnet18', 'no model of timm_spot'),
    ('ftp:somewhere', 'give a name, hf-hub:ID, local-dir:PATH'),
    ('hf-hub:', 'give a name, hf-hub:ID, local-dir:PATH'),
])
def test_what_is_no_model_is_refused_by_its_name(name, says, tmp_path):
    with pytest.raises((ValueError, OSError), match=says):
        params.check_model_name(name.format(empty=tmp_path), ours=True)


def test_any_model_of_timm_where_any_is_taken():
    assert params.check_model_name('resnet18.a1_in1k') == 'resnet18.a1_in1k'
    assert params.check_model_name('hf-hub:lab/model') == 'hf-hub:lab/model'


@pytest.mark.parametrize('kind, value, says', [
    (params.SamplerName(), 'isotopic', "did you mean 'isotropic'"),
    (params.SaliencyName(), 'spectrum', "saliency='spectrum' is none of"),
    (params.SaliencyName(), 'attention:vit_of_nobody', 'unknown model vit_of_nobody'),
    (params.DeviceName(), 'gpu', "device='gpu' is no device of torch"),
    (params.DeviceName(), 'cuda:4096', "device='cuda:4096' is not on this machine"),
    (params.DeviceName(), 'meta', "device='meta' is not on this machine"),
    (params.InputFile(), 'no.pth', 'no.pth does not exist'),
    (params.InputFile(), '.', r'\. is a folder, not a file'),
    (params.OutputFile(), 'no/such/a.png', 'there is no folder no/such to write a.png to'),
    (params.OutputFile(), '.', r'\. is a folder, not a file'),
    (params.OutputFile('.onnx', '.pt2'), 'a.png', r"a\.png must end in '\.onnx' or '\.pt2'"),
    (params.OutputFolder(), 'file/svg', 'file is a file, not a folder'),
    (params.OutputFolder(holds_weights=True), 'caf\udce9', r'caf\\xe9 lies under a name that is no UTF-8'),
])
def test_what_is_not_there_is_refused_before_any_work(kind, value, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    with pytest.raises(click.ClickException, match=says):
        kind.convert(value, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_what_is_there_is_taken(tmp_path):
    assert params.DeviceName().convert('cpu', None, None) == 'cpu'
    assert params.SaliencyName().convert(str(tmp_path), None, None) == str(tmp_path)
    assert params.SaliencyName().convert('attention:vit_tiny_patch16_224', None, None).startswith('attention:')
    assert params.OutputFile('.png').convert(tmp_path / 'a.PNG', None, None) == tmp_path / 'a.PNG'
    assert params.OutputFolder().convert(tmp_path / 'caf\udce9', None, None) == tmp_path / 'caf\udce9'
    assert params.OutputFolder().convert(tmp_path / 'new' / 'folder', None, None) == tmp_path / 'new' / 'folder'
