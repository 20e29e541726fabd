"""A data set decoded once, as bytes in files, so that every placement and budget reads pixels.

`Decoded` keeps what the model's transform makes of pictures; a run that was killed goes on.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from ..kept import KeptParts, whole_file
from ..processes import Processes
from .datasets import Loaded, Pictures, Transformed
from .files import printable
from .images import model_normalization, model_transform


class Batch(NamedTuple):
    """Decoded pictures of one part of a data set: uint8 (B, C, H, W), labels (B,), numbers in the data set (B,)."""

    pixels: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor


class Decoded:
    """A data set as a model's transform leaves it before normalisation, in a kept part for each batch.

    Every process decodes its share of the batches, and later computes on that share: no picture counts twice, whatever
    the number of processes. A batch is the same whoever computes it.

    Args:
        pictures: The data set.
        model: Whose data config says how pictures are resized, cropped and normalised.
        folder: For a folder of parts, named after all that determines them; 150 kB a picture at 224 px.
        batch_size: Pictures in a file, and in a forward pass.
        processes: Of this run.
        skip_broken: Leave out pictures that cannot be read; else they are an error.
        workers: Processes that decode.

    Attributes:
        parts: Where the batches lie. Whoever holds the lock of `folder` may remove what else lies in it.
        broken: After `decode`, what is wrong with the pictures left out.

    Raises:
        ValueError: A stream that several processes are to share, or a model of other channels than pictures have.
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
        self.transform, self.normalize = model_transform(model, normalize=False), model_normalization(model)
        self.pictures, self.batch_size, self.processes = pictures, batch_size, processes
        self.skip_broken, self.workers = skip_broken, workers
        key = dict(
            source=pictures.source, pictures=pictures.digest(), transform=str(self.transform), batch_size=batch_size)
        self.parts = KeptParts(folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12], key)
        self.count = 0 if pictures.is_stream else -(-len(pictures) // batch_size)
        self.broken: list[str] = []
        if pictures.is_stream and processes.count > 1:
            raise ValueError(
                f'{pictures.source} is a stream, which several processes cannot share without counting pictures '
                'twice: use one process, or a data set with random access (a folder, a tar, hfds/...).')

    def decode(self, progress: Callable[[int], Any]) -> None:
        """Decode what no file holds yet.

        Args:
            progress: Called with the number of pictures whenever some are done by this process, or found done.

        Raises:
            ValueError: A picture cannot be read, and `skip_broken` is off; or none can.
        """
        if self.processes.is_main:
            self.parts.open()
        self.processes.gather([None])  # the others write after that
        broken = list(self.pictures.broken) if self.processes.is_main else []
        self._refuse(broken)
        if self.pictures.is_stream:
            self._decode_stream(progress)
        else:
            own = range(self.processes.rank, self.count, self.processes.count)
            missing = [b for b in own if self._read_broken(b) is None]
            rows = [self._rows(b) for b in missing]
            progress(sum(len(self._rows(b)) for b in own if b not in missing))
            loader = DataLoader(
                Transformed(self.pictures, self.transform), batch_sampler=rows, num_workers=self.workers,
                collate_fn=list)
            for b, loaded in zip(missing, loader):
                self._write(b, loaded)
                progress(len(loaded))
        for b in range(self.processes.rank, self.count, self.processes.count):
            broken += self._read_broken(b) or []
        self._refuse(broken)
        self.broken = self.processes.gather(broken)
        if not self.count or len(self.broken) - len(self.pictures.broken) == len(self.pictures) > 0:
            said = f': {self.broken[0]}' if self.broken else '.'
            raise ValueError(f'{printable(self.pictures.source)} holds no picture that can be read{said}')

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this process."""
        for b in range(self.processes.rank, self.count, self.processes.count):
            with safe_open(self.parts.file(b), framework='pt') as file:
                batch = Batch(*(file.get_tensor(name) for name in Batch._fields))
            if len(batch.index):
                yield batch

    def _rows(self, b: int) -> range:
        return range(b * self.batch_size, min((b + 1) * self.batch_size, len(self.pictures)))

    def _read_broken(self, b: int) -> list[str] | None:
        """What is wrong with the pictures that a batch lacks; None where it is still to be made, or damaged."""
        try:
            with safe_open(self.parts.file(b), framework='pt') as file:
                found = (file.metadata() or {}).get('broken')
        except (FileNotFoundError, SafetensorError):
            return None
        return None if found is None else json.loads(found)

    def _refuse(self, broken: list[str]) -> None:
        if broken and not self.skip_broken:
            raise ValueError(f'{broken[0]} --skip-broken leaves such pictures out, and lists them.')

    def _decode_stream(self, progress: Callable[[int], Any]) -> None:
        loaded: list[Loaded] = []
        for i, (picture, label) in enumerate(self.pictures):
            loaded.append(Loaded(i, self.transform(picture), label, ''))
            progress(1)
            if len(loaded) == self.batch_size:
                self._write(self.count, loaded)
                self.count, loaded = self.count + 1, []
        if loaded:
            self._write(self.count, loaded)
            self.count += 1

    def _write(self, b: int, loaded: list[Loaded]) -> None:
        good = [one for one in loaded if not one.broken]
        broken = [one.broken for one in loaded if one.broken]
        self._refuse(broken)
        size = good[0].image.shape if good else (3, 0, 0)
        tensors = dict(
            pixels=torch.stack([one.image for one in good]) if good else torch.empty(0, *size, dtype=torch.uint8),
            labels=torch.tensor([one.label for one in good], dtype=torch.long),
            index=torch.tensor([one.index for one in good], dtype=torch.long))
        with whole_file(self.parts.file(b)) as partial:
            save_file(tensors, partial, metadata=dict(broken=json.dumps(broken)))
