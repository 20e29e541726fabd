from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from commands import run
from PIL import Image


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


def test_many_pictures_leave_no_figures_open(pictures, saved, tmp_path):
    run('predict', pictures, '--model', saved, '--save-placement', tmp_path / 'all.png')
    import matplotlib.pyplot as plt
    assert not plt.get_fignums()


def test_models_lists_every_tag():
    lines = run('models').stdout.splitlines()
    assert lines[0].split() == ['model', 'tag', 'parameters', 'weights']
    rows = {tuple(line.split()[:2]): line for line in lines[1:]}
    assert 'Hub: timm/vit_base_patch16_224.mae' in rows['spot_vit_base_patch16_mae', 'mae']
    assert "the authors' file" in rows['spot_vit_base_patch16_mae', 'spot_in1k']
    assert 'in the package' in rows['spot_vit_pico_patch8_64', 'digits']
    assert 'in the package' in rows['relevance_spot_vit_pico_patch8_64', 'digits']


def test_predict_of_regions(dht, tmp_path):
    result = run('predict', dht / 'noise.png', '--model', f'local-dir:{dht}/model', '--n-tokens', 9,
                 '--save-placement', tmp_path / 'regions.png')
    assert result.exit_code == 0, result.output
    assert (tmp_path / 'regions.png').stat().st_size > 1000


def test_predict_of_odd_pictures(dht, odd):
    result = run('predict', odd, '--model', f'local-dir:{dht}/model')
    assert result.exit_code == 0 and 'warning' not in result.stderr, result.output
    assert len(result.stdout.splitlines()) == len(list(odd.iterdir()))
    assert 'nan' not in result.stdout


def test_weights_from_a_file(dht, tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model('dht_vit_pico_patch8_64').state_dict(), tmp_path / 'pico.pth')
    given = ('predict', dht / 'noise.png', '--model', 'dht_vit_pico_patch8_64')
    result = run(*given, '--weights', tmp_path / 'pico.pth', '--n-tokens', 9)
    assert result.exit_code == 0 and result.stdout.count('%') == 5, result.output
    result = run(*given)
    assert result.exit_code == 1 and 'dht_vit_pico_patch8_64 has no pretrained weights' in result.output
    result = run(*given, '--weights', tmp_path / 'none.pth')
    assert result.exit_code == 1 and 'none.pth does not exist' in result.output


def test_models_lists_those_of_regions():
    lines = {line.split('  ')[0]: line for line in run('models').output.splitlines()}
    assert 'dht_vit_base_patch16_in1k' in lines
    assert lines['dht_vit_pico_patch8_64'].endswith('none')


def test_unknown_range_is_refused(dht, tmp_path):
    Image.fromarray(np.zeros((20, 20), np.float32)).save(tmp_path / 'depth.tiff')
    result = run('predict', tmp_path / 'depth.tiff', '--model', f'local-dir:{dht}/model')
    assert result.exit_code == 1 and 'its pixels have 32 bits (mode F)' in result.output
