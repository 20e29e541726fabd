from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import DATA
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import timm_spot
from timm_spot import OracleResult, optimize_positions
from timm_spot.cli import main
from timm_spot.models.placement import _PLACERS
from timm_spot.tasks.kept import lock_output
from timm_spot.tasks.pictures.datasets import Pictures
from timm_spot.tasks.pictures.images import model_transform
from timm_spot.tasks.search import dataset_run, result
from timm_spot.tasks.search.dataset_run import list_broken, run_oracle


def make_model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('spot_vit_pico_patch8_64', **{
        **dict(num_classes=3, embed_dim=32, depth=1), **kwargs}).eval()


@pytest.fixture
def tiny():
    return make_model()


def write_pictures(folder: Path, count: int, classes: int = 3) -> Path:
    """Noise in as many subfolders as there are classes; in the folder itself for none."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        where = folder / f'class{i % classes}' if classes else folder
        where.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        if not (where / f'{i:03d}.png').exists():
            Image.fromarray(pixels.numpy()).save(where / f'{i:03d}.png')
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / 'data', 5)


def run(model, folder, out, **kwargs):
    pictures = folder if isinstance(folder, Pictures) else Pictures(str(folder))
    return run_oracle(model, pictures, out, **{**dict(n_tokens=4, steps=2, batch_size=4), **kwargs})


class Stop(Exception):
    pass


def stop_after(parts):
    """A progress function that ends a run after so many parts."""
    calls = []

    def progress(count):
        calls.append(count)
        if len(calls) == parts + 1:
            raise Stop

    return progress


def read_header(out):
    with safe_open(out, 'pt') as file:
        return json.loads(file.metadata()['timm_spot'])


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_rows_are_the_images_in_order(tiny, tmp_path):
    folder = write_pictures(tmp_path / 'data', 7)
    done = []
    result = run(tiny, folder, tmp_path / 'r.safetensors', progress=done.append)
    assert done == [0, 4, 3]
    pictures, transform = Pictures(str(folder)), model_transform(tiny)
    images, targets = zip(*((transform(picture), target) for picture, target in pictures))
    assert targets == (0, 0, 0, 1, 1, 2, 2)
    expected = optimize_positions(tiny, torch.stack(images), torch.tensor(targets), n_tokens=4, steps=2)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(result, name), value, rtol=0, atol=1e-5)
    assert names(tmp_path) == ['data', 'r.safetensors'], 'no parts are left, and no lock'
    header = read_header(tmp_path / 'r.safetensors')
    assert header['images'] == [os.path.relpath(pictures.name(i), folder) for i in range(7)]
    assert header['images'][0] == 'class0/000.png' and header['n_tokens'] == 4
    assert torch.equal(OracleResult.from_safetensors(tmp_path / 'r.safetensors').positions, result.positions)


def test_an_interrupted_run_goes_on_where_it_was(tiny, tmp_path):
    folder = write_pictures(tmp_path / 'data', 10)
    run(tiny, folder, tmp_path / 'whole.safetensors', init='uniform')
    out = tmp_path / 'r.safetensors'
    with pytest.raises(Stop):
        run(tiny, folder, out, init='uniform', progress=stop_after(2))
    parts = Path(f'{out}.parts')
    assert not out.exists() and names(parts) == ['000000000.safetensors', '000000001.safetensors', 'settings.json']
    # What kills leave, of this version and the one before; and of the whole result.
    leftovers = [parts / '.000000002.9.tmp.safetensors', parts / '000000008.safetensors.tmp',
                 tmp_path / '.r.9.tmp.safetensors']
    for leftover in leftovers:
        leftover.write_bytes(b'half a part')
    other = tmp_path / '.s.9.tmp.safetensors'
    other.write_bytes(b'of a run that may be under way')
    done = []
    run(tiny, folder, out, init='uniform', progress=done.append)
    assert done == [8, 2]
    assert out.read_bytes() == (tmp_path / 'whole.safetensors').read_bytes()
    assert names(tmp_path) == [other.name, 'data', 'r.safetensors', 'whole.safetensors']
    done.clear()
    run(tiny, folder, out, init='uniform', progress=done.append)
    assert done == [], 'a finished run is only read'


def test_a_killed_process_loses_nothing(tmp_path):
    folder = write_pictures(tmp_path / 'data', 12)
    script = (
        'import sys, time, torch, timm, timm_spot\n'
        'from timm_spot.tasks.pictures.datasets import Pictures\n'
        'from timm_spot.tasks.search.dataset_run import run_oracle\n'
        'torch.manual_seed(0); torch.set_num_threads(1)\n'
        "model = timm.create_model('spot_vit_pico_patch8_64', num_classes=3, embed_dim=32, depth=1).eval()\n"
        'for out in sys.argv[3:]:\n'
        "    run_oracle(model, Pictures(sys.argv[1]), out, n_tokens=4, steps=2, batch_size=2,\n"
        "               progress=lambda count: (print(count, flush=True), time.sleep(float(sys.argv[2]))))\n")
    arguments = [sys.executable, '-c', script, str(folder)]
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[3])}
    whole, killed = tmp_path / 'whole.safetensors', tmp_path / 'killed.safetensors'
    with subprocess.Popen([*arguments, '0.2', killed], env=env, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not killed.exists()
    again = subprocess.run([*arguments, '0', killed, whole], env=env, check=True, stdout=subprocess.PIPE, text=True)
    counts = [int(line) for line in again.stdout.split()]
    assert counts[0] >= 4 and sum(counts[:-7]) == 12, 'what was written is not done again'
    assert counts[-7:] == [0, 2, 2, 2, 2, 2, 2]
    assert killed.read_bytes() == whole.read_bytes()
    assert names(tmp_path) == ['data', 'killed.safetensors', 'whole.safetensors']


def test_parts_and_results_are_never_written_under_their_names(tiny, folder, tmp_path, monkeypatch):
    """A kill at any time leaves whole files only."""
    out, written = tmp_path / 'r.safetensors', []

    def watch(tensors, path, metadata=None):
        written.append(Path(path).name)
        assert not (out.exists() or list(tmp_path.glob('r.safetensors.parts/00000000[1-9]*')))
        save_file(dict(list(tensors.items())[:1]), path)  # half of it, and then the end
        raise Stop

    monkeypatch.setattr(result, 'save_file', watch)
    with pytest.raises(Stop):
        run(tiny, folder, out)
    assert names(tmp_path) == ['data'], 'nothing, where there was no whole part'
    monkeypatch.undo()
    shutil.copytree(folder, tmp_path / 'broken')
    for file in (tmp_path / 'broken').glob('*/*.png'):
        file.write_bytes(b'no picture')
    monkeypatch.setattr(dataset_run, 'save_file', watch)  # of a batch without any picture that can be read
    with pytest.raises(Stop):
        run(tiny, tmp_path / 'broken', out, skip_broken=True)
    shutil.rmtree(tmp_path / 'broken')
    monkeypatch.undo()
    with pytest.raises(Stop):
        run(tiny, folder, out, progress=stop_after(1))
    monkeypatch.setattr(result, 'save_file', watch)
    with pytest.raises(Stop):
        run(tiny, folder, out)
    assert names(tmp_path / 'r.safetensors.parts') == ['000000000.safetensors', 'settings.json']
    assert all(name.startswith('.') and '.tmp' in name for name in written)
    monkeypatch.undo()
    assert len(run(tiny, folder, out).positions) == 5


CHANGES = dict(
    n_tokens=(dict(n_tokens=5), 'n_tokens'), steps=(dict(steps=3), 'search'), lr=(dict(lr=1e-2), 'search'),
    amp_dtype=(dict(amp_dtype=torch.bfloat16), 'search'), init=(dict(init='center'), 'init'),
    seed=(dict(seed=1), 'seed'), batch_size=(dict(batch_size=2), 'batch_size'))


@pytest.mark.parametrize('change', CHANGES)
def test_other_settings_are_refused(tiny, folder, tmp_path, change):
    kwargs, named = CHANGES[change]
    run(tiny, folder, tmp_path / 'r.safetensors')
    before = (tmp_path / 'r.safetensors').read_bytes()
    with pytest.raises(ValueError, match=rf'r\.safetensors was made with other settings \({named}\): remove it'):
        run(tiny, folder, tmp_path / 'r.safetensors', **kwargs)
    assert (tmp_path / 'r.safetensors').read_bytes() == before
    with pytest.raises(Stop):
        run(tiny, folder, tmp_path / 's.safetensors', progress=stop_after(1))
    with pytest.raises(ValueError, match=rf's\.safetensors\.parts was made with other settings \({named}\): remove it'):
        run(tiny, folder, tmp_path / 's.safetensors', **kwargs)


def test_the_models_own_budget_is_part_of_the_key(folder, tmp_path):
    out = tmp_path / 'r.safetensors'
    assert run(make_model(n_tokens=9), folder, out, n_tokens=None).positions.shape[1] == 9
    assert run(make_model(), folder, out, n_tokens=9).positions.shape[1] == 9, 'the same, said otherwise'
    with pytest.raises(ValueError, match=r'other settings \(n_tokens\)'):
        run(make_model(n_tokens=16), folder, out, n_tokens=None)


def test_another_model_of_the_same_name_is_refused(folder, tmp_path):
    """Weights, or what its config says beside them: convention, pooling, how pictures are cropped."""
    out = tmp_path / 'r.safetensors'
    model = make_model(pos_nodes=8)
    run(model, folder, out)
    with pytest.raises(ValueError, match=r'other settings \(settings\)'):
        run(make_model(pos_nodes=8, convention='spot'), folder, out)
    with pytest.raises(ValueError, match=r'other settings \(transform\)'):
        run(make_model(pos_nodes=8, pretrained_cfg_overlay=dict(crop_pct=0.5)), folder, out)
    torch.nn.init.ones_(model.head.bias)
    with pytest.raises(ValueError, match=r'other settings \(weights\)'):
        run(model, folder, out)


def test_other_pictures_are_refused(tiny, folder, tmp_path):
    out = tmp_path / 'r.safetensors'
    run(tiny, folder, out)

    def refused(source=folder, named='pictures', **kwargs):
        with pytest.raises(ValueError, match=rf'other settings \({named}\)'):
            run(tiny, Pictures(str(source), **kwargs), out)

    for class_map, named in (('class0\nclass2\nclass1', 'classes, pictures'), ('class0\nclass1\nclass3', '.*')):
        (tmp_path / 'map.txt').write_text(class_map)
        with pytest.warns() if named == '.*' else pytest.MonkeyPatch.context():
            refused(class_map=str(tmp_path / 'map.txt'), named=named)
    refused(split='train', named='split, pictures')
    shutil.copytree(folder, tmp_path / 'moved')  # with its times of change
    assert len(run(tiny, tmp_path / 'moved', out).positions) == 5, 'the same pictures in another place'
    first = folder / 'class0' / '000.png'
    status = first.stat()
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    refused()
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(run(tiny, folder, out).positions) == 5
    first.rename(folder / 'class0' / '001.png')
    refused()
    (folder / 'class0' / '001.png').rename(first)
    write_pictures(folder, 6)
    refused()


def test_a_run_resumed_under_another_class_map_joins_nothing(tiny, folder, tmp_path):
    out, class_map = tmp_path / 'r.safetensors', tmp_path / 'map.txt'
    class_map.write_text('class0\nclass1\nclass2')
    with pytest.raises(Stop):
        run(tiny, Pictures(str(folder), class_map=str(class_map)), out, progress=stop_after(1))
    class_map.write_text('class2\nclass1\nclass0')
    with pytest.raises(ValueError, match=r'parts was made with other settings \(classes, pictures\)'):
        run(tiny, Pictures(str(folder), class_map=str(class_map)), out)


def test_another_folder_of_maps_is_refused(tiny, folder, tmp_path):
    maps = tmp_path / 'maps'
    maps.mkdir()
    for i in range(5):
        Image.new('L', (64, 64), 200).save(maps / f'{i:03d}.png')
    kwargs = dict(init='salient', saliency=str(maps), steps=0)
    run(tiny, folder, tmp_path / 'r.safetensors', **kwargs)
    Image.new('L', (64, 64), 1).save(maps / '003.png')
    with pytest.raises(ValueError, match=r'other settings \(saliency\)'):
        run(tiny, folder, tmp_path / 'r.safetensors', **kwargs)


MISTAKES = [
    (dict(init='cntr'), "init|sampler='cntr' is unknown .*did you mean 'center'"),
    (dict(init='salient'), 'needs a saliency map'),
    (dict(init='center', saliency='spectral'), "is of no use to init='center'"),
    (dict(init='grid', n_tokens=65), 'n_tokens=65 exceeds the 8 x 8 patches'),
    (dict(init='grid_uniform', n_tokens=7), 'n_tokens=7 does not exist'),
    (dict(n_tokens=0), 'n_tokens=0'), (dict(n_tokens=10 ** 12), 'n_tokens=1000000000000 is more than the 4096 pixels'),
    (dict(seed=2 ** 70), 'seed=1180591620717411303424 is out of range'),
    (dict(tol=float('nan')), 'tol=nan'), (dict(lr=float('inf')), 'lr=inf'), (dict(lr=-1.), r'lr=-1\.0'),
    (dict(steps=10 ** 9), 'steps=1000000000 must be at most'), (dict(patience=0), 'patience=0'),
    (dict(batch_size=0), 'batch_size=0'), (dict(optimizer='adamv'), 'not found'),
    (dict(optimizer_kwargs=dict(momentm=0.9)), 'momentm'), (dict(objective=len), 'must be a name'),
    (dict(objective='lable'), "'lable' is unknown"), (dict(saliency='nowhere', init='salient'), 'is none of'),
]


@pytest.mark.parametrize('wrong, message', MISTAKES)
def test_a_mistake_leaves_nothing_that_poisons_the_corrected_run(tiny, folder, tmp_path, wrong, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        run(tiny, folder, tmp_path / 'r.safetensors', **wrong)
    assert names(tmp_path) == ['data']


def test_a_first_batch_that_fails_leaves_nothing(tiny, folder, tmp_path):
    torch.nn.init.constant_(tiny.head.bias, float('nan'))
    with pytest.raises(ValueError, match=r'image 0 is number 0 of the data set: the loss of image 0 is nan'):
        run(tiny, folder, tmp_path / 'r.safetensors', batch_size=2)
    assert names(tmp_path) == ['data']


def test_two_runs_at_once_the_second_is_refused(tiny, folder, tmp_path):
    out = tmp_path / 'r.safetensors'

    def second(count):
        with pytest.raises(BlockingIOError, match=f'another run writes to {out}, by process {os.getpid()} on'):
            run(tiny, folder, out, n_tokens=9)

    assert len(run(tiny, folder, out, progress=second).positions) == 5
    assert names(tmp_path) == ['data', 'r.safetensors']


def test_a_run_that_waited_for_another_reads_its_result(tiny, folder, tmp_path, monkeypatch):
    """The result may appear between the look for it and the lock."""
    out = tmp_path / 'r.safetensors'
    done = []

    def lock(path):
        if not done:
            done.append(path)
            run(tiny, folder, out)
        return lock_output(path)

    monkeypatch.setattr(dataset_run, 'lock_output', lock)
    counts = []
    assert len(run(tiny, folder, out, progress=counts.append).positions) == 5 and counts == []


def test_torn_state_is_named_and_repaired_or_refused(tiny, folder, tmp_path):
    whole, out = tmp_path / 'whole.safetensors', tmp_path / 'r.safetensors'
    run(tiny, folder, whole, batch_size=1)
    with pytest.raises(Stop):
        run(tiny, folder, out, batch_size=1, progress=stop_after(3))
    parts = Path(f'{out}.parts')
    first, second = (parts / f'00000000{i}.safetensors' for i in (0, 1))
    first.write_bytes(first.read_bytes()[:-3])
    second.write_bytes(b'')
    record = (parts / 'settings.json').read_text()
    (parts / 'settings.json').write_text(record[:50])
    with pytest.raises(ValueError, match=r'settings\.json is damaged: remove .*parts, and what it holds is done again'):
        run(tiny, folder, out, batch_size=1)
    (parts / 'settings.json').write_text(record)
    with pytest.warns(UserWarning, match=r'00000000[01]\.safetensors is damaged and is made again') as warned:
        run(tiny, folder, out, batch_size=1)
    assert len(warned) == 2 and out.read_bytes() == whole.read_bytes()
    for torn in (b'', whole.read_bytes()[:9], whole.read_bytes()[:200], whole.read_bytes()[:-1]):
        out.write_bytes(torn)
        with pytest.raises(ValueError, match=r'r\.safetensors is damaged, or nothing of the oracle: remove it'):
            run(tiny, folder, out, batch_size=1)
    for header in (None, dict(timm_spot='{"mod'), dict(timm_spot='[1]'), dict(timm_spot='3'), dict(other='{}')):
        save_file(dict(x=torch.zeros(1)), out, header)
        with pytest.raises(ValueError, match=r'r\.safetensors .*remove it'):
            run(tiny, folder, out, batch_size=1)


def test_a_foreign_file_among_the_parts_is_named(tiny, folder, tmp_path):
    out = tmp_path / 'r.safetensors'
    with pytest.raises(Stop):
        run(tiny, folder, out, batch_size=2, progress=stop_after(1))
    save_file(dict(x=torch.zeros(1)), f'{out}.parts/000000000.safetensors')
    with pytest.raises(ValueError, match=r'000000000\.safetensors is damaged, or nothing of the oracle'):
        run(tiny, folder, out, batch_size=2)


def test_a_result_of_the_version_before_is_named_and_kept(tiny, folder, tmp_path):
    out = tmp_path / 'r.safetensors'
    shutil.copy(DATA / 'oracle_0.1.safetensors', out)
    with pytest.raises(ValueError, match=r'was made by version 0\.1, .* OracleResult\.from_safetensors reads it'):
        run(tiny, folder, out)
    assert out.read_bytes() == (DATA / 'oracle_0.1.safetensors').read_bytes()


def test_outputs_that_cannot_be_are_refused_before_any_work(tiny, folder, tmp_path):
    with pytest.raises(IsADirectoryError, match='is a folder'):
        run(tiny, folder, tmp_path)
    with pytest.raises(NotADirectoryError, match=r'000\.png is no folder'):
        run(tiny, folder, folder / 'class0' / '000.png' / 'r.safetensors')
    assert run(tiny, folder, tmp_path / 'new' / 'r.safetensors').positions.shape == (5, 4, 2)


def test_stochastic_starts_follow_the_index(tiny, folder, tmp_path):
    """Not the batch: another batch size gives the same starts, each image its own."""
    a = run(tiny, folder, tmp_path / 'a.safetensors', init='uniform', steps=0)
    b = run(tiny, folder, tmp_path / 'b.safetensors', init='uniform', steps=0, batch_size=2)
    c = run(tiny, folder, tmp_path / 'c.safetensors', init='uniform', steps=0, seed=1)
    assert torch.equal(a.positions, b.positions)
    assert len(a.positions.unique(dim=0)) == 5 and not (a.positions == c.positions).any()


def test_starts_are_those_of_the_version_before(tiny, folder, tmp_path):
    """The same pictures and seed: see `oracle_0.1.safetensors`. Random numbers on the CPU are the same everywhere."""
    found = run(tiny, folder, tmp_path / 'r.safetensors', init='uniform', steps=0)
    before = OracleResult.from_safetensors(DATA / 'oracle_0.1.safetensors')
    torch.testing.assert_close(found.positions, before.trajectory[:, 0], rtol=0, atol=1e-7)


@pytest.mark.parametrize('classes, labelled', [(0, False), (2, False), (3, True)])
def test_labels_of_a_folder(tiny, tmp_path, classes, labelled):
    folder = write_pictures(tmp_path / 'data', 6, classes)
    result = run(tiny, folder, tmp_path / 'r.safetensors', objective='teacher')
    assert (result.correct_after is not None) == labelled
    if not labelled:
        with pytest.raises(ValueError, match=r'entropy, teacher and feature need no label'):
            run(tiny, folder, tmp_path / 's.safetensors')
        assert not (tmp_path / 's.safetensors.parts').exists()


def test_labels_that_are_other_classes_are_refused(folder, tmp_path):
    model = make_model(pretrained_cfg_overlay=dict(label_names=['cat', 'dog', 'owl']))
    with pytest.raises(ValueError, match=r"has the classes class0, class1, class2; the model's are cat, dog, owl"):
        run(model, folder, tmp_path / 'r.safetensors')
    assert run(model, folder, tmp_path / 'r.safetensors', objective='entropy').correct_after is None
    with pytest.raises(ValueError, match=r'other settings \(labels\)'):
        run(make_model(), folder, tmp_path / 'r.safetensors', objective='entropy')


def test_other_data_sets_of_timm(tiny, folder, tmp_path):
    a = run(tiny, Pictures('torch/image_folder', root=str(folder)), tmp_path / 'a.safetensors')
    b = run(tiny, folder, tmp_path / 'b.safetensors')
    torch.testing.assert_close(a.positions, b.positions, rtol=0, atol=1e-5)
    assert read_header(tmp_path / 'a.safetensors')['images'] == 5
    shutil.copytree(folder, tmp_path / 'other')
    with pytest.raises(ValueError, match=r'other settings \(root, pictures\)'):
        run(tiny, Pictures('torch/image_folder', root=str(tmp_path / 'other')), tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match=r'other settings \(data, root, '):
        run(tiny, folder, tmp_path / 'a.safetensors')


def test_a_tar_of_pictures(tiny, folder, tmp_path):
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        for file in sorted(folder.glob('*/*.png')):
            tar.add(file, file.relative_to(folder))
    a = run(tiny, tmp_path / 'data.tar', tmp_path / 'a.safetensors')
    b = run(tiny, folder, tmp_path / 'b.safetensors')
    torch.testing.assert_close(a.positions, b.positions, rtol=0, atol=1e-5)
    assert read_header(tmp_path / 'a.safetensors')['images'][0] == 'class0/000.png'


class Stream(Pictures):
    """Pictures that can only be read in order."""

    is_stream = True

    def __init__(self, folder, length):
        super().__init__(str(folder))
        self.length = length

    def __len__(self):
        return self.length

    def __iter__(self):
        return (Pictures.__getitem__(self._kept, i) for i in range(5))

    def __getitem__(self, index):
        raise AssertionError('a stream has no random access')


@pytest.mark.parametrize('length', [0, 5])
def test_a_data_set_without_random_access(tiny, folder, tmp_path, length):
    stream = Stream(folder, length)
    stream._kept = Pictures(str(folder))
    run(tiny, folder, tmp_path / 'b.safetensors', batch_size=2)
    done = []
    run(tiny, stream, tmp_path / 'whole.safetensors', batch_size=2, progress=done.append)
    assert done == [2, 2, 1]
    with pytest.raises(Stop):
        run(tiny, stream, tmp_path / 'r.safetensors', batch_size=2, progress=stop_after(0))
    first = tmp_path / 'r.safetensors.parts' / '000000000.safetensors'
    before = first.stat().st_mtime_ns
    time.sleep(0.01)

    def check(count):
        assert first.stat().st_mtime_ns == before, 'what was written is not done again'

    run(tiny, stream, tmp_path / 'r.safetensors', batch_size=2, progress=check)
    assert (tmp_path / 'r.safetensors').read_bytes() == (tmp_path / 'whole.safetensors').read_bytes()
    whole, plain = (OracleResult.from_safetensors(tmp_path / f'{name}.safetensors') for name in ('whole', 'b'))
    torch.testing.assert_close(whole.positions, plain.positions, rtol=0, atol=1e-6)


def test_salient_starts(tiny, tmp_path):
    folder = write_pictures(tmp_path / 'data', 3, classes=1)
    maps = tmp_path / 'maps'
    maps.mkdir()
    for i in range(3):  # all weight on one pixel, another one in each map
        weights = torch.zeros(64, 64, dtype=torch.uint8)
        weights[10 * i + 5, 20] = 255
        Image.fromarray(weights.numpy()).save(maps / f'{i:03d}.png')
    kwargs = dict(init='salient', objective='entropy', steps=0, batch_size=2)
    result = run(tiny, folder, tmp_path / 'a', saliency=str(maps), **kwargs)
    assert (result.positions * 64).floor()[:, 0].tolist() == [[5, 20], [15, 20], [25, 20]]
    spectral = run(tiny, folder, tmp_path / 'b', saliency='spectral', **kwargs)
    one_by_one = run(tiny, folder, tmp_path / 'c', saliency='spectral', **{**kwargs, 'batch_size': 1})
    torch.testing.assert_close(spectral.positions, one_by_one.positions, rtol=0, atol=1e-6)


@pytest.fixture
def diagonal():
    """A placer of one's own, with a weight."""
    @timm_spot.register_placer('diagonal')
    class Diagonal(timm_spot.Placer):
        def __init__(self, *priors):
            super().__init__(*priors)
            self.shift = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images):
            place = (torch.arange(self.budget(images.shape[-2:])) + 0.5) / self.budget(images.shape[-2:]) + self.shift
            return place[None, :, None].expand(len(images), -1, 2)

    yield
    _PLACERS.pop('diagonal')


