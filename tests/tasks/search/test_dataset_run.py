from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from torch.utils.data import IterableDataset

from timm_spot import OracleResult, optimize_positions
from timm_spot.cli import main
from timm_spot.tasks.search.dataset_run import open_dataset, run_oracle


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return timm.create_model('spot_vit_pico_patch8_64', num_classes=3, embed_dim=32, depth=1).eval()


def write_pictures(folder: Path, count: int, classes: int = 3) -> Path:
    """Noise in as many subfolders as there are classes; in the folder itself for none."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        where = folder / f'class{i % classes}' if classes else folder
        where.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(where / f'{i:03d}.png')
    return folder


def run(model, folder, out, **kwargs):
    dataset, labels = open_dataset(model, str(folder))
    return run_oracle(model, dataset, out, **{**dict(labels=labels, n_tokens=4, steps=2, batch_size=4), **kwargs})


def test_rows_are_the_images_in_order(tiny, tmp_path):
    folder = write_pictures(tmp_path / 'data', 7)
    done = []
    result = run(tiny, folder, tmp_path / 'r.safetensors', progress=done.append)
    assert done == [0, 4, 3]
    dataset, _ = open_dataset(tiny, str(folder))
    images, targets = zip(*dataset)
    expected = optimize_positions(tiny, torch.stack(images), torch.tensor(targets), n_tokens=4, steps=2)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(result, name), value, rtol=0, atol=1e-5)
    assert sorted(f.name for f in tmp_path.iterdir()) == ['data', 'r.safetensors'], 'no parts are left'
    with safe_open(tmp_path / 'r.safetensors', 'pt') as file:
        header = json.loads(file.metadata()['timm_spot'])
    assert header['images'] == dataset.names and header['images'][0] == 'class0/000.png'
    torch.testing.assert_close(OracleResult.from_safetensors(tmp_path / 'r.safetensors').positions, result.positions)


def test_an_interrupted_run_goes_on_where_it_was(tiny, tmp_path):
    folder = write_pictures(tmp_path / 'data', 10)
    run(tiny, folder, tmp_path / 'whole.safetensors', init='uniform')

    calls = []

    def stop_after_two(count):
        calls.append(count)
        if len(calls) == 3:
            raise KeyboardInterrupt

    out = tmp_path / 'r.safetensors'
    with pytest.raises(KeyboardInterrupt):
        run(tiny, folder, out, init='uniform', progress=stop_after_two)
    assert not out.exists() and len(list(Path(f'{out}.parts').glob('*.safetensors'))) == 2
    Path(f'{out}.parts/000000008.safetensors.tmp').write_bytes(b'half a part')
    done = []
    run(tiny, folder, out, init='uniform', progress=done.append)
    assert done == [8, 2]
    assert out.read_bytes() == (tmp_path / 'whole.safetensors').read_bytes()
    done.clear()
    run(tiny, folder, out, init='uniform', progress=done.append)
    assert done == [], 'a finished run is only read'


def test_a_killed_process_loses_nothing(tmp_path):
    folder = write_pictures(tmp_path / 'data', 12)
    script = (
        'import sys, time, torch, timm, timm_spot\n'
        'from timm_spot.tasks.search.dataset_run import open_dataset, run_oracle\n'
        'torch.manual_seed(0); torch.set_num_threads(1)\n'
        "model = timm.create_model('spot_vit_pico_patch8_64', num_classes=3, embed_dim=32, depth=1).eval()\n"
        'dataset, labels = open_dataset(model, sys.argv[1])\n'
        "run_oracle(model, dataset, sys.argv[2], n_tokens=4, steps=2, batch_size=2,\n"
        "           progress=lambda count: (print(count, flush=True), time.sleep(float(sys.argv[3]))))\n")
    arguments = [sys.executable, '-c', script, str(folder)]
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[3])}
    whole, killed = tmp_path / 'whole.safetensors', tmp_path / 'killed.safetensors'
    subprocess.run([*arguments, whole, '0'], env=env, check=True, stdout=subprocess.DEVNULL)
    with subprocess.Popen([*arguments, killed, '0.2'], env=env, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not killed.exists()
    again = subprocess.run([*arguments, killed, '0'], env=env, check=True, stdout=subprocess.PIPE, text=True)
    counts = [int(line) for line in again.stdout.split()]
    assert counts[0] >= 4 and sum(counts) == 12, 'what was written is not done again'
    assert killed.read_bytes() == whole.read_bytes()


def test_other_settings_are_refused(tiny, tmp_path):
    folder = write_pictures(tmp_path / 'data', 5)
    out = tmp_path / 'r.safetensors'
    run(tiny, folder, out)
    with pytest.raises(ValueError, match=r'r.safetensors was made with other settings \(n_tokens, search\)'):
        run(tiny, folder, out, n_tokens=5, steps=3)
    with pytest.raises(ZeroDivisionError):
        run(tiny, folder, tmp_path / 's.safetensors', progress=lambda count: 1 / (4 - count))
    write_pictures(tmp_path / 'data', 6)
    with pytest.raises(ValueError, match=r's.safetensors.parts was made with other settings \(images\)'):
        run(tiny, folder, tmp_path / 's.safetensors')
    torch.nn.init.ones_(tiny.head.bias)
    with pytest.raises(ValueError, match=r'\(weights, images\)'):
        run(tiny, folder, tmp_path / 's.safetensors')


def test_stochastic_starts_follow_the_index(tiny, tmp_path):
    """Not the batch: another batch size gives the same starts, each image its own."""
    folder = write_pictures(tmp_path / 'data', 5)
    a = run(tiny, folder, tmp_path / 'a.safetensors', init='uniform', steps=0)
    b = run(tiny, folder, tmp_path / 'b.safetensors', init='uniform', steps=0, batch_size=2)
    c = run(tiny, folder, tmp_path / 'c.safetensors', init='uniform', steps=0, seed=1)
    assert torch.equal(a.positions, b.positions)
    assert len(a.positions.unique(dim=0)) == 5 and not (a.positions == c.positions).any()


@pytest.mark.parametrize('classes, labelled', [(0, False), (2, False), (3, True)])
def test_labels_of_a_folder(tiny, tmp_path, classes, labelled):
    folder = write_pictures(tmp_path / 'data', 6, classes)
    dataset, labels = open_dataset(tiny, str(folder))
    assert labels == labelled
    result = run_oracle(
        tiny, dataset, tmp_path / 'r.safetensors', labels=labels, n_tokens=4, steps=1, objective='teacher')
    assert (result.correct_after is not None) == labelled
    if not labelled:
        with pytest.raises(ValueError, match='needs targets'):
            run_oracle(tiny, dataset, tmp_path / 's.safetensors', labels=labels, n_tokens=4)


def test_class_map_names_the_classes(tiny, tmp_path):
    folder = write_pictures(tmp_path / 'data', 4, 2)
    class_map = tmp_path / 'classes.txt'
    class_map.write_text('other\nclass1\nclass0\n')
    dataset, labels = open_dataset(tiny, str(folder), class_map=str(class_map))
    assert labels and [target for _, target in dataset] == [2, 2, 1, 1]


def test_other_datasets_of_timm(tiny, tmp_path):
    folder = write_pictures(tmp_path / 'data', 6)
    dataset, labels = open_dataset(tiny, str(folder), name='torch/image_folder')
    a = run_oracle(tiny, dataset, tmp_path / 'a.safetensors', labels=labels, n_tokens=4, steps=1)
    b = run(tiny, folder, tmp_path / 'b.safetensors', steps=1)
    torch.testing.assert_close(a.positions, b.positions, rtol=0, atol=1e-5)


def test_dataset_without_random_access(tiny, tmp_path):
    class Stream(IterableDataset):
        def __len__(self):
            return 5

        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            for i in range(5):
                yield torch.rand(3, 64, 64, generator=generator), i % 3

    kwargs = dict(n_tokens=4, steps=1, batch_size=2)
    run_oracle(tiny, Stream(), tmp_path / 'whole.safetensors', **kwargs)
    with pytest.raises(ZeroDivisionError):
        run_oracle(tiny, Stream(), tmp_path / 'r.safetensors', progress=lambda count: 1 / (2 - count), **kwargs)
    done = []
    run_oracle(tiny, Stream(), tmp_path / 'r.safetensors', progress=done.append, **kwargs)
    assert done == [2, 2, 1]
    assert (tmp_path / 'r.safetensors').read_bytes() == (tmp_path / 'whole.safetensors').read_bytes()


def test_salient_starts(tiny, tmp_path):
    folder = write_pictures(tmp_path / 'data', 3, classes=1)
    maps = tmp_path / 'maps'
    maps.mkdir()
    for i in range(3):  # all weight on one pixel, another one in each map
        weights = torch.zeros(64, 64, dtype=torch.uint8)
        weights[10 * i + 5, 20] = 255
        Image.fromarray(weights.numpy()).save(maps / f'{i:03d}.png')
    kwargs = dict(init='salient', labels=False, objective='entropy', steps=0, batch_size=2)
    result = run(tiny, folder, tmp_path / 'a', saliency=str(maps), **kwargs)
    assert (result.positions * 64).floor()[:, 0].tolist() == [[5, 20], [15, 20], [25, 20]]
    spectral = run(tiny, folder, tmp_path / 'b', saliency='spectral', **kwargs)
    one_by_one = run(tiny, folder, tmp_path / 'c', saliency='spectral', **{**kwargs, 'batch_size': 1})
    torch.testing.assert_close(spectral.positions, one_by_one.positions, rtol=0, atol=1e-6)


def test_mistakes_name_their_place(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no folder'):
        open_dataset(tiny, str(tmp_path / 'none'))
    folder = write_pictures(tmp_path / 'data', 6)
    (folder / 'class1' / '004.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match=r'004\.png is no picture'):
        run(tiny, folder, tmp_path / 'r.safetensors')
    torch.nn.init.constant_(tiny.head.bias, float('nan'))
    with pytest.raises(ValueError, match=r'image 0 is number 0 of the dataset: the loss of image 0 is nan'):
        run(tiny, folder, tmp_path / 'r2.safetensors', batch_size=2)
    with pytest.raises(ValueError, match='dataset is empty'):
        run_oracle(tiny, [], tmp_path / 'r3.safetensors')


def test_command(tiny, tmp_path):
    timm.models.save_for_hf(tiny, tmp_path / 'saved')
    labelled, flat = write_pictures(tmp_path / 'labelled', 5), write_pictures(tmp_path / 'flat', 5, 0)
    out = tmp_path / 'r.safetensors'

    def oracle(*arguments):
        arguments = [*arguments, '--model', f'local-dir:{tmp_path}/saved', '--n-tokens', 4, '--steps', 2, '--out', out]
        return CliRunner().invoke(main, ['oracle', *map(str, arguments)])

    result = oracle(labelled)
    assert result.exit_code == 0, result.output
    written = OracleResult.from_safetensors(out)
    before, after = written.correct_before.float().mean(), written.correct_after.float().mean()
    assert result.stdout.startswith('5 images, 4 tokens, 2 steps, ')
    assert f'accuracy  {before:.2%} -> {after:.2%}' in result.stdout
    assert f'loss      {written.losses[:, 0].mean():.4f} -> {written.losses[:, 2].mean():.4f}' in result.stdout
    out.unlink()

    refused = oracle(flat)
    assert refused.exit_code == 1 and 'there are no labels: give --class-map' in refused.stderr
    result = oracle(flat, '--objective', 'teacher', '--amp-dtype', 'bfloat16', '--init', 'uniform')
    assert result.exit_code == 0 and 'accuracy' not in result.stdout, result.output
    assert OracleResult.from_safetensors(out).correct_after is None
    again = oracle(flat, '--objective', 'teacher', '--amp-dtype', 'bfloat16', '--init', 'uniform')
    assert again.exit_code == 0 and ' 0.0 images/s' in again.stdout
    other = oracle(flat, '--objective', 'entropy')
    assert other.exit_code == 1 and 'was made with other settings (init, search)' in other.stderr
