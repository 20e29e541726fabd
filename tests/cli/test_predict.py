"""`timm-spot predict` on what people keep in folders."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from commands import run
from conftest import SMALL
from picture_files import BAD, noise, write_all
from PIL import ExifTags, Image

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'pictures').mkdir()
    for name in ('a.png', 'b.png'):
        noise().save(tmp_path / 'pictures' / name)
    return tmp_path / 'pictures'


def predict(*arguments):
    return run('predict', *arguments)


def files(result):
    return [os.path.basename(line.split('  ')[0]) for line in result.stdout.splitlines()]


def test_all_kinds_of_bad_pictures_are_named_and_the_good_ones_done(folder, saved):
    bad = write_all(folder)
    result = predict(folder, '--model', saved)
    assert result.exit_code == 1 and files(result) == ['a.png', 'b.png'], result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == len(bad) == len(BAD) and all(any(name in line for line in errors) for name in bad)


def test_a_fifo_among_the_pictures_is_named_and_passed_over(folder, saved):
    """In a process of its own: one that waits for a pipe waits for ever."""
    os.mkfifo(folder / 'pipe.png')
    result = subprocess.run(
        [sys.executable, '-m', 'timm_spot.cli', 'predict', str(folder), '--model', saved], cwd=ROOT, timeout=300,
        capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    assert result.returncode == 1 and len(result.stdout.splitlines()) == 2
    assert 'pipe.png cannot be used: it is no regular file' in result.stderr


def test_missing_files_in_a_list_are_named_and_the_others_done(folder, saved):
    (folder / 'empty').mkdir()
    sources = [folder / name for name in ('missing.png', 'a.png', 'empty', 'x*.png', 'b.png')]
    result = predict(*sources, '--model', saved)
    assert result.exit_code == 1 and files(result) == ['a.png', 'b.png']
    errors = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    assert ['missing.png' in errors[0], 'empty holds no' in errors[1], 'x*.png' in errors[2]] == [True] * 3


def test_a_folder_with_the_name_of_a_picture(folder, saved):
    (folder / 'x.png').mkdir()
    result = predict(folder, '--model', saved)
    assert result.exit_code == 0 and files(result) == ['a.png', 'b.png']


def test_links_to_folders_are_followed_and_loops_are_not(folder, saved, tmp_path):
    (tmp_path / 'links').mkdir()
    (tmp_path / 'links' / 'there').symlink_to(folder)
    (folder / 'back').symlink_to(tmp_path / 'links')
    result = predict(tmp_path / 'links', '--model', saved)
    assert result.exit_code == 0 and files(result) == ['a.png', 'b.png']


def test_a_tar_and_a_data_set_by_name(folder, saved, tmp_path):
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        tar.add(folder, 'x')
    result = predict(tmp_path / 'data.tar', '--model', saved)
    assert result.exit_code == 0 and files(result) == ['a.png', 'b.png']
    assert f'{tmp_path}/data.tar/x/a.png  ' in result.stdout


def test_exif_orientation_is_applied(folder, saved):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise().transpose(Image.Transpose.ROTATE_90).save(folder / 'a.png', exif=exif)
    a, b = json.loads(predict(folder, '--model', saved, '--json').stdout)
    assert a['classes'] == b['classes']  # upright, the pixels are the very same


def test_a_name_that_is_no_utf8_is_printed_as_escapes(folder, saved):
    os.rename(folder / 'a.png', bytes(folder) + b'/\xff\n.png')
    result = predict(folder, '--model', saved)
    assert result.exit_code == 0 and files(result) == ['b.png', '\\xff\\n.png']
    rows = json.loads(predict(folder, '--model', saved, '--json').stdout)
    assert os.fsencode(rows[1]['file']) == bytes(folder) + b'/\xff\n.png'


@pytest.mark.parametrize('channels', [1, 4])
def test_models_of_other_channels(folder, tmp_path, channels):
    torch.manual_seed(0)
    timm.models.save_for_hf(
        timm.create_model('spot_vit_pico_patch8_64', in_chans=channels, **SMALL), tmp_path / 'other',
        model_args=dict(in_chans=channels, **SMALL))
    result = predict(folder, '--model', f'local-dir:{tmp_path}/other', '--save-placement', tmp_path / 'out.png')
    if channels == 1:
        assert result.exit_code == 0 and files(result) == ['a.png', 'b.png'], result.output
        assert (tmp_path / 'out-a.png').stat().st_size > 1000
    else:
        assert result.exit_code == 1 and 'reads images of 4 channels (in_chans=4)' in result.stderr


def test_the_model_of_digits_warns_of_a_photograph(folder):
    noise(300, 200).save(folder / 'photo.png')
    result = predict(folder / 'photo.png')
    assert result.exit_code == 0 and len(files(result)) == 1
    assert 'warning: this model reads digits' in result.stderr and 'photo.png' in result.stderr
    canvas = next((ROOT / 'examples' / 'digits').glob('*.png'))
    assert 'warning' not in predict(canvas).stderr


# ---------------------------------------------------------------------------------------------------------------------
# --save-placement


def test_pictures_of_one_name_have_placements_of_their_own(folder, saved, tmp_path):
    (folder / 'in').mkdir()
    noise(60, 60).save(folder / 'in' / 'a.jpg')
    noise(60, 60).save(folder / 'in' / 'a-2.jpg')
    result = predict(folder, '--model', saved, '--save-placement', tmp_path / 'all.png')
    assert result.exit_code == 0, result.output
    written = sorted(path.name for path in tmp_path.glob('all*'))
    assert written == ['all-a-2.png', 'all-a-3.png', 'all-a.png', 'all-b.png']


@pytest.mark.parametrize('name, written', [
    ('all.svg', ['all-a.svg', 'all-b.svg']),
    ('all.PDF', ['all-a.PDF', 'all-b.PDF']),
    ('all', ['all-a.png', 'all-b.png']),
])
def test_the_suffix_is_kept(folder, saved, tmp_path, name, written):
    result = predict(folder, '--model', saved, '--save-placement', tmp_path / name)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.glob('all*')) == written


@pytest.mark.parametrize('path, says', [('all.xyz', 'must end in one of'), ('none/all.png', 'there is no folder')])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(folder, saved, tmp_path, path, says):
    result = predict(folder, '--model', saved, '--save-placement', tmp_path / path)
    assert result.exit_code == 1 and says in result.stderr


@pytest.mark.parametrize('arguments', [('--sampler', 'salient'), ('--saliency', 'spectral')])
def test_salient_placements_of_several_pictures(folder, saved, tmp_path, arguments):
    """Each by its own map; as if it were alone."""
    noise(90, 50).save(folder / 'b.png')
    result = predict(folder, '--model', saved, '--save-placement', tmp_path / 'all.png', *arguments)
    assert result.exit_code == 0, result.output
    for name in 'ab':
        predict(folder / f'{name}.png', '--model', saved, '--save-placement', tmp_path / f'{name}.png', *arguments)
        with Image.open(tmp_path / f'{name}.png') as alone, Image.open(tmp_path / f'all-{name}.png') as one_of_all:
            assert alone.size == one_of_all.size and alone.tobytes() == one_of_all.tobytes()


def test_placements_write_over_nothing_unasked(folder, saved, tmp_path):
    (tmp_path / 'all-b.png').write_bytes(b'mine')
    arguments = (folder, '--model', saved, '--save-placement', tmp_path / 'all.png')
    result = predict(*arguments)
    assert result.exit_code == 1 and 'all-b.png is there already: give --overwrite' in result.stderr
    assert not result.stdout and [p.name for p in tmp_path.glob('all*')] == ['all-b.png']
    result = predict(*arguments, '--overwrite')
    assert result.exit_code == 0 and (tmp_path / 'all-b.png').read_bytes() != b'mine', result.output


# ---------------------------------------------------------------------------------------------------------------------
# Answers, options, mistakes


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
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    run('predict', pictures, '--model', saved, '--save-placement', tmp_path / 'all.png')
    assert plt.get_fignums() == before


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


def test_amp_runs_the_model_under_autocast(pictures, saved):
    exact, half, again = (
        [row['classes'][0]['probability'] for row in json.loads(
            run('predict', pictures, '--model', saved, '--json', *options).stdout)]
        for options in ((), ('--amp', 'bfloat16'), ('--batch-size', '1')))
    assert half != exact and half == pytest.approx(exact, abs=0.02)
    assert again == pytest.approx(exact, abs=1e-6)


def test_a_placer_and_a_seed_are_heard(pictures, saved):
    rows = [json.loads(run('predict', pictures / 'a.png', '--model', saved, '--json', '--sampler', 'uniform', *options
                           ).stdout)[0]['classes'] for options in ((), ('--seed', 1), ('--placer', 'sampled'))]
    assert rows[0] == rows[2] != rows[1]
    result = run('predict', pictures, '--model', saved, '--placer', 'sampeld')
    assert result.exit_code == 1 and "did you mean 'sampled'" in result.stderr


@pytest.mark.parametrize('arguments', [('--coverage', 1), ('--sampler', 'coarse+center')])
def test_windows_of_all_sizes(folder, saved, tmp_path, arguments):
    asked = (folder, '--model', saved, '--n-tokens', 4, '--json')
    plain = predict(*asked)
    sized = predict(*asked, *arguments, '--save-placement', tmp_path / 'p.png')
    assert sized.exit_code == 0, sized.output
    assert json.loads(sized.stdout) != json.loads(plain.stdout)
    assert sorted(file.name for file in tmp_path.glob('p-*.png')) == ['p-a.png', 'p-b.png']
    refused = predict(folder, '--model', saved, '--coverage', 1.5)
    assert refused.exit_code == 1 and 'coverage=1.5 must be a number of at least 0 and at most 1' in refused.output