def test_a_placer_of_ones_own_is_a_start(diagonal, folder, tmp_path):
    model = make_model(placer='diagonal', n_tokens=2)
    kwargs = dict(init='diagonal', steps=0, n_tokens=None)
    found = run(model, folder, tmp_path / 'a.safetensors', **kwargs)
    assert found.positions.tolist() == [[[0.25, 0.25], [0.75, 0.75]]] * 5
    moved = run(model, folder, tmp_path / 'b.safetensors', **{**kwargs, 'n_tokens': 1, 'steps': 3})
    assert moved.trajectory[:, 0].tolist() == [[[0.5, 0.5]]] * 5 and (moved.positions != 0.5).all()
    assert model.n_tokens == 2 and model.placer.shift.requires_grad
    with torch.no_grad():
        model.placer.shift += 0.1
    with pytest.raises(ValueError, match=r'other settings \(weights\)'):
        run(model, folder, tmp_path / 'a.safetensors', **kwargs)
    with pytest.raises(ValueError, match=r"init='diagonal' is a placer, but the model's is 'sampled': create"):
        run(make_model(), folder, tmp_path / 'c.safetensors', **kwargs)


@pytest.mark.parametrize('in_chans', [1, 4])
def test_models_of_other_channels(folder, tmp_path, in_chans):
    model = make_model(in_chans=in_chans)
    if in_chans == 4:
        with pytest.raises(ValueError, match=r'in_chans=4'):
            run(model, folder, tmp_path / 'r.safetensors')
        assert names(tmp_path) == ['data']
        return
    found = run(model, folder, tmp_path / 'r.safetensors', init='salient', saliency='spectral')
    grey = Image.open(folder / 'class0' / '000.png').convert('L')
    mean, std = (sum(model.pretrained_cfg[key]) / 3 for key in ('mean', 'std'))
    image = (torch.from_numpy(np.array(grey)).view(1, 1, 64, 64) / 255 - mean) / std
    expected = model(image, found.positions[:1]).detach()
    torch.testing.assert_close(found.logits_after[:1], expected, rtol=0, atol=1e-5)


