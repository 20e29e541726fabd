"""Pictures of every command: files, folders, tars, data sets that timm opens by name, or the shipped digit canvases.

Pictures are read by `read_picture` instead of timm's own data sets, which put the next picture into the place of one
that cannot be read.
"""
from __future__ import annotations

import abc
import bisect
import functools
import hashlib
import os
import warnings
from itertools import accumulate
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from .classes import check_classes as check_classes
from .classes import load_class_map
from .digits import draw_canvases, load_digits
from .files import Entry, find_pictures, list_source, natural_order, printable
from .images import PictureError, read_picture, to_upright_rgb

DIGITS = 'digits'
NO_LABEL = -1
_CANVASES_PER_DIGIT = dict(held_out=10, train=2)
_PREFIXES = ('hfds/', 'hfids/', 'tfds/', 'wds/', 'torch/')
_SPLITS = dict(train=('train', 'training'), validation=('validation', 'val', 'valid', 'eval', 'evaluation'))


class Pictures(Dataset):
    """Pictures and labels, as PIL images in RGB, upright.

    Args:
        source: A data set: 'digits', a folder or tar of pictures, a single file or glob pattern, or a name of timm's
            `create_dataset` with its prefix, such as `hfds/cifar10`. Or several of them: then pictures without labels,
            all of a folder whatever its splits; what names nothing is told in `broken`, and files come before names.
        split: As timm has it: of a data set by name, or a subfolder of that name where there is one. Of the digits the
            training part, or else the held-out one.
        root: Folder for a name with a prefix.
        class_map: File of class names, one a line in the order of the classes, for a folder, a tar or hfds/.

    Attributes:
        groups: (M,), which pictures have one origin (canvases of one digit); None where each has its own.
        class_to_idx: Names of the classes and their numbers, where the data set has names.
        has_labels: Whether pictures have labels; else they are -1.
        is_named: Whether the data set numbers its classes itself, instead of by the names of their folders.
        broken: What is wrong with sources, or folders in them, that could not be searched.

    Raises:
        FileNotFoundError: There is no such file, folder or class map, or no picture in it.
        ValueError: A damaged tar, or a class map that is none or fits no folder.
    """

    def __init__(
            self,
            source: Union[str, Sequence[str]],
            split: str = 'validation',
            root: Optional[str] = None,
            class_map: str = '',
    ) -> None:
        source = os.fspath(source) if isinstance(source, os.PathLike) else source
        several = not isinstance(source, str)
        self.source = ' '.join(map(str, source)) if several else source
        self.split, self.root, self.class_map = split, root, class_map
        self.broken: List[str] = []
        self.groups: Optional[torch.Tensor] = None
        self.class_to_idx: Dict[str, int] = {}
        if several:
            self._parts, self.is_named = _open_several(source, split, root, self.broken), False
        else:
            self.is_named = source == DIGITS or (source.startswith(_PREFIXES) and source != 'torch/image_folder')
            part = _open(source, split, root, class_map, self.broken)
            self._parts, self.groups, self.class_to_idx = [part], part.groups, part.class_to_idx
        self.has_labels = not several and self._parts[0].has_labels
        self._ends = list(accumulate(len(part) for part in self._parts))

    @property
    def is_stream(self) -> bool:
        """Whether the pictures can only be read in order."""
        return any(part.is_stream for part in self._parts)

    @property
    def canvases(self) -> torch.Tensor:
        """The canvases (M, 64, 64) of 'digits', uint8."""
        return self._parts[0].canvases

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        """Picture and label.

        Raises:
            PictureError: The file is no picture, or is damaged; names the file.
        """
        part, i = self._find(index)
        picture, label = part.read(i)
        return picture, label if self.has_labels else NO_LABEL

    def __iter__(self) -> Iterator[Tuple[Image.Image, int]]:
        """Pictures and labels in order: the only way to read a stream.

        Raises:
            PictureError: See `__getitem__`.
        """
        for part in self._parts:
            for picture, label in part:
                yield picture, label if self.has_labels else NO_LABEL

    def name(self, index: int) -> str:
        """File of a picture, where it has one, else its number."""
        if self.is_stream:
            return f'{self.source} {index}'
        part, i = self._find(index)
        return part.name(i)

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for part in self._parts:
            part.feed(digest.update)
        return digest.hexdigest()[:12]

    def digest(self) -> str:
        """SHA-256 of what determines the pictures and labels, as it was when it was first asked for.

        Of files their names, labels, sizes and times of change; with them split, root and class map. Of the digits the
        canvases alone. Of a stream its name, split and root.
        """
        return self._digest

    def _find(self, index: int) -> Tuple[_Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(f'picture {index} of {len(self)}')
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)


