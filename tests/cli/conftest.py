"""Pictures and models for the tests of commands."""
from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL
from PIL import Image


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


@pytest.fixture(scope='session')
def dht(tmp_path_factory):
    """A folder with a small dHT model, and a picture."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('dht')
    timm.models.save_for_hf(
        timm.create_model('dht_vit_pico_patch8_64', embed_dim=32, depth=1), folder / 'model', safe_serialization=True)
    Image.effect_noise((40, 40), 90).convert('RGB').save(folder / 'noise.png')
    return folder


@pytest.fixture(scope='session')
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