def test_broken_pictures_are_named_or_left_out(tiny, tmp_path):
    folder = write_pictures(tmp_path / 'data', 7)
    order = [os.path.relpath(Pictures(str(folder)).name(i), folder) for i in range(7)]
    good = run(tiny, folder, tmp_path / 'good.safetensors', init='uniform', batch_size=2)
    for name in order[2:4]:  # the whole of one batch
        (folder / name).write_bytes(b'no picture')
    (folder / order[6]).write_bytes((folder / order[0]).read_bytes()[:200])
    out = tmp_path / 'r.safetensors'
    kwargs = dict(init='uniform', batch_size=2)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=rf'^{folder / order[2]} is no picture .* --skip-broken leaves such') as e:
            run(tiny, folder, out, workers=workers, **kwargs)
        assert '\n' not in str(e.value)
    assert names(Path(f'{out}.parts')) == ['000000000.safetensors', 'settings.json'], 'the good ones before are kept'
    done = []
    found = run(tiny, folder, out, skip_broken=True, progress=done.append, **kwargs)
    assert done == [2, 2, 2, 1] and sum(done) == 7
    kept = [0, 1, 4, 5]
    torch.testing.assert_close(found.positions, good.positions[kept], rtol=0, atol=1e-5)
    assert read_header(out)['images'] == [order[i] for i in kept]
    assert [str(folder / order[i]) in said for i, said in zip((2, 3, 6), list_broken(out), strict=True)] == [True] * 3
    with pytest.raises(ValueError, match=rf'^{folder / order[2]} is no picture'):
        run(tiny, folder, out, **kwargs)
    for name in order:
        (folder / name).write_bytes(b'no picture')
    with pytest.raises(ValueError, match=r'holds no picture that can be read: .* is no picture'):
        run(tiny, folder, tmp_path / 'none.safetensors', skip_broken=True, **kwargs)


