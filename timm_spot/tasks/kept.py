"""Work that is kept: files that appear whole or not at all, parts of a run that goes on, one run at a time.

What a run leaves is found again by a key of everything that determines it. A run that was killed ends with the same
bytes as one that was not, on the same processor with the same number of threads.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import warnings
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import nn

from ..models.checkpoint_file import check_utf8

_SETTINGS = 'settings.json'
_LEFTOVER = re.compile(r'\.(?P<stem>.+)\.\d+\.tmp(?P<suffix>\.[^.]*)?')
_PART = re.compile(r'\d{9}\.safetensors')
_OLD_LEFTOVER = re.compile(r'(\d{9}\.safetensors|settings)\.tmp')  # of version 0.1
# Settings of modules that change nothing in what a model in eval mode computes.
_PASSING = {'training', 'fused_attn', 'grad_checkpointing', 'batches', 'img_size'}


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all weights, so that parts of another checkpoint are never joined."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def settings_digest(model: nn.Module) -> str:
    """SHA-256 of how a model computes besides its weights: the classes of its modules and their plain settings.

    Two models of one name and the same weights differ in it by convention, pooling, heads, activation and the like.
    Where a model places its tokens is left out: its `placer` is no part of how it computes with them.
    """
    described = []
    for name, module in model.named_modules():
        if name.partition('.')[0] == 'placer':
            continue
        plain = {
            key: value for key, value in vars(module).items()
            if not key.startswith('_') and key not in _PASSING and _is_plain(value)}
        described.append([name, type(module).__qualname__, plain])
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def check_overwrite(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise FileExistsError where one of the files is there, unless they may be written over."""
    for path in paths:
        if not overwrite and path.exists():
            raise FileExistsError(
                f'{path} is there already: give --overwrite (from Python overwrite=True), or another name.')


