from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_spot.tasks.kept import (
    KeptParts,
    check_key,
    check_output,
    check_overwrite,
    lock_output,
    plain_key,
    remove_leftovers,
    settings_digest,
    weights_digest,
    whole_file,
    write_whole,
)

PACKAGE = Path(__file__).parents[2]


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def write_part(parts, number):
    with whole_file(parts.file(number)) as partial:
        save_file(dict(x=torch.full((4,), float(number))), partial)


@contextlib.contextmanager
def another_process(code, *arguments):
    """A process that runs `code` up to its first line of output, and is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, '-c', code, *map(str, arguments)], env={**os.environ, 'PYTHONPATH': str(PACKAGE)},
        stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == 'ready\n'
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


@pytest.fixture
def read_only():
    """A folder that this process may not write to, whoever runs the tests."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # permissions do not hold for root
        try:
            yield folder
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


@pytest.mark.parametrize('name', ['a.txt', 'no_suffix', 'two.dots.txt', '.hidden'])
def test_a_file_appears_whole(tmp_path, name):
    path = tmp_path / name
    path.write_text('old')
    with whole_file(path) as partial:
        assert partial.suffix == (path.suffix or '.tmp') and partial.parent == path.parent
        partial.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new' and names(tmp_path) == [name]


def test_who_reads_a_file_keeps_what_was_there(tmp_path):
    write_whole(tmp_path / 'a', 'old')
    with open(tmp_path / 'a') as reader:
        write_whole(tmp_path / 'a', 'new')  # another file under the name, not other bytes in this one
        assert reader.read() == 'old'


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path):
    write_whole(tmp_path / 'a', 'old')
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / 'a') as partial:
        partial.write_text('half')
        1 / 0  # noqa: B018
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / 'a', 'half \ud800')
    assert (tmp_path / 'a').read_text() == 'old' and names(tmp_path) == ['a']


def test_a_file_is_written_through_a_link(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'disk' / 'a')
    write_whole(tmp_path / 'link', 'text')
    assert (tmp_path / 'disk' / 'a').read_text() == 'text' and (tmp_path / 'link').is_symlink()


def test_no_device_is_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'pipe', Path('/dev/null')):
        with pytest.raises(ValueError, match=f'{path} is no ordinary file'):
            write_whole(path, 'text')
        with pytest.raises(ValueError, match=f'{path} is no ordinary file'):
            check_output(path)
    assert names(tmp_path) == ['pipe']


WRITE_SLOWLY = """
import sys, time
from timm_spot.tasks.kept import whole_file
with whole_file(sys.argv[1]) as partial:
    partial.write_text('half')
    print('ready', flush=True)
    time.sleep(60)
"""


def test_what_a_kill_leaves_of_a_file_is_removed_and_nothing_else(tmp_path):
    with another_process(WRITE_SLOWLY, tmp_path / 'r.safetensors') as process:
        pass
    left = f'.r.{process.pid}.tmp.safetensors'
    assert names(tmp_path) == [left], 'never under its name'
    own = ['.cache.tmp', '.r.tmp.txt', 'r.1.tmp', '.s.12.tmp.safetensors']
    for name in own:
        (tmp_path / name).touch()
    (tmp_path / '.folder.1.tmp').mkdir()
    remove_leftovers(tmp_path, 's.csv')
    assert left in names(tmp_path), 'another output may be in the making'
    remove_leftovers(tmp_path, 'r.safetensors')
    assert names(tmp_path) == sorted([*own, '.folder.1.tmp'])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*own[:3], '.folder.1.tmp'])


HOLD = """
import sys, time
from timm_spot.tasks.kept import lock_output
with lock_output(sys.argv[1]):
    print('ready', flush=True)
    time.sleep(60)
"""


def test_two_runs_at_once_the_second_is_told_who_holds_it(tmp_path):
    out = tmp_path / 'made' / 'out'
    with another_process(HOLD, out) as process:
        (tmp_path / 'link').symlink_to(tmp_path / 'made')
        for same in (out, tmp_path / 'link' / 'out', tmp_path / 'made' / '..' / 'made' / 'out'):
            with pytest.raises(BlockingIOError, match=rf'another run writes to .*out, by process {process.pid} on '):
                with lock_output(same):
                    pytest.fail('two at once')
        with lock_output(tmp_path / 'made' / 'other'):
            pass
    with lock_output(out):  # the system lifts the lock of a killed process
        assert json.loads((out.parent / '.out.lock.json').read_text())['process'] == os.getpid()
        with pytest.raises(BlockingIOError, match=f'by process {os.getpid()}'), lock_output(out):
            pytest.fail('two at once')
        (out.parent / '.out.lock.json').write_text('{"proc')
        with pytest.raises(BlockingIOError, match=r'another run writes to .*out: wait'), lock_output(out):
            pytest.fail('two at once')
    assert names(out.parent) == [], 'no lock is left'
    with pytest.raises(ZeroDivisionError), lock_output(out):
        1 / 0  # noqa: B018
    assert names(out.parent) == []