def test_folders_that_cannot_be_searched_are_named_or_left_out(tiny, folder, tmp_path):
    pictures, out = Pictures(str(folder)), tmp_path / 'r.safetensors'
    pictures.broken.append('data/closed cannot be searched.')
    with pytest.raises(ValueError, match=r'^data/closed cannot be searched\. --skip-broken leaves such'):
        run(tiny, pictures, out)
    assert len(run(tiny, pictures, out, skip_broken=True).positions) == len(pictures)
    assert list_broken(out) == ['data/closed cannot be searched.']
    with pytest.raises(ValueError, match=r'^data/closed cannot be searched\. --skip-broken leaves such'):
        run(tiny, pictures, out)


def test_an_empty_data_set_is_refused(tiny, folder, tmp_path):
    pictures = Pictures(str(folder))
    pictures.__class__ = type('Empty', (Pictures,), dict(__len__=lambda self: 0))
    with pytest.raises(ValueError, match='is empty'):
        run(tiny, pictures, tmp_path / 'r.safetensors')


@pytest.fixture
def oracle(tiny, tmp_path):
    timm.models.save_for_hf(tiny, tmp_path / 'saved')

    def invoke(*arguments):
        arguments = [
            *arguments, '--model', f'local-dir:{tmp_path}/saved', '--steps', 2, '--out', tmp_path / 'r.safetensors']
        return CliRunner().invoke(main, ['oracle', *map(str, arguments)])

    return invoke