def check_output(path: str | Path) -> None:
    """Raise unless a file could be written to `path`; call it before any work. Makes nothing.

    Raises:
        IsADirectoryError: It is a folder.
        ValueError: It is a device, a pipe or the like, or its name is no UTF-8, as safetensors needs it.
        PermissionError: Its folder, or the nearest one that exists, cannot be written to.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder: name a file to write.')
    _check_replaceable(path)
    check_utf8(path)
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f'{folder} is no folder, so {path} cannot be written: give another output.')
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(f'{folder} cannot be written to, so {path} cannot: give another output.')


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to: it takes the name once the block ends without an error.

    It has the suffix of `path`, if there is one. Nothing is left of it otherwise, but by a kill; `remove_leftovers`
    finds those. A link is followed.

    Raises:
        ValueError: `path` is a device, a pipe or the like, which a file would take the place of.
    """
    path = Path(os.path.realpath(path))
    _check_replaceable(path)
    partial = path.with_name(f'.{path.stem}.{os.getpid()}.tmp{path.suffix}')
    try:
        yield partial
        with open(partial, 'rb+') as file:
            os.fsync(file.fileno())  # else a power cut could keep the name without the bytes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding='utf-8')


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed runs left of files that `whole_file` was to write; needs the lock of that output.

    Args:
        folder: Where they lie. No other files are touched, nor folders below it.
        name: Of the one file to be written; by default of any.
    """
    for partial in folder.glob('.*.tmp*'):
        match = _LEFTOVER.fullmatch(partial.name)
        if match and partial.is_file() and name in (None, match['stem'] + (match['suffix'] or '')):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_output(out: str | Path) -> Iterator[None]:
    """Keep other runs from writing to a folder, or to a file, while this one does.

    The operating system lifts the lock of a process that dies. The files `.NAME.lock` and `.NAME.lock.json`, which
    says who holds it, lie beside `out`, whose parent folder is made.

    Raises:
        BlockingIOError: Another run holds it; says which.
        OSError: The folder cannot be written to.
    """
    out = Path(os.path.realpath(out))  # whatever links lead there
    lock, record = (out.with_name(f'.{out.name}{suffix}') for suffix in ('.lock', '.lock.json'))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=0).acquire()
    except Timeout as e:
        raise BlockingIOError(
            f'another run writes to {out}{_holder(record)}: wait for its end, or give another output.') from e
    except OSError as e:
        raise type(e)(f'{out.parent} cannot be written to ({e.strerror}): give another output.') from e
    with held:
        try:
            write_whole(record, json.dumps(dict(
                process=os.getpid(), host=socket.gethostname(),
                since=datetime.now(timezone.utc).isoformat(timespec='seconds'))))
            yield
        finally:
            # While it is held: whoever waits for an unlinked lock notices, and takes a new one.
            record.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)


class KeptParts:
    """Parts of a piece of work, safetensors files in a folder, each of them whole.

    One process opens them under `lock_output`; after that several may write, each its own parts, by `whole_file`.

    Args:
        folder: Made by `open`; for parts only.
        key: All that determines the parts: what JSON holds, and paths and data types, which are kept as strings.

    Raises:
        ValueError: The folder's name is no UTF-8.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        check_utf8(folder)
        self.folder = folder
        self.key = plain_key(key)

    def open(self) -> None:
        """Make the folder, or take over what an earlier run with the same key left in it.

        A record without any part, of whatever key, is written anew: nothing is lost.

        Raises:
            ValueError: The parts are of another key; names what differs. Or their record is damaged or missing.
            FileExistsError: A file has the name of the folder.
        """
        self._check()
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        if not self._has_parts():
            write_whole(self.folder / _SETTINGS, json.dumps(self.key))

    def _check(self) -> None:
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise FileExistsError(f'{self.folder} is no folder, but parts are to be kept there: move it away.')
        record = self.folder / _SETTINGS
        if self._has_parts() and record.exists():
            check_key(self.folder, _read_record(record), self.key)
        elif not record.exists():
            strange = [file.name for file in sorted(self.folder.iterdir()) if not _LEFTOVER.fullmatch(file.name)]
            if strange:
                raise ValueError(
                    f'{self.folder} holds {strange[0]}, but no {_SETTINGS} that says of what it is a part: remove '
                    f'{self.folder}, and what it holds is done again.')

    def _has_parts(self) -> bool:
        return any(_PART.fullmatch(file.name) for file in self.folder.iterdir())

    def file(self, number: int) -> Path:
        """Where part `number` lies."""
        return self.folder / f'{number:09d}.safetensors'

    def missing(self, count: int) -> list[int]:
        """Which of the parts 0 .. count - 1 are still to be made."""
        return [number for number in range(count) if self.is_missing(number)]

    def is_missing(self, number: int) -> bool:
        """Whether a part is still to be made; warns of a damaged one, which is to be made again."""
        file = self.file(number)
        if not file.exists():
            return True
        try:
            with safe_open(file, framework='pt'):  # compares the length of the file with its header
                return False
        except (SafetensorError, OSError):
            warnings.warn(f'{file} is damaged and is made again.', stacklevel=2)
            return True

    def remove_empty(self) -> None:
        """Remove the folder unless it holds a part, after a run that came to nothing."""
        if self.folder.is_dir() and not self._has_parts():
            self.remove()

    def remove(self) -> None:
        """Remove the parts, after they have become something else; what others put into the folder stays."""
        if not self.folder.is_dir():
            return
        remove_leftovers(self.folder)
        for file in sorted(self.folder.iterdir()):
            if _PART.fullmatch(file.name) or _OLD_LEFTOVER.fullmatch(file.name):
                file.unlink()
        (self.folder / _SETTINGS).unlink(missing_ok=True)  # last: parts without it could not be told from others
        with contextlib.suppress(OSError):  # not empty
            self.folder.rmdir()


def plain_key(key: dict[str, Any]) -> dict[str, Any]:
    """A key as JSON gives it back.

    Raises:
        TypeError: It holds something that has no value to compare, such as a function or a tensor.
    """
    def name(value: Any) -> str:
        if isinstance(value, (Path, torch.dtype, torch.device)):
            return str(value)
        raise TypeError(
            f'{value!r} ({type(value).__name__}) cannot be part of the key of kept work: give a plain value.')

    return json.loads(json.dumps(key, default=name))


def check_key(where: Path, found: Any, key: dict[str, Any]) -> None:
    """Raise ValueError unless what lies at `where` is of this key, neither more nor less."""
    if not isinstance(found, dict):
        raise ValueError(f'{where} does not say with which settings it was made: remove it, or write to another file.')
    differing = [name for name in {**key, **found} if name not in found or name not in key or found[name] != key[name]]
    if differing:
        raise ValueError(
            f"{where} was made with other settings ({', '.join(differing)}): remove it, or write to another file.")


def _read_record(record: Path) -> Any:
    try:
        return json.loads(record.read_text(encoding='utf-8'))
    except ValueError as e:
        raise ValueError(f'{record} is damaged: remove {record.parent}, and what it holds is done again.') from e


def _holder(record: Path) -> str:
    """', by process ...', as far as the record says."""
    try:
        found = json.loads(record.read_text(encoding='utf-8'))
        return f", by process {found['process']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # its holder is just about to write it
        return ''


def _check_replaceable(path: Path) -> None:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f'{path} is no ordinary file, and would be replaced by one: name another file to write.')