def test_locks_removed_at_their_end_are_never_held_twice(tmp_path):
    """A counter read and written under the lock, by as many as like, loses nothing."""
    count = tmp_path / 'count'
    count.write_text('0')

    def take_in_turn():
        taken = 0
        while taken < 40:
            with contextlib.suppress(BlockingIOError), lock_output(count):
                before = int(count.read_text())
                time.sleep(0.0005)
                count.write_text(str(before + 1))
                taken += 1

    threads = [threading.Thread(target=take_in_turn) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.read_text() == '120' and names(tmp_path) == ['count']


def test_a_read_only_folder_is_named(read_only):
    for out in (read_only / 'out', read_only / 'below' / 'out'):
        with pytest.raises(PermissionError, match=rf'{out.parent} cannot be written to \(Permission denied\): give'):
            with lock_output(out):
                pytest.fail('writes')
        with pytest.raises(PermissionError, match=f'{read_only} cannot be written to, so {out} cannot'):
            check_output(out)
    assert names(read_only) == []


def test_outputs_that_cannot_be_are_refused_before_any_work(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(IsADirectoryError, match=f'{tmp_path} is a folder'):
        check_output(tmp_path)
    with pytest.raises(NotADirectoryError, match=f'{tmp_path / "file"} is no folder'):
        check_output(tmp_path / 'file' / 'out')
    with pytest.raises(OSError, match=f'{tmp_path / "file"} cannot be written to'):
        with lock_output(tmp_path / 'file' / 'out'):
            pytest.fail('writes')
    with pytest.raises(ValueError, match='lies under a name that is no UTF-8'):
        check_output(tmp_path / 'caf\udce9.safetensors')
    with pytest.raises(ValueError, match='lies under a name that is no UTF-8'):
        KeptParts(tmp_path / 'caf\udce9' / 'parts', {})
    check_output(tmp_path / 'file')
    check_output(tmp_path / 'new' / 'folder' / 'out')
    assert names(tmp_path) == ['file'], 'nothing is made'


def test_parts_are_taken_over_by_a_run_of_the_same_key(tmp_path):
    parts = KeptParts(tmp_path / 'parts', dict(n=3, size=(2, 4), dtype=torch.float16, path=Path('a')))
    parts.open()
    write_part(parts, 1)
    (parts.folder / '.000000002.77.tmp.safetensors').write_bytes(b'half a part')
    again = KeptParts(tmp_path / 'parts', dict(n=3, size=[2, 4], dtype='torch.float16', path='a'))
    again.open()
    assert again.missing(3) == [0, 2] and names(again.folder) == ['000000001.safetensors', 'settings.json']
    again.remove()
    assert names(tmp_path) == []
    again.remove()


@pytest.mark.parametrize('other, differing', [
    (dict(n=4, m=1), 'n'), (dict(n=3), 'm'), (dict(n=3, m=1, k=None), 'k'), (dict(n=None, k=1), 'n, k, m')])
def test_parts_of_another_key_are_refused_and_named(tmp_path, other, differing):
    first = KeptParts(tmp_path / 'parts', dict(n=3, m=1))
    first.open()
    write_part(first, 0)
    with pytest.raises(ValueError, match=rf'parts was made with other settings \({differing}\): remove it'):
        KeptParts(tmp_path / 'parts', other).open()
    assert first.missing(1) == []


@pytest.mark.parametrize('record', ['{"n": 3}', '{"n": 3', ''])
def test_a_record_without_parts_poisons_nothing(tmp_path, record):
    (tmp_path / 'parts').mkdir()
    (tmp_path / 'parts' / 'settings.json').write_text(record)
    parts = KeptParts(tmp_path / 'parts', dict(n=4))
    parts.open()
    write_part(parts, 0)
    parts.remove_empty()
    parts.open()
    assert parts.missing(2) == [1]
    with pytest.raises(ValueError, match=r'with other settings \(n\)'):
        KeptParts(tmp_path / 'parts', dict(n=3)).open()
    parts.file(0).unlink()
    parts.remove_empty()
    assert names(tmp_path) == []


@pytest.mark.parametrize('torn', ['', '{"n": 3', '[]', '3', 'null', '\xff\xfe'])
def test_torn_settings_are_named(tmp_path, torn):
    parts = KeptParts(tmp_path / 'parts', dict(n=3))
    parts.open()
    write_part(parts, 0)
    (parts.folder / 'settings.json').write_bytes(torn.encode('latin-1'))
    with pytest.raises(ValueError, match=r'parts.* (is damaged|does not say with which settings).*: remove '):
        parts.open()
    (parts.folder / 'settings.json').unlink()
    with pytest.raises(ValueError, match=r'holds 000000000.safetensors, but no settings.json .*: remove .*parts'):
        parts.open()
    assert names(parts.folder) == ['000000000.safetensors'], 'what is refused is not touched'


def test_torn_parts_are_named_and_made_again(tmp_path):
    parts = KeptParts(tmp_path / 'parts', dict(n=3))
    parts.open()
    for number in range(4):
        write_part(parts, number)
    whole = parts.file(0).read_bytes()
    parts.file(0).write_bytes(b'')
    parts.file(1).write_bytes(whole[:-1])
    parts.file(2).write_bytes(whole[:20])
    with pytest.warns(UserWarning, match=r'00000000[012].safetensors is damaged and is made again') as warned:
        assert parts.missing(4) == [0, 1, 2]
    assert len(warned) == 3
    for number in range(3):
        write_part(parts, number)
    assert parts.missing(4) == []


def test_folders_of_others_are_neither_taken_nor_removed(tmp_path):
    own = tmp_path / 'r.parts'
    own.mkdir()
    (own / 'thesis.tex').touch()
    with pytest.raises(ValueError, match=r'holds thesis\.tex, but no settings\.json'):
        KeptParts(own, dict(n=3)).open()
    parts = KeptParts(tmp_path / 'parts', dict(n=3))
    parts.open()
    write_part(parts, 0)
    (parts.folder / 'notes.txt').touch()
    parts.remove()
    assert names(parts.folder) == ['notes.txt']
    (tmp_path / 'file').touch()
    with pytest.raises(FileExistsError, match='file is no folder'):
        KeptParts(tmp_path / 'file', dict(n=3)).open()


def test_a_kill_while_parts_are_removed_leaves_parts_of_a_known_key(tmp_path, monkeypatch):
    parts = KeptParts(tmp_path / 'parts', dict(n=3))
    parts.open()
    for number in range(3):
        write_part(parts, number)
    unlink, removed = Path.unlink, []

    def killed(path, missing_ok=False):
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, 'unlink', killed)
    with pytest.raises(KeyboardInterrupt):
        parts.remove()
    monkeypatch.undo()
    parts.open()
    assert len(parts.missing(3)) == 2


def test_what_has_no_value_is_no_key():
    assert plain_key(dict(a=(1, 2), b=None, c=torch.bfloat16)) == dict(a=[1, 2], b=None, c='torch.bfloat16')
    for value in (torch.zeros(2), lambda x: x, object()):
        with pytest.raises(TypeError, match=rf'{re.escape(repr(value))} .* cannot be part of the key'):
            plain_key(dict(a=dict(b=value)))
    with pytest.raises(ValueError, match='here does not say with which settings'):
        check_key(Path('here'), ['n'], dict(n=1))


def test_digests_tell_models_apart():
    def model(**kwargs):
        torch.manual_seed(0)
        return timm.create_model('spot_vit_pico_patch8_64', embed_dim=32, depth=1, **kwargs).eval()

    plain = model(pos_nodes=8)
    same_weights = [
        model(pos_nodes=8, convention='spot'), model(pos_nodes=8, num_heads=2), model(pos_nodes=8, global_pool='token'),
        model(pos_nodes=8, act_layer='relu')]
    digests = [settings_digest(m) for m in (plain, *same_weights)]
    assert len(set(digests)) == 5
    assert len({weights_digest(m) for m in (plain, same_weights[0], same_weights[1], same_weights[3])}) == 1
    # Where it places its tokens, and what it is doing at the moment, is no part of it.
    elsewhere = model(pos_nodes=8, n_tokens=9, sampler='center', seed=3)
    elsewhere.set_grad_checkpointing()
    assert settings_digest(elsewhere.train()) == digests[0]
    with torch.no_grad():
        elsewhere.head.weight[0, 0] += 1
    assert weights_digest(elsewhere) != weights_digest(plain)


def test_what_is_there_is_written_over_only_where_asked(tmp_path):
    check_overwrite([tmp_path / 'a.png'], False)
    with pytest.raises(FileExistsError, match='is there already: give --overwrite'):
        check_overwrite([tmp_path / 'a.png', tmp_path], False)
    check_overwrite([tmp_path], True)