def test_command(oracle, tmp_path):
    labelled, flat = write_pictures(tmp_path / 'labelled', 5), write_pictures(tmp_path / 'flat', 5, 0)
    out = tmp_path / 'r.safetensors'
    result = oracle(labelled, '--n-tokens', 4)
    assert result.exit_code == 0, result.output
    written = OracleResult.from_safetensors(out)
    before, after = written.correct_before.float().mean(), written.correct_after.float().mean()
    assert result.stdout.startswith('5 images, 4 tokens, 2 steps, ')
    assert f'accuracy  {before:.2%} -> {after:.2%}' in result.stdout
    assert f'loss      {written.losses[:, 0].mean():.4f} -> {written.losses[:, 2].mean():.4f}' in result.stdout
    again = oracle(labelled, '--n-tokens', 16)
    assert again.exit_code == 1 and 'was made with other settings (n_tokens)' in again.stderr
    out.unlink()

    refused = oracle(flat, '--n-tokens', 4)
    assert refused.exit_code == 1 and 'has no labels' in refused.stderr and 'need no label' in refused.stderr
    arguments = (flat, '--n-tokens', 4, '--objective', 'teacher', '--amp-dtype', 'bfloat16', '--init', 'uniform')
    result = oracle(*arguments)
    assert result.exit_code == 0 and 'accuracy' not in result.stdout, result.output
    assert OracleResult.from_safetensors(out).correct_after is None
    again = oracle(*arguments)
    assert again.exit_code == 0 and ' 0.0 images/s' in again.stdout
    other = oracle(flat, '--objective', 'entropy', '--n-tokens', 4)
    assert other.exit_code == 1 and 'was made with other settings (init, search)' in other.stderr


