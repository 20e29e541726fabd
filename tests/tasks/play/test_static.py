from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import SMALL
from PIL import Image

import timm_spot
from timm_spot.tasks.play import static
from timm_spot.tasks.play.server import PAGE
from timm_spot.tasks.play.stage import SHIPPED, Stage


@pytest.fixture
def without_npm(monkeypatch):
    monkeypatch.setattr(static, '_fetch_runtime', lambda folder: folder.mkdir())


def test_the_folder_has_what_the_page_asks_for(tmp_path, without_npm):
    model = timm.create_model('spot_vit_pico_patch8_64.digits_placed', pretrained=True).eval()
    stage = Stage(model, 'digits', [str(SHIPPED / '00_4.png')])
    files = static.write_static(stage, tmp_path / 'page')
    names = {file.relative_to(tmp_path / 'page').as_posix() for file in files}
    assert names == {
        'about.json', 'model.onnx', 'placements.bin', 'placer.onnx', *(file.name for file in PAGE.iterdir())}
    assert 'data-backend="./static.js"' in (tmp_path / 'page/index.html').read_text()

    about = json.loads((tmp_path / 'page/about.json').read_text())
    assert [p['name'] for p in about['priors']] == ['density', *about['samplers']]
    assert about['samplers'][0] == 'isotropic' and {'center', 'sobol', 'uniform'} < set(about['samplers'])
    assert about['max_tokens'] == 64 and about['config']['interpolation'] == 'bicubic'
    assert about['pictures'][0] == json.loads(json.dumps(stage.show_example(0).about))
    # Placements lie one after the other, n before n + 1: where static.js looks.
    table = np.fromfile(tmp_path / 'page/placements.bin', '<f4').reshape(len(about['samplers']), -1, 2)
    for sampler, rows in zip(about['samplers'], table):
        start = 9 * 8 // 2
        assert rows[start:start + 9].tolist() == stage.place(about['pictures'][0]['id'], sampler, 9)
    with pytest.raises(FileExistsError, match='is there already'):
        static.write_static(stage, tmp_path / 'page')
    assert [file.name for file in tmp_path.iterdir()] == ['page']  # nothing is left over

    session = onnxruntime.InferenceSession(tmp_path / 'page/placer.onnx', providers=['CPUExecutionProvider'])
    images = stage.show_example(0).images
    lattice = timm_spot.sample_positions('isotropic', 12, (64, 64))[0]
    positions, density = session.run(None, dict(images=images.numpy(), lattice=lattice.numpy()))
    torch.testing.assert_close(
        torch.from_numpy(positions)[0], torch.tensor(stage.place(about['pictures'][0]['id'], 'density', 12)),
        atol=1e-5, rtol=0)
    assert density.shape == (1, 16, 16)


@pytest.mark.parametrize('settings, says', [
    (dict(pretrained_cfg_overlay=dict(crop_mode='border')), "crop_mode='border'"),
    (dict(pretrained_cfg_overlay=dict(interpolation='lanczos')), "interpolation='lanczos'"),
    (dict(coverage=1.), 'several sizes'),
])
def test_what_the_page_cannot_do_is_refused_before_any_work(tmp_path, without_npm, settings, says):
    model = timm.create_model('spot_vit_pico_patch8_64', **{**SMALL, **settings}).eval()
    with pytest.raises(ValueError, match=says):
        static.write_static(Stage(model, 'x'), tmp_path / 'page')
    assert list(tmp_path.iterdir()) == []


def test_npm_that_is_missing_fails_or_lies_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(RuntimeError, match='npm, which is not here'):
        static._fetch_runtime(tmp_path / 'a')
    npm = tmp_path / 'npm'
    npm.write_text('#!/bin/sh\necho no network >&2\nexit 1\n')
    npm.chmod(0o755)
    with pytest.raises(RuntimeError, match=r'could not fetch .*: no network'):
        static._fetch_runtime(tmp_path / 'b')
    npm.write_text('#!/bin/sh\necho other > x.tgz\necho x.tgz\n')
    with pytest.raises(RuntimeError, match='npm gave another'):
        static._fetch_runtime(tmp_path / 'c')


@pytest.mark.skipif(shutil.which('node') is None, reason='node is not installed')
@pytest.mark.parametrize('name', ['bicubic', 'bilinear'])
@pytest.mark.parametrize('size, to, off', [
    ((90, 70), (64, 64), 0), ((40, 31), (64, 64), 0), ((200, 64), (64, 64), 0), ((64, 64), (32, 32), 0),
    ((7, 5), (9, 3), 6), ((63, 200), (64, 64), 6)])  # where Pillow begins with columns, which older versions do not
def test_the_page_resizes_as_pillow_does(name, size, to, off, tmp_path):
    picture = Image.effect_noise(size, 90).convert('RGB')
    picture.putpixel((0, 0), (255, 0, 9))
    (tmp_path / 'in').write_bytes(picture.convert('RGBA').tobytes())
    script = f"""
        import {{readFileSync, writeFileSync}} from 'fs';
        const {{resize}} = await import('file://{PAGE}/resize.js');
        const pixels = new Uint8ClampedArray(readFileSync('{tmp_path}/in'));
        writeFileSync('{tmp_path}/out', resize(pixels, [{size[1]}, {size[0]}], [{to[1]}, {to[0]}], '{name}'));
    """
    (tmp_path / 'script.mjs').write_text(script)
    subprocess.run(['node', tmp_path / 'script.mjs'], check=True, capture_output=True, timeout=60)
    made = np.frombuffer((tmp_path / 'out').read_bytes(), np.uint8).reshape(to[1], to[0], 4)[..., :3]
    expected = np.asarray(picture.resize(to, getattr(Image.Resampling, name.upper())))
    assert np.abs(made.astype(int) - expected).max() <= off
