"""Work that is kept: files that appear whole or not at all, parts of a run that goes on, one run at a time.

What a run leaves is found again by a key of everything that determines it. A run that was killed ends with the same
bytes as one that was not.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, Union

import torch
from filelock import FileLock, Timeout
from torch import nn

_SETTINGS = 'settings.json'


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all weights, so that parts of another checkpoint are never joined."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def whole_file(path: Union[str, Path]) -> Iterator[Path]:
    """A path beside `path`, of the same suffix, to write to: it takes the name once the block ends without an error.

    Nothing is left of it otherwise, but by a kill; `remove_leftovers` finds those.
    """
    path = Path(path)
    partial = path.with_name(f'.{path.stem}.{os.getpid()}.tmp{path.suffix}')
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Union[str, Path], text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding='utf-8')


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left of files that `whole_file` was to write into a folder; needs its lock."""
    for partial in folder.glob('.*.tmp*'):
        partial.unlink()


@contextlib.contextmanager
def lock_output(out: Union[str, Path]) -> Iterator[None]:
    """Keep other runs from writing to a folder, or to a file, while this one does.

    The operating system lifts the lock of a process that dies. The files `.NAME.lock` and `.NAME.lock.json`, which
    says who holds it, lie beside `out`.

    Raises:
        BlockingIOError: Another run holds it; says which.
    """
    out = Path(out).absolute()
    lock, record = (out.with_name(f'.{out.name}{suffix}') for suffix in ('.lock', '.lock.json'))
    try:
        held = FileLock(lock, timeout=0).acquire()
    except Timeout as e:
        holder = ', by ' + record.read_text(encoding='utf-8') if record.exists() else ''
        raise BlockingIOError(f'another run writes to {out}{holder}: wait for its end, or give another output.') from e
    with held:
        since = datetime.now(timezone.utc).isoformat(timespec='seconds')
        record.write_text(f'process {os.getpid()} on {socket.gethostname()} since {since}', encoding='utf-8')
        try:
            yield
        finally:
            record.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)


class KeptParts:
    """Parts of a piece of work, safetensors files in a folder, each of them whole.

    Args:
        folder: Made by `open`.
        key: All that determines the parts, as JSON has it.
    """

    def __init__(self, folder: Path, key: Dict[str, Any]) -> None:
        self.folder = folder
        self.key = json.loads(json.dumps(key, default=str))

    def open(self) -> None:
        """Make the folder, or take over what an earlier run with the same key left in it.

        Raises:
            ValueError: It is of another key; names what differs. Or its record is damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        record = self.folder / _SETTINGS
        if not record.exists():
            write_whole(record, json.dumps(self.key))
            return
        try:
            found = json.loads(record.read_text(encoding='utf-8'))
        except ValueError as e:
            raise ValueError(f'{record} is damaged: remove {self.folder}, and what it holds is done again.') from e
        check_key(self.folder, found, self.key)

    def file(self, number: int) -> Path:
        """Where part `number` lies."""
        return self.folder / f'{number:09d}.safetensors'

    def missing(self, count: int) -> List[int]:
        """Which of the parts 0 .. count - 1 are still to be made."""
        return [i for i in range(count) if not self.file(i).exists()]

    def remove(self) -> None:
        """Remove all of it, after its parts have become something else."""
        if self.folder.exists():
            shutil.rmtree(self.folder)


def check_key(where: Path, found: Dict[str, Any], key: Dict[str, Any]) -> None:
    """Raise ValueError unless what lies at `where` is of this key."""
    differing = [name for name in key if found.get(name) != key[name]]
    if differing:
        raise ValueError(
            f"{where} was made with other settings ({', '.join(differing)}): remove it, or write to another file.")
