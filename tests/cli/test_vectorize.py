from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from commands import run
from PIL import Image


def test_vectorize(dht, tmp_path):
    result = run('vectorize', dht / 'noise.png', '--out', tmp_path / 'svg', '--regions', 20, '--max-side', 32)
    assert result.exit_code == 0, result.output
    root = ET.parse(tmp_path / 'svg' / 'noise.svg').getroot()
    assert root.attrib['width'] == root.attrib['height'] == '32'
    assert [e.text for e in root if e.tag.endswith('title')] == ['noise']
    assert len([e for e in root if e.tag.endswith('path')]) == 20


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


def test_good_pictures_among_bad_ones_are_drawn(tmp_path):
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for name in ('a.png', 'c.png'):
        Image.effect_noise((12, 10), 90).save(folder / name)
    (folder / 'b.png').write_bytes((folder / 'a.png').read_bytes()[:60])
    result = run('vectorize', folder, '--out', tmp_path / 'svg')
    assert result.exit_code == 1
    assert [line.split()[0] for line in result.stdout.splitlines()] == [f'{tmp_path}/svg/{n}.svg' for n in 'ac']
    assert result.stderr.startswith('error: ') and 'b.png' in result.stderr and result.stderr.count('\n') == 1
    assert sorted(file.name for file in (tmp_path / 'svg').iterdir()) == ['a.svg', 'c.svg']


def test_what_is_there_is_not_overwritten_silently(tmp_path):
    Image.effect_noise((12, 10), 90).save(tmp_path / 'a.png')
    (tmp_path / 'a.svg').write_text('mine')
    given = ('vectorize', tmp_path / 'a.png', '--out', tmp_path)
    result = run(*given)
    assert result.exit_code == 1 and 'a.svg is there already: give --overwrite' in result.stderr
    assert (tmp_path / 'a.svg').read_text() == 'mine'
    assert run(*given, '--overwrite').exit_code == 0
    assert ET.parse(tmp_path / 'a.svg').getroot().attrib['width'] == '12'


@pytest.mark.parametrize('options, says', [
    (['--tolerance', 'nan'], 'tolerance=nan'), (['--tolerance', 'inf'], 'tolerance=inf'),
    (['--tolerance', '101'], 'tolerance=101'), (['--max-kb', '0'], 'max_kb=0'), (['--max-kb', 'inf'], 'max_kb=inf'),
    (['--max-kb', '3', '--regions', '4'], 'regions=4 and max_kb=3.0 exclude each other'),
    (['--psnr', '0'], 'psnr=0'), (['--psnr', '300'], 'psnr=300'),
    (['--regions', '0'], 'regions=0'), (['--regions', '1000000000000'], 'regions=1000000000000'),
    (['--max-side', '0'], 'max_side=0'),
])
def test_nonsense_is_refused_before_anything_is_made(tmp_path, options, says):
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    result = run('vectorize', tmp_path, '--out', tmp_path / 'svg', *options)
    assert result.exit_code == 1 and says in result.stderr and result.stderr.count('\n') == 1
    assert [file.name for file in tmp_path.iterdir()] == ['a.png']


def test_files_of_a_size_and_what_is_too_small(tmp_path):
    Image.effect_noise((40, 30), 90).save(tmp_path / 'a.png')
    result = run('vectorize', tmp_path / 'a.png', '--out', tmp_path, '--max-kb', 2)
    assert result.exit_code == 0 and 1800 < (tmp_path / 'a.svg').stat().st_size <= 2000
    result = run('vectorize', tmp_path / 'a.png', '--out', tmp_path, '--max-kb', 0.01, '--overwrite')
    assert result.exit_code == 1 and 'a.png: max_kb=0.01 is less than' in result.stderr


@pytest.mark.parametrize('mode', ['polygon', 'curve', 'auto'])
def test_modes_and_quality(mode, tmp_path):
    Image.effect_noise((40, 30), 90).save(tmp_path / 'a.png')
    result = run('vectorize', tmp_path / 'a.png', '--out', tmp_path, '--psnr', 12, '--mode', mode)
    assert result.exit_code == 0, result.output
    data = ''.join(e.attrib['d'] for e in ET.parse(tmp_path / 'a.svg').getroot() if e.tag.endswith('path'))
    assert ('q' in data) == (mode == 'curve')


def test_transparency_and_orientation(tmp_path):
    """A picture that lies on its side, its left half transparent."""
    pixels = np.zeros((10, 16, 4), np.uint8)
    pixels[:, 8:] = 200
    exif = Image.Exif()
    exif[274] = 6  # turn clockwise
    Image.fromarray(pixels).save(tmp_path / 'a.png', exif=exif)
    assert run('vectorize', tmp_path / 'a.png', '--out', tmp_path).exit_code == 0
    root = ET.parse(tmp_path / 'a.svg').getroot()
    assert (root.attrib['width'], root.attrib['height']) == ('10', '16')
    path, = (e.attrib['d'] for e in root if e.tag.endswith('path'))
    assert path == 'm0 64v-32h40v32z'  # the lower half, four units a pixel


def test_a_file_named_as_the_folder_is_refused(tmp_path):
    Image.effect_noise((9, 8), 90).save(tmp_path / 'a.png')
    result = run('vectorize', tmp_path / 'a.png', '--out', tmp_path / 'b.svg')
    assert result.exit_code == 1 and 'b.svg is to be a folder' in result.stderr
    assert not (tmp_path / 'b.svg').exists()
