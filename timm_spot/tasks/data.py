"""Data sets to evaluate on: whatever timm opens, or the shipped digit canvases; decoded once.

Pictures are read by `Pictures` instead of timm's own dataset, which puts the next picture into the place of one that
cannot be read. `Decoded` keeps what the model's transform makes of them as bytes in files, so that every placement and
budget reads pixels, and a run that was killed goes on.
"""
from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data import ImageNetInfo, create_dataset, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .digits import draw_canvases, load_digits
from .predict import to_rgb
from .processes import Processes

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


class Batch(NamedTuple):
    """Decoded pictures of one part of a data set: uint8 (B, C, H, W), labels (B,), numbers in the data set (B,)."""

    pixels: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor


class Decoded:
    """A data set as a model's transform leaves it before normalisation, in a file for each batch.

    Every process decodes its share of the batches, and later computes on that share: no picture counts twice, whatever
    the number of processes. A batch is the same whoever computes it.

    Args:
        pictures: The data set.
        model: Whose data config says how pictures are resized, cropped and normalised.
        folder: For the files; 150 kB a picture at 224 px.
        batch_size: Pictures in a file, and in a forward pass.
        processes: Of this run.
        skip_broken: Leave out pictures that cannot be read; else they are an error.
        workers: Processes that decode.

    Attributes:
        broken: After `decode`, what is wrong with the pictures left out.
    """

    def __init__(
            self,
            pictures: Pictures,
            model: nn.Module,
            folder: Path,
            batch_size: int,
            processes: Processes,
            skip_broken: bool = False,
            workers: int = 0,
    ) -> None:
        config = resolve_model_data_config(model)
        self.transform = create_transform(**config, is_training=False, use_prefetcher=True)
        self.mean, self.std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
        self.pictures, self.batch_size, self.processes = pictures, batch_size, processes
        self.skip_broken, self.workers = skip_broken, workers
        key = json.dumps([pictures.source, pictures.digest(), str(self.transform), batch_size])
        self.folder = folder / hashlib.sha256(key.encode()).hexdigest()[:12]
        self.count = 0 if pictures.is_stream else -(-len(pictures) // batch_size)
        self.broken: List[str] = []
        if pictures.is_stream and processes.count > 1:
            raise ValueError(
                f'{pictures.source} is a stream, which several processes cannot share without counting pictures '
                'twice: use one process, or a data set with random access (a folder, a tar, hfds/...).')

    def decode(self, progress: Callable[[int], Any]) -> None:
        """Decode what no file holds yet.

        Args:
            progress: Called with the number of pictures whenever some are done by this process, or found done.

        Raises:
            ValueError: A picture cannot be read, and `skip_broken` is off.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.pictures.is_stream:
            self._decode_stream(progress)
        else:
            own = range(self.processes.rank, self.count, self.processes.count)
            missing = [b for b in own if not self._file(b).exists()]
            rows = [self._rows(b) for b in missing]
            progress(sum(len(self._rows(b)) for b in own if b not in missing))
            loader = DataLoader(
                _Transformed(self.pictures, self.transform), batch_sampler=rows, num_workers=self.workers,
                collate_fn=list)
            for b, loaded in zip(missing, loader):
                self._write(b, loaded)
                progress(len(loaded))
        broken = []
        for b in range(self.processes.rank, self.count, self.processes.count):
            with safe_open(self._file(b), framework='pt') as file:
                broken += json.loads(file.metadata()['broken'])
        if broken and not self.skip_broken:
            raise ValueError(f'{broken[0]} --skip-broken leaves such pictures out, and lists them.')
        self.broken = self.processes.gather(broken)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this process."""
        for b in range(self.processes.rank, self.count, self.processes.count):
            with safe_open(self._file(b), framework='pt') as file:
                batch = Batch(*(file.get_tensor(name) for name in Batch._fields))
            if len(batch.index):
                yield batch

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (..., C, H, W) of uint8 as the model takes them, by the very operations of timm's transform."""
        mean, std = self.mean.to(pixels.device), self.std.to(pixels.device)
        return (pixels.float() / 255 - mean) / std

    def _rows(self, b: int) -> range:
        return range(b * self.batch_size, min((b + 1) * self.batch_size, len(self.pictures)))

    def _file(self, b: int) -> Path:
        return self.folder / f'{b}.safetensors'

    def _decode_stream(self, progress: Callable[[int], Any]) -> None:
        loaded: List[_Loaded] = []
        for i, (picture, label) in enumerate(self.pictures.dataset):
            loaded.append(_Loaded(i, self.transform(to_rgb(picture)), int(label), ''))
            progress(1)
            if len(loaded) == self.batch_size:
                self._write(self.count, loaded)
                self.count, loaded = self.count + 1, []
        if loaded:
            self._write(self.count, loaded)
            self.count += 1

    def _write(self, b: int, loaded: List[_Loaded]) -> None:
        good = [one for one in loaded if not one.broken]
        broken = [one.broken for one in loaded if one.broken]
        if broken and not self.skip_broken:
            raise ValueError(f'{broken[0]} --skip-broken leaves such pictures out, and lists them.')
        size = good[0].pixels.shape if good else (3, 0, 0)
        tensors = dict(
            pixels=torch.stack([one.pixels for one in good]) if good else torch.empty(0, *size, dtype=torch.uint8),
            labels=torch.tensor([one.label for one in good], dtype=torch.long),
            index=torch.tensor([one.index for one in good], dtype=torch.long))
        partial = self._file(b).with_suffix('.tmp')
        save_file(tensors, partial, metadata=dict(broken=json.dumps(broken)))
        os.replace(partial, self._file(b))


class _Loaded(NamedTuple):
    index: int
    pixels: Optional[torch.Tensor]
    label: int
    broken: str


class _Transformed(Dataset):
    """Pictures through a transform; one that cannot be read is an entry that says so."""

    def __init__(self, pictures: Pictures, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __getitem__(self, index: int) -> _Loaded:
        try:
            picture, label = self.pictures[index]
        except ValueError as e:
            return _Loaded(index, None, -1, str(e))
        return _Loaded(index, self.transform(picture), int(label), '')
