"""Pictures of every command: files, folders, tars, data sets that timm opens by name, or the shipped digit canvases."""
from __future__ import annotations

import bisect
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from .classes import check_classes as check_classes
from .images import PictureError
from .sources import DIGITS as DIGITS
from .sources import NO_LABEL, Part, is_named, open_several, open_source


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
        alpha: Of several sources, read pictures in files in RGBA where they are transparent somewhere.

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
            source: str | Sequence[str],
            split: str = 'validation',
            root: str | None = None,
            class_map: str = '',
            alpha: bool = False,
    ) -> None:
        source = os.fspath(source) if isinstance(source, os.PathLike) else source
        several = not isinstance(source, str)
        self.source = ' '.join(map(str, source)) if several else source
        self.split, self.root, self.class_map = split, root, class_map
        self.broken: list[str] = []
        self.groups: torch.Tensor | None = None
        self.class_to_idx: dict[str, int] = {}
        if several:
            self._parts, self.is_named = open_several(source, split, root, self.broken, alpha), False
        else:
            self.is_named = is_named(source)
            part = open_source(source, split, root, class_map, self.broken)
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

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Picture and label.

        Raises:
            PictureError: The file is no picture, or is damaged; names the file.
        """
        part, i = self._find(index)
        picture, label = part.read(i)
        return picture, label if self.has_labels else NO_LABEL

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
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

    def _find(self, index: int) -> tuple[Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(f'picture {index} of {len(self)}')
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)


class Loaded(NamedTuple):
    """A picture as a model takes it, or what is wrong with it."""

    index: int
    image: torch.Tensor | None
    label: int
    broken: str


class Transformed(Dataset):
    """Pictures through a transform; one that cannot be read is an entry that says so."""

    def __init__(self, pictures: Pictures, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __getitem__(self, index: int) -> Loaded:
        try:
            picture, label = self.pictures[index]
        except PictureError as e:
            return Loaded(index, None, -1, str(e))
        return Loaded(index, self.transform(picture), int(label), '')
