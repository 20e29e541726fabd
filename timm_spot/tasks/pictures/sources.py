"""What pictures come from: each kind of source reads one picture, names it, and feeds the digest of its data set.

Pictures are read by `read_picture` instead of timm's own data sets, which put the next picture into the place of one
that cannot be read.
"""
from __future__ import annotations

import abc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from .classes import load_class_map
from .digits import draw_canvases, load_digits
from .files import Entry, find_pictures, list_source, natural_order, printable
from .images import PictureError, read_picture, to_upright_rgb

DIGITS = 'digits'
NO_LABEL = -1
_CANVASES_PER_DIGIT = dict(held_out=10, train=2)
_PREFIXES = ('hfds/', 'hfids/', 'tfds/', 'wds/', 'torch/')
_SPLITS = dict(train=('train', 'training'), validation=('validation', 'val', 'valid', 'eval', 'evaluation'))


class Part(abc.ABC):
    """Pictures of one source.

    Attributes:
        groups, class_to_idx, has_labels: See `Pictures`.
        is_stream: Whether they can only be read in order.
    """

    groups: torch.Tensor | None = None
    class_to_idx: dict[str, int] = {}
    has_labels = True
    is_stream = False

    @abc.abstractmethod
    def __len__(self) -> int:
        ...

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return (self.read(i) for i in range(len(self)))

    @abc.abstractmethod
    def read(self, index: int) -> tuple[Image.Image, int]:
        ...

    @abc.abstractmethod
    def name(self, index: int) -> str:
        ...

    @abc.abstractmethod
    def feed(self, update: Callable[[bytes], Any]) -> None:
        """Give a digest all that determines the pictures and their labels."""


class Canvases(Part):
    """The shipped digits."""

    def __init__(self, part: str) -> None:
        digits, labels = load_digits(part)
        times = _CANVASES_PER_DIGIT[part]
        generator = torch.Generator().manual_seed(1)  # the canvases of the model card
        self.canvases = torch.cat([draw_canvases(digits, generator) for _ in range(times)])
        self.labels = labels.repeat(times).tolist()
        self.groups = torch.arange(len(digits)).repeat(times)
        self.class_to_idx = {str(i): i for i in range(10)}

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.canvases[index].numpy()).convert('RGB'), self.labels[index]

    def name(self, index: int) -> str:
        return f'{DIGITS} {index}'

    def feed(self, update: Callable[[bytes], Any]) -> None:
        update(self.canvases.numpy().tobytes())


class Files(Part):
    """Files, or members of tars; their classes are numbered by the natural order of their names, as timm does."""

    def __init__(
            self,
            entries: list[Entry],
            root: str,
            split: str,
            class_to_idx: dict[str, int] | None = None,
            alpha: bool = False,
    ) -> None:
        names = sorted({entry.folder for entry in entries}, key=natural_order)
        self.has_labels = class_to_idx is not None or names != ['']
        if class_to_idx is None and self.has_labels:
            class_to_idx = {name: i for i, name in enumerate(names)}
        self.entries, self.root, self.split, self.class_to_idx = entries, root, split, class_to_idx or {}
        self.alpha = alpha

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> tuple[Image.Image, int]:
        entry = self.entries[index]
        try:
            file = entry.open()
        except OSError as e:
            raise PictureError(f'{printable(entry.name)} cannot be read: {e.strerror}.') from e
        except ValueError as e:
            raise PictureError(f'{printable(entry.name)} cannot be used: {e}.') from e
        return read_picture(file, entry.name, self.alpha), self.class_to_idx.get(entry.folder, NO_LABEL)

    def name(self, index: int) -> str:
        return self.entries[index].name

    def feed(self, update: Callable[[bytes], Any]) -> None:
        update(f'{self.split}\0{sorted(self.class_to_idx.items())!r}\n'.encode('utf-8', 'surrogateescape'))
        tars: dict[str, str] = {}
        for entry in self.entries:
            if entry.size is None or entry.file not in tars:
                tars[entry.file] = _change(entry.file)
            name = os.fsencode(os.path.relpath(entry.name, self.root) if self.root else entry.name)
            label = self.class_to_idx.get(entry.folder, NO_LABEL)
            update(name + f'\0{label}\0{entry.start}\0{tars[entry.file]}\n'.encode())


