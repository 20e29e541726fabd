"""Data sets to evaluate on: whatever timm opens, or the shipped digit canvases; decoded once.

Pictures are read by `Pictures` instead of timm's own dataset, which puts the next picture into the place of one that
cannot be read. `Decoded` keeps what the model's transform makes of them as bytes in files, so that every placement and
budget reads pixels, and a run that was killed goes on.
"""
from __future__ import annotations

import hashlib
from pathlib import Path
from typing import List, Optional, Tuple

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_dataset, infer_imagenet_subset
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from .digits import draw_canvases, load_digits
from .images import to_rgb

DIGITS = 'digits'
_CANVASES_PER_DIGIT = dict(held_out=10, train=2)
_PREFIXES = ('hfds/', 'hfids/', 'tfds/', 'wds/', 'torch/')


class Pictures(Dataset):
    """Pictures and labels of a data set, as PIL images.

    Args:
        source: 'digits', a folder or tar of pictures, or a name of timm's `create_dataset` with its prefix, such as
            `hfds/cifar10`.
        split: As timm has it; of the digits the training part, or else the held-out one.
        root: Folder for a name with a prefix.
        class_map: File of class names, one a line in the order of the classes, for a folder or tar.

    Attributes:
        groups: (M,), which pictures have one origin (canvases of one digit); None where each has its own.
        class_to_idx: Names of the classes and their numbers, where the data set has names.

    Raises:
        FileNotFoundError: There is no such folder or tar.
    """

    def __init__(self, source: str, split: str = 'validation', root: Optional[str] = None, class_map: str = '') -> None:
        self.source = source
        self.groups: Optional[torch.Tensor] = None
        if source == DIGITS:
            part = 'train' if split == 'train' else 'held_out'
            digits, labels = load_digits(part)
            times = _CANVASES_PER_DIGIT[part]
            generator = torch.Generator().manual_seed(1)  # the canvases of the model card
            self.canvases = torch.cat([draw_canvases(digits, generator) for _ in range(times)])
            self.labels = labels.repeat(times).tolist()
            self.groups = torch.arange(len(digits)).repeat(times)
            self.class_to_idx = {str(i): i for i in range(10)}
            self.dataset = None
            return
        if source.startswith(_PREFIXES):
            self.dataset = create_dataset(source, root=root, split=split)
        else:
            if not Path(source).exists():
                raise FileNotFoundError(
                    f"there is no folder or tar {source}; data sets by name start with {', '.join(_PREFIXES)}.")
            self.dataset = create_dataset('', root=source, split=split, class_map=class_map)
        reader = getattr(self.dataset, 'reader', self.dataset)
        names = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
        self.class_to_idx = dict(names or {})

    @property
    def is_stream(self) -> bool:
        """Whether the pictures can only be read in order."""
        return isinstance(self.dataset, IterableDataset)

    def __len__(self) -> int:
        return len(self.labels) if self.dataset is None else len(self.dataset)

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        """Picture in RGB and label.

        Raises:
            ValueError: The file is no picture, or is damaged; names the file.
        """
        if self.dataset is None:
            return Image.fromarray(self.canvases[index].numpy()).convert('RGB'), self.labels[index]
        reader = getattr(self.dataset, 'reader', None)
        if reader is None:
            picture, label = self.dataset[index]
            return to_rgb(picture), label
        try:
            file, label = reader[index][:2]
            with file, Image.open(file) as picture:
                return to_rgb(picture), label
        except (OSError, SyntaxError, ValueError) as e:  # PIL raises SyntaxError for broken PNG
            raise ValueError(f'{self.name(index)} is no picture that can be read: {e}.') from e

    def name(self, index: int) -> str:
        """File of a picture, where it has one, else its number."""
        if hasattr(self.dataset, 'reader'):
            return self.dataset.filename(index, absolute=True)
        return f'{self.source} {index}'

    def digest(self) -> str:
        """SHA-256 of what the data set lists: names and labels, or the canvases; of a stream its name only."""
        digest = hashlib.sha256()
        if self.dataset is None:
            digest.update(self.canvases.numpy().tobytes())
        elif hasattr(self.dataset, 'reader') and hasattr(self.dataset.reader, 'samples'):
            reader = self.dataset.reader
            labels = reader.targets if hasattr(reader, 'targets') else [label for _, label in reader.samples]
            for i, label in enumerate(labels):
                digest.update(f'{self.dataset.filename(i)}\0{label}\n'.encode())
        else:
            digest.update(f'{self.source} {"" if self.is_stream else len(self)}'.encode())
        return digest.hexdigest()[:12]


def check_classes(pictures: Pictures, model: nn.Module) -> None:
    """Check that a data set has as many classes as a model's classifier, as far as both say.

    Raises:
        ValueError: It has not; names the missing ones where the model knows them.
    """
    found, wanted = pictures.class_to_idx, _class_names(model)
    if not found or not model.num_classes:
        return
    missing = sorted(set(wanted) - set(found))
    if len(found) != model.num_classes:
        said = f" (missing: {', '.join(missing[:5])})" if wanted and set(found) < set(wanted) else ''
        raise ValueError(
            f'{pictures.source} has {len(found)} classes, the model {model.num_classes}{said}: labels would be wrong. '
            'Every class needs its folder, or give --class-map.')


def _class_names(model: nn.Module) -> List[str]:
    """Names that the folders of a model's classes have; none where the model does not say."""
    names = model.pretrained_cfg.get('label_names')
    if names:
        return list(names)
    subset = infer_imagenet_subset(model)
    return ImageNetInfo(subset).label_names() if subset else []

