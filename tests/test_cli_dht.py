from __future__ import annotations

import xml.etree.ElementTree as ET

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


def test_models_lists_them():
    assert 'dht_vit_base_patch16_in1k' in run('models').output