def test_command_takes_the_data_that_evaluate_takes(oracle, folder, tmp_path):
    out = tmp_path / 'r.safetensors'
    arguments = ('--n-tokens', 4)
    positions = []
    for data in ((folder,), (folder, '--dataset', 'torch/image_folder'),
                 ('torch/image_folder', '--data-dir', folder)):
        result = oracle(*data, *arguments)
        assert result.exit_code == 0 and result.stdout.startswith('5 images'), result.output
        positions.append(OracleResult.from_safetensors(out).positions)
        out.unlink()
    torch.testing.assert_close(positions[1], positions[0], rtol=0, atol=1e-5)
    assert torch.equal(positions[1], positions[2])
    refused = oracle('digits', *arguments)
    assert refused.exit_code == 1 and 'digits has 10 classes, the model 3' in refused.stderr
    (folder / 'class0' / '000.png').write_bytes(b'')
    result = oracle(folder, *arguments, '--skip-broken')
    assert result.exit_code == 0 and result.stdout.startswith('4 images'), result.output
    assert 'skipped: ' in result.stderr and '000.png' in result.stderr


@pytest.mark.parametrize('wrong, message', [
    (('--tol', 'nan'), 'tol=nan must be a finite number'),
    (('--seed', 2 ** 70), 'seed=1180591620717411303424 must be a whole number'),
    (('--lr', 'inf'), 'lr=inf'), (('--lr', 0), 'lr=0.0 must be'), (('--patience', -1), 'patience=-1'),
    (('--steps', 10 ** 12), 'steps=1000000000000'), (('--optimizer', 'adamv'), 'not found'),
    (('--out', '.'), 'is a directory'), (('--workers', -1), 'workers=-1'),
])
def test_nonsense_on_the_command_line_is_refused_before_a_model_is_built(
        folder, tmp_path, monkeypatch, wrong, message,
):
    def refuse(*args, **kwargs):
        raise AssertionError('a model was built')

    monkeypatch.setattr(timm, 'create_model', refuse)
    arguments = ['oracle', folder, '--out', tmp_path / 'r.safetensors', *wrong]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code in (1, 2) and message in result.stderr
    assert names(tmp_path) == ['data']


@pytest.mark.parametrize('wrong, message', [
    (('--n-tokens', 10 ** 12), 'n_tokens=1000000000000 must be a whole number'),
    (('--n-tokens', 4097), 'n_tokens=4097 is more than the 4096 pixels'),
    (('--init', 'cntr'), "sampler='cntr' is unknown (did you mean 'center'?)"),
])
def test_a_typo_on_the_command_line_leaves_nothing(oracle, folder, tmp_path, wrong, message):
    result = oracle(folder, *wrong)
    assert result.exit_code == 1 and message in result.stderr
    assert names(tmp_path) == ['data', 'saved']
    assert oracle(folder, '--n-tokens', 4).exit_code == 0
