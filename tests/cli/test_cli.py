from __future__ import annotations

import json

import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import SMALL
from PIL import Image
from safetensors.torch import save_file

from timm_spot.cli import main


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for name in ('a.png', 'b.png'):
        Image.effect_noise((100, 80), 40).save(folder / name)
    return folder


@pytest.fixture
def saved(tmp_path):
    """A tiny model as timm saves it."""
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', **SMALL)
    timm.models.save_for_hf(model, tmp_path / 'saved')
    return f'local-dir:{tmp_path}/saved'


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_predict_prints_a_line_for_each_picture(pictures, saved):
    result = run('predict', pictures, '--model', saved, '--topk', 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [str(pictures / 'a.png'), str(pictures / 'b.png')]
    assert lines[0].count('%') == 2


def test_predict_json(pictures, saved):
    result = run('predict', pictures / 'a.png', '--model', saved, '--json', '--n-tokens', 9, '--sampler', 'center')
    row, = json.loads(result.stdout)
    assert row['file'] == str(pictures / 'a.png')
    assert [set(c) for c in row['classes']] == [{'label', 'name', 'probability'}] * 5
    model = timm.create_model(saved, pretrained=True, n_tokens=9, sampler='center').eval()
    image = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(
        Image.open(pictures / 'a.png').convert('RGB'))
    probabilities = model(image[None]).softmax(dim=1)[0]
    assert row['classes'][0]['probability'] == pytest.approx(probabilities.max().item(), abs=1e-5)


def test_predict_saves_placements(pictures, saved, tmp_path):
    run('predict', pictures / 'a.png', '--model', saved, '--save-placement', tmp_path / 'one.png')
    with Image.open(tmp_path / 'one.png') as picture:
        assert picture.format == 'PNG'
    run('predict', pictures, '--model', saved, '--save-placement', tmp_path / 'all.png')
    assert sorted(p.name for p in tmp_path.glob('all*')) == ['all-a.png', 'all-b.png']


def test_predict_reports_what_is_no_picture_and_goes_on(pictures, saved):
    (pictures / 'c.png').write_text('no picture')
    result = run('predict', pictures, '--model', saved)
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 2
    assert 'c.png is no picture' in result.stderr


@pytest.mark.parametrize('arguments, says', [
    (['no/such/file.png'], 'no/such/file.png is no file, no folder and matches nothing'),
    (['{empty}'], 'holds no picture'),
    (['{a}', '--model', 'spot_vit_bse_patch16_mae'], 'Did you mean spot_vit_base_patch16_mae'),
    (['{a}', '--model', 'resnet18'], 'no model of timm_spot'),
    (['{a}', '--n-tokens', '0'], 'n_tokens=0'),
    (['{a}', '--sampler', 'isotopic'], "did you mean 'isotropic'"),
    (['{a}', '--weights', 'no.safetensors'], 'no.safetensors does not exist'),
    (['{a}', '--weights', '{broken}'], 'broken.safetensors is damaged'),
    (['{a}', '--model', 'spot_vit_base_patch16_mae.spot_in1k'], 'dsb-ifi.github.io/SPoT'),
])
def test_mistakes_are_told_in_one_line(arguments, says, pictures, tmp_path, monkeypatch):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken.safetensors').write_bytes(b'123')
    # No other model than ours is ever fetched in a test.
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained, **kw: create(
        name, pretrained=pretrained and name != 'resnet18', **{k: v for k, v in kw.items() if v is not None}))
    names = dict(empty=tmp_path / 'empty', a=pictures / 'a.png', broken=tmp_path / 'broken.safetensors')
    result = run('predict', *[a.format(**names) for a in arguments])
    assert result.exit_code == 1
    assert says in result.stderr
    assert 'Traceback' not in result.output


def test_models_lists_every_tag():
    lines = run('models').stdout.splitlines()
    assert lines[0].split() == ['model', 'tag', 'parameters', 'weights']
    rows = {tuple(line.split()[:2]): line for line in lines[1:]}
    assert 'Hub: timm/vit_base_patch16_224.mae' in rows['spot_vit_base_patch16_mae', 'mae']
    assert "the authors' file" in rows['spot_vit_base_patch16_mae', 'spot_in1k']
    assert 'in the package' in rows['spot_vit_pico_patch8_64', 'digits']
    assert 'in the package' in rows['relevance_spot_vit_pico_patch8_64', 'digits']


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


def test_predict_by_saliency(pictures, saved):
    spectral, salient, plain = (
        json.loads(run('predict', pictures, '--model', saved, '--n-tokens', 9, '--json', *arguments).stdout)
        for arguments in (['--saliency', 'spectral'], ['--sampler', 'salient'], []))
    assert spectral == salient != plain

    maps = pictures.parent / 'maps'
    maps.mkdir()
    Image.new('L', (10, 8), 255).save(maps / 'a.png')
    result = run('predict', pictures, '--model', saved, '--saliency', maps)
    assert result.exit_code == 1 and 'no saliency map for 1 of 2 images: b.png' in result.stderr
    assert run('predict', pictures / 'a.png', '--model', saved, '--saliency', maps).exit_code == 0
    for arguments, says in (
            (['--saliency', 'spectrum'], "saliency='spectrum' is none of"),
            (['--saliency', 'spectral', '--sampler', 'sobol'], 'is of no use to')):
        result = run('predict', pictures, '--model', saved, *arguments)
        assert result.exit_code == 1 and says in result.stderr and 'Traceback' not in result.output


@pytest.mark.parametrize('kind', ['placement', 'seen', 'priors', 'trajectory', 'pruning'])
def test_draw(pictures, saved, tmp_path, kind):
    result = run(
        'draw', pictures / 'a.png', '--out', tmp_path / 'out.png', '--kind', kind, '--model', saved, '--n-tokens', 9,
        '--saliency', 'spectral', '--steps', 2)
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / 'out.png') as drawn:
        assert drawn.format == 'PNG' and len(drawn.convert('RGB').getcolors(10 ** 6)) > 50


def test_draw_film(pictures, saved, tmp_path):
    film = tmp_path / 'out.gif'
    result = run('draw', pictures / 'a.png', '--out', film, '--kind', 'film', '--model', saved, '--steps', 2)
    assert result.exit_code == 0, result.output
    with Image.open(film) as frames:
        assert frames.n_frames == 3


def test_draw_says_what_is_wrong(pictures, saved, tmp_path):
    for arguments, says in (
            (['no.png', '--out', tmp_path / 'out.png'], 'no.png'),
            ([pictures / 'a.png', '--out', tmp_path / 'out.xyz'], 'xyz'),
            ([pictures / 'a.png', '--out', tmp_path / 'out.png', '--kind', 'film'], 'must end in .gif or .mp4')):
        result = run('draw', *arguments, '--model', saved)
        assert result.exit_code == 1 and says in result.stderr and 'Traceback' not in result.output


def test_many_pictures_leave_no_figures_open(pictures, saved, tmp_path):
    run('predict', pictures, '--model', saved, '--save-placement', tmp_path / 'all.png')
    import matplotlib.pyplot as plt
    assert not plt.get_fignums()