class Named(Part):
    """What timm's `create_dataset` opens by a name with a prefix."""

    def __init__(self, source: str, split: str, root: str | None, class_to_idx: dict[str, int] | None) -> None:
        self.source, self.split, self.root = source, split, root
        self.dataset = create_dataset(source, root=root, split=split, class_map=class_to_idx)
        if hasattr(self.dataset, 'loader'):  # torchvision's folders would open any file with any decoder
            self.dataset.loader = read_picture
        self.reader = getattr(self.dataset, 'reader', None)
        names = getattr(self.reader or self.dataset, 'class_to_idx', None) or getattr(
            self.reader, 'class_name_to_idx', None)
        self.class_to_idx = dict(names or {})
        self.is_stream = isinstance(self.dataset, IterableDataset)

    def __len__(self) -> int:
        return len(self.dataset) if hasattr(self.dataset, '__len__') else 0

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        if not self.is_stream:
            yield from super().__iter__()
            return
        for i, (picture, label) in enumerate(self.dataset):
            yield _converted(picture, f'{self.source} {i}'), int(label)

    def read(self, index: int) -> tuple[Image.Image, int]:
        if self.reader is not None:
            file, label = self.reader[index][:2]
            return read_picture(file, self.name(index)), label
        picture, label = self.dataset[index]
        return _converted(picture, self.name(index)), label

    def name(self, index: int) -> str:
        file = self.dataset.filename(index, absolute=True) if self.reader is not None else None
        samples = getattr(self.dataset, 'samples', None)
        return file or (samples[index][0] if samples else f'{self.source} {index}')

    def feed(self, update: Callable[[bytes], Any]) -> None:
        count = 0 if self.is_stream else len(self)
        update(f'{self.source}\0{self.split}\0{self.root}\0{count}\0{sorted(self.class_to_idx.items())!r}\n'.encode(
            'utf-8', 'surrogateescape'))
        for file, label in getattr(self.dataset, 'samples', ()):
            update(os.fsencode(file) + f'\0{label}\0{_change(file)}\n'.encode())
        if isinstance(getattr(self.dataset, 'data', None), (np.ndarray, torch.Tensor)):  # CIFAR, MNIST: in memory
            update(np.ascontiguousarray(self.dataset.data).tobytes())
            update(repr([int(label) for label in self.dataset.targets]).encode())
        # A data set of the Hugging Face Hub knows of itself what its files are.
        update(str(getattr(getattr(self.reader, 'dataset', None), '_fingerprint', '')).encode())


def _change(file: str) -> str:
    """Size and time of change of a file, which say that its contents are other ones."""
    try:
        status = os.stat(file)
    except OSError:  # whoever reads it tells
        return ''
    return f'{status.st_size} {status.st_mtime_ns}'


def _converted(picture: Image.Image, name: str) -> Image.Image:
    """A picture that a data set has opened itself."""
    try:
        picture.load()
        return to_upright_rgb(picture)
    except (OSError, SyntaxError, ValueError) as e:
        raise PictureError(f'{printable(name)} cannot be used: {str(e).rstrip(".")}.') from e


# ---------------------------------------------------------------------------------------------------------------------
# By what they are called


def is_named(source: str) -> bool:
    """Whether a data set numbers its classes itself, instead of by the names of their folders."""
    return source == DIGITS or (source.startswith(_PREFIXES) and source != 'torch/image_folder')


def open_source(source: str, split: str, root: str | None, class_map: str, broken: list[str]) -> Part:
    """One data set."""
    if source == DIGITS:
        return Canvases('train' if split == 'train' else 'held_out')
    if source.startswith(_PREFIXES):
        classes = load_class_map(class_map, root or '') if class_map else None
        if classes is not None and source.startswith('torch/'):
            raise ValueError(
                f'class_map={printable(class_map)} is of no use to {source}, which numbers its classes itself.')
        return Named(source, split, root, classes)
    folder = _split_folder(source, split)
    if not os.path.lexists(folder) and not any(c in folder for c in '*?['):
        raise FileNotFoundError(
            f"there is no folder or tar {printable(source)}; data sets by name start with {', '.join(_PREFIXES)}.")
    entries = list_source(folder, broken.append)
    if not class_map:
        return Files(entries, folder, split)
    classes = load_class_map(class_map, source)
    kept = [entry for entry in entries if entry.folder in classes]
    if not kept:
        names = sorted({entry.folder for entry in entries})
        raise ValueError(
            f'class_map={printable(class_map)} names no folder of {printable(source)}: it has '
            f"{', '.join(map(repr, list(classes)[:5]))} ..., the folders are {', '.join(map(repr, names[:5]))} ...")
    left = sorted({entry.folder for entry in entries} - set(classes), key=natural_order)
    if left:
        warnings.warn(
            f'{len(left)} folders of {printable(source)} are not in the class map and left out: '
            f"{', '.join(left[:5])}{' ...' if len(left) > 5 else ''}", stacklevel=2)
    return Files(kept, folder, split, classes)


def open_several(
        sources: Sequence[str],
        split: str,
        root: str | None,
        broken: list[str],
        alpha: bool = False,
) -> list[Part]:
    """Files first, and in their order, with their transparency if `alpha`; then what is no file."""
    named = [s for s in sources if not os.path.lexists(s) and (s == DIGITS or s.startswith(_PREFIXES))]
    entries, wrong = find_pictures([s for s in sources if s not in named])
    broken += wrong
    parts: list[Part] = [Files(entries, '', split, alpha=alpha)] if entries else []
    return parts + [open_source(s, split, root, '', broken) for s in named]


def _split_folder(root: str, split: str) -> str:
    """The subfolder of a split, as timm looks for it, else the folder itself."""
    name = split.split('[')[0]
    names = next((synonyms for synonyms in _SPLITS.values() if name in synonyms), ())
    return next((p for p in (os.path.join(root, n) for n in (name, *names)) if os.path.isdir(p)), root)
