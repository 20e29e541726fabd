from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
from commands import run
from PIL import Image


def test_vectorize(dht, tmp_path):
    result = run('vectorize', dht / 'noise.png', '--out', tmp_path / 'svg', '--regions', 20, '--max-side', 32)
    assert result.exit_code == 0, result.output
    root = ET.parse(tmp_path / 'svg' / 'noise.svg').getroot()
    assert root.attrib == dict(width='32', height='32')


def test_vectorize_overwrites_none_of_its_own(tmp_path):
    for name in ('a.png', 'a.jpg'):
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    result = run('vectorize', tmp_path, '--out', tmp_path / 'svg')
    assert result.exit_code == 1 and 'would both be' in result.output
    assert not (tmp_path / 'svg').exists()


def test_vectorize_of_odd_pictures(odd, tmp_path):
    result = run('vectorize', odd, '--out', tmp_path)
    assert result.exit_code == 0, result.output
    for file in odd.iterdir():
        with Image.open(file) as picture:
            root = ET.parse(tmp_path / f'{file.stem}.svg').getroot()
            assert (root.attrib['width'], root.attrib['height']) == tuple(map(str, picture.size))


def test_unknown_range_is_refused(tmp_path):
    Image.fromarray(np.zeros((20, 20), np.float32)).save(tmp_path / 'depth.tiff')
    result = run('vectorize', tmp_path / 'depth.tiff', '--out', tmp_path)
    assert result.exit_code == 1 and 'its pixels have 32 bits (mode F)' in result.output
