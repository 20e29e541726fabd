"""Pictures found by name: files, folders, tars and glob patterns, with or without the names of classes.

One rule for every command: folders are searched as timm's readers search them, links to folders are followed (loops
are not), and what a name or a folder cannot give is told, while the rest is still found.
"""
from __future__ import annotations

import glob
import io
import os
import re
import stat
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from timm.data import get_img_extensions
from timm.data.readers import create_reader


def printable(name: str | os.PathLike) -> str:
    """A file's name as any terminal shows it: bytes that are no UTF-8, and control characters, as escapes."""
    text = os.fsencode(name).decode('utf-8', 'backslashreplace')
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read its bytes.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is a folder, a pipe or a device: reading it might never end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError('it is no regular file')
    return open(path, 'rb')


class Entry(NamedTuple):
    """A picture that is a file, or a part of one.

    Attributes:
        name: Its path; of a member of a tar, that of the tar and its own.
        folder: Name of the folder in which it lies, by which its class goes; '' for the root.
        file: The file to read.
        start: First byte, of a member of a tar.
        size: How many bytes; None for the whole file.
    """

    name: str
    folder: str
    file: str
    start: int = 0
    size: int | None = None

    def open(self) -> BinaryIO:
        """The bytes of the picture; raises OSError, and ValueError for what is no regular file."""
        file = open_regular(self.file)
        if self.size is None:
            return file
        with file:
            file.seek(self.start)
            return io.BytesIO(file.read(self.size))


def find_pictures(sources: Sequence[str | os.PathLike]) -> tuple[list[Entry], list[str]]:
    """Pictures named by files, folders (searched recursively), tars and glob patterns, in order, each once.

    Returns:
        The pictures, and what is wrong with sources that name none, or only in part.
    """
    found: dict[str, Entry] = {}
    broken: list[str] = []
    for source in map(os.fspath, sources):
        try:
            entries = list_source(source, broken.append)
        except (OSError, ValueError) as e:
            broken.append(str(e))
        else:
            found.update({entry.name: entry for entry in entries if entry.name not in found})
    return list(found.values()), broken


def find_images(sources: Sequence[str | os.PathLike]) -> list[Path]:
    """Files of pictures, as `find_pictures` lists them.

    Raises:
        FileNotFoundError: A source names nothing, or holds no picture.
    """
    entries, broken = find_pictures(sources)
    if broken:
        raise FileNotFoundError(broken[0])
    return [Path(entry.name) for entry in entries]


def list_source(source: str, on_error: Callable[[str], None]) -> list[Entry]:
    """Pictures of one file, folder, tar or glob pattern.

    Args:
        source: Its name.
        on_error: Told of every folder inside that cannot be searched.

    Raises:
        FileNotFoundError: It names nothing, or holds no picture.
        ValueError: It is a damaged tar.
    """
    if os.path.isdir(source):
        entries = list_folder(source, on_error)
        if not entries:
            raise FileNotFoundError(
                f'folder {printable(source)} holds no picture ({", ".join(sorted(get_img_extensions()))}).')
        return entries
    if os.path.isfile(source) and os.path.splitext(source)[1] == '.tar':
        return list_tar(source)
    # Whatever else lies there (a pipe, a link to nothing) is told by who reads it.
    files = [source] if os.path.lexists(source) else [
        file for file in sorted(glob.glob(source, recursive=True), key=natural_order) if not os.path.isdir(file)]
    if not files:
        raise FileNotFoundError(f'{printable(source)} is no file, no folder and matches nothing.')
    return [Entry(file, '', file) for file in files]


def list_folder(root: str, on_error: Callable[[str], None]) -> list[Entry]:
    """Pictures below a folder by timm's suffixes, in natural order of their paths, as timm's reader lists them.

    A link to a folder is followed, unless it leads back to a folder around it.
    """
    extensions = get_img_extensions(as_set=True)
    entries = []
    stack: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(os.fspath(root), '', ())]
    while stack:
        path, folder, around = stack.pop()
        try:
            status, names = os.stat(path), os.listdir(path)
        except OSError as e:
            on_error(f'folder {printable(path)} cannot be searched: {e.strerror}.')
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in around:
            continue
        for name in names:
            file = os.path.join(path, name)
            if os.path.isdir(file):
                stack.append((file, name, (*around, identity)))
            elif os.path.splitext(name)[1].lower() in extensions:
                entries.append(Entry(file, folder, file))
    return sorted(entries, key=lambda entry: natural_order(entry.name))


def list_tar(tar: str) -> list[Entry]:
    """Pictures in a tar, or in tars inside it, with the names of their folders as timm's reader has them.

    Raises:
        ValueError: It is no tar, is damaged, or holds no picture.
    """
    try:
        reader = create_reader('', root=tar)
    except (tarfile.TarError, OSError, EOFError, ValueError, AssertionError) as e:
        reason = 'it holds no picture' if 'not enough values' in str(e) else e
        raise ValueError(f'{printable(tar)} is no tar of pictures that can be read: {reason}.') from e
    entries = []
    for (member, _, inner), label in zip(reader.samples, reader.targets):
        start = member.offset_data + (inner.offset_data if inner is not None else 0)
        name = os.path.join(tar, os.path.normpath(member.name.lstrip('/')))
        entries.append(Entry(name, reader.class_idx_to_name[label], tar, start, member.size))
    return entries


def natural_order(name: str) -> list[str | int]:
    """Key by which 2.png comes before 10.png, as timm sorts."""
    parts = re.split(r'(\d+)', name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
