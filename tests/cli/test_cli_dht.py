from __future__ import annotations

import csv
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_spot.cli import main


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """A folder with a small dHT model, and a picture."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('dht')
    timm.models.save_for_hf(
        timm.create_model('dht_vit_pico_patch8_64', embed_dim=32, depth=1), folder / 'model', safe_serialization=True)
    Image.effect_noise((40, 40), 90).convert('RGB').save(folder / 'noise.png')
    return folder


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_predict(model, tmp_path):
    result = run('predict', model / 'noise.png', '--model', f'local-dir:{model}/model', '--n-tokens', 9,
                 '--save-placement', tmp_path / 'regions.png')
    assert result.exit_code == 0, result.output
    assert (tmp_path / 'regions.png').stat().st_size > 1000


@pytest.mark.parametrize('kind', ['regions', 'means', 'hierarchy'])
def test_draw(model, tmp_path, kind):
    result = run('draw', model / 'noise.png', '--model', f'local-dir:{model}/model', '--kind', kind,
                 '--out', tmp_path / 'out.png')
    assert result.exit_code == 0, result.output
    assert (tmp_path / 'out.png').stat().st_size > 1000


@pytest.mark.parametrize('options', [('--kind', 'seen'), ('--sampler', 'sobol')])
def test_what_does_not_suit_is_refused(model, tmp_path, options):
    result = run('draw', model / 'noise.png', '--model', f'local-dir:{model}/model', *options, '--out', tmp_path / 'x')
    assert result.exit_code == 1 and 'Error: ' in result.output
    result = run('draw', model / 'noise.png', '--kind', 'hierarchy', '--out', tmp_path / 'x')
    assert result.exit_code == 1 and 'does not suit' in result.output


def test_vectorize(model, tmp_path):
    result = run('vectorize', model / 'noise.png', '--out', tmp_path / 'svg', '--regions', 20, '--max-side', 32)
    assert result.exit_code == 0, result.output
    root = ET.parse(tmp_path / 'svg' / 'noise.svg').getroot()
    assert root.attrib == dict(width='32', height='32')


def test_vectorize_overwrites_none_of_its_own(tmp_path):
    for name in ('a.png', 'a.jpg'):
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    result = run('vectorize', tmp_path, '--out', tmp_path / 'svg')
    assert result.exit_code == 1 and 'would both be' in result.output
    assert not (tmp_path / 'svg').exists()


def test_models_lists_them():
    lines = {line.split('  ')[0]: line for line in run('models').output.splitlines()}
    assert 'dht_vit_base_patch16_in1k' in lines
    assert lines['dht_vit_pico_patch8_64'].endswith('none')


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    """A folder of pictures that are no ordinary photographs."""
    folder = tmp_path_factory.mktemp('odd')
    noise = np.random.default_rng(0).integers(0, 2 ** 16, (40, 30), dtype=np.uint16)
    board = 255 * (np.add.outer(np.arange(40), np.arange(40)) % 2).astype(np.uint8)
    for name, picture in {
            'grey16': Image.fromarray(noise), 'grey': Image.fromarray(noise.astype(np.uint8)),
            'palette': Image.fromarray(board).convert('P'), 'transparent': Image.fromarray(board).convert('RGBA'),
            'grey_alpha': Image.fromarray(board).convert('LA'), 'constant': Image.new('RGB', (40, 40), 'teal'),
            'board': Image.fromarray(board), 'wide': Image.fromarray(noise[:1].astype(np.uint8)),
            'tall': Image.fromarray(noise[:, :1].astype(np.uint8)), 'bits': Image.fromarray(board).convert('1'),
            'pixel': Image.new('L', (1, 1))}.items():
        picture.save(folder / f'{name}.png')
    return folder


def test_predict_of_odd_pictures(model, odd):
    result = run('predict', odd, '--model', f'local-dir:{model}/model')
    assert result.exit_code == 0 and 'warning' not in result.stderr, result.output
    assert len(result.stdout.splitlines()) == len(list(odd.iterdir()))
    assert 'nan' not in result.stdout


def test_vectorize_of_odd_pictures(odd, tmp_path):
    result = run('vectorize', odd, '--out', tmp_path)
    assert result.exit_code == 0, result.output
    for file in odd.iterdir():
        with Image.open(file) as picture:
            root = ET.parse(tmp_path / f'{file.stem}.svg').getroot()
            assert (root.attrib['width'], root.attrib['height']) == tuple(map(str, picture.size))


@pytest.mark.parametrize('command', ['predict', 'vectorize'])
def test_unknown_range_is_refused(model, tmp_path, command):
    Image.fromarray(np.zeros((20, 20), np.float32)).save(tmp_path / 'depth.tiff')
    where = ('--out', tmp_path) if command == 'vectorize' else ('--model', f'local-dir:{model}/model')
    result = run(command, tmp_path / 'depth.tiff', *where)
    assert result.exit_code == 1 and 'its pixels have 32 bits (mode F)' in result.output


def test_weights(model, tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model('dht_vit_pico_patch8_64').state_dict(), tmp_path / 'pico.pth')
    given = ('predict', model / 'noise.png', '--model', 'dht_vit_pico_patch8_64')
    result = run(*given, '--weights', tmp_path / 'pico.pth', '--n-tokens', 9)
    assert result.exit_code == 0 and result.stdout.count('%') == 5, result.output
    result = run(*given)
    assert result.exit_code == 1 and 'dht_vit_pico_patch8_64 has no pretrained weights' in result.output
    result = run(*given, '--weights', tmp_path / 'none.pth')
    assert result.exit_code == 1 and 'none.pth does not exist' in result.output


def test_evaluate_has_a_row_for_each_budget(model, tmp_path):
    for label in range(10):
        (tmp_path / 'data' / str(label)).mkdir(parents=True)
        Image.effect_noise((64, 64), 20 + 9 * label).save(tmp_path / 'data' / str(label) / '0.png')
    given = ('evaluate', tmp_path / 'data', '--model', f'local-dir:{model}/model', '--out', tmp_path / 'out')
    result = run(*given, '--budgets', '4,9', '--baselines', 'patch-drop', '--knn', tmp_path / 'data',
                 '--knn-k', 1)
    assert result.exit_code == 0, result.output
    with (tmp_path / 'out' / 'results.csv').open() as file:
        found = list(csv.DictReader(file))
    assert [(row['sampler'], row['n_tokens']) for row in found] == [('regions', '4'), ('regions', '9')]
    assert float(found[0]['gflops']) < float(found[1]['gflops']) and found[0]['nll'] != found[1]['nll']
    assert float(found[0]['knn_top1']) == 100.  # the bank holds the same pictures


def test_commands_about_placements_refuse_them(model, tmp_path):
    name = f'local-dir:{model}/model'
    result = run('export', name, tmp_path / 'x.onnx')
    assert result.exit_code == 1 and 'tokens are regions that it finds itself' in result.output
    result = run('oracle', model, '--model', name, '--out', tmp_path / 'x.safetensors')
    assert result.exit_code == 1 and 'tokens are regions that it finds itself' in result.output