def _open(source: str, split: str, root: Optional[str], class_map: str, broken: List[str]) -> _Part:
    """One data set."""
    if source == DIGITS:
        return _Canvases('train' if split == 'train' else 'held_out')
    if source.startswith(_PREFIXES):
        classes = load_class_map(class_map, root or '') if class_map else None
        if classes is not None and source.startswith('torch/'):
            raise ValueError(
                f'class_map={printable(class_map)} is of no use to {source}, which numbers its classes itself.')
        return _Named(source, split, root, classes)
    folder = _split_folder(source, split)
    if not os.path.lexists(folder) and not any(c in folder for c in '*?['):
        raise FileNotFoundError(
            f"there is no folder or tar {printable(source)}; data sets by name start with {', '.join(_PREFIXES)}.")
    entries = list_source(folder, broken.append)
    if not class_map:
        return _Files(entries, folder, split)
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
    return _Files(kept, folder, split, classes)


def _open_several(sources: Sequence[str], split: str, root: Optional[str], broken: List[str]) -> List[_Part]:
    """Files first, and in their order; then what is no file."""
    named = [s for s in sources if not os.path.lexists(s) and (s == DIGITS or s.startswith(_PREFIXES))]
    entries, wrong = find_pictures([s for s in sources if s not in named])
    broken += wrong
    parts: List[_Part] = [_Files(entries, '', split)] if entries else []
    return parts + [_open(s, split, root, '', broken) for s in named]


def _split_folder(root: str, split: str) -> str:
    """The subfolder of a split, as timm looks for it, else the folder itself."""
    name = split.split('[')[0]
    names = next((synonyms for synonyms in _SPLITS.values() if name in synonyms), ())
    return next((p for p in (os.path.join(root, n) for n in (name, *names)) if os.path.isdir(p)), root)


# ---------------------------------------------------------------------------------------------------------------------
# What pictures come from: each kind reads one, names it and feeds the digest


class _Part(abc.ABC):
    """Pictures of one source.

    Attributes:
        groups, class_to_idx, has_labels: See `Pictures`.
        is_stream: Whether they can only be read in order.
    """

    groups: Optional[torch.Tensor] = None
    class_to_idx: Dict[str, int] = {}
    has_labels = True
    is_stream = False

    @abc.abstractmethod
    def __len__(self) -> int:
        ...

    def __iter__(self) -> Iterator[Tuple[Image.Image, int]]:
        return (self.read(i) for i in range(len(self)))

    @abc.abstractmethod
    def read(self, index: int) -> Tuple[Image.Image, int]:
        ...

    @abc.abstractmethod
    def name(self, index: int) -> str:
        ...

    @abc.abstractmethod
    def feed(self, update: Callable[[bytes], Any]) -> None:
        """Give a digest all that determines the pictures and their labels."""


class _Canvases(_Part):
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

    def read(self, index: int) -> Tuple[Image.Image, int]:
        return Image.fromarray(self.canvases[index].numpy()).convert('RGB'), self.labels[index]

    def name(self, index: int) -> str:
        return f'{DIGITS} {index}'

    def feed(self, update: Callable[[bytes], Any]) -> None:
        update(self.canvases.numpy().tobytes())


class _Files(_Part):
    """Files, or members of tars; their classes are numbered by the natural order of their names, as timm does."""

    def __init__(
            self,
            entries: List[Entry],
            root: str,
            split: str,
            class_to_idx: Optional[Dict[str, int]] = None,
    ) -> None:
        names = sorted({entry.folder for entry in entries}, key=natural_order)
        self.has_labels = class_to_idx is not None or names != ['']
        if class_to_idx is None and self.has_labels:
            class_to_idx = {name: i for i, name in enumerate(names)}
        self.entries, self.root, self.split, self.class_to_idx = entries, root, split, class_to_idx or {}

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> Tuple[Image.Image, int]:
        entry = self.entries[index]
        try:
            file = entry.open()
        except OSError as e:
            raise PictureError(f'{printable(entry.name)} cannot be read: {e.strerror}.') from e
        except ValueError as e:
            raise PictureError(f'{printable(entry.name)} cannot be used: {e}.') from e
        return read_picture(file, entry.name), self.class_to_idx.get(entry.folder, NO_LABEL)

    def name(self, index: int) -> str:
        return self.entries[index].name

    def feed(self, update: Callable[[bytes], Any]) -> None:
        update(f'{self.split}\0{sorted(self.class_to_idx.items())!r}\n'.encode('utf-8', 'surrogateescape'))
        tars: Dict[str, str] = {}
        for entry in self.entries:
            if entry.size is None or entry.file not in tars:
                tars[entry.file] = _change(entry.file)
            name = os.fsencode(os.path.relpath(entry.name, self.root) if self.root else entry.name)
            label = self.class_to_idx.get(entry.folder, NO_LABEL)
            update(name + f'\0{label}\0{entry.start}\0{tars[entry.file]}\n'.encode())


class _Named(_Part):
    """What timm's `create_dataset` opens by a name with a prefix."""

    def __init__(self, source: str, split: str, root: Optional[str], class_to_idx: Optional[Dict[str, int]]) -> None:
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

    def __iter__(self) -> Iterator[Tuple[Image.Image, int]]:
        if not self.is_stream:
            yield from super().__iter__()
            return
        for i, (picture, label) in enumerate(self.dataset):
            yield _converted(picture, f'{self.source} {i}'), int(label)

    def read(self, index: int) -> Tuple[Image.Image, int]:
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
