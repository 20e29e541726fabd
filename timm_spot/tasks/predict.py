"""From pictures to class names and probabilities."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from .pictures.classes import label_names
from .pictures.datasets import Pictures
from .pictures.digits import CANVAS
from .pictures.images import PictureError, model_transform

_DIGITS = [str(i) for i in range(10)]
_COLOURED = 16  # of 255, mean over the pixels: canvases and scans are grey


class ClassScore(NamedTuple):
    label: int
    name: str
    probability: float


class LoadedBatch(NamedTuple):
    """Pictures read for a model.

    Attributes:
        names: One for each picture.
        images: (B, C, H, W), normalised.
        foreign: Names of those that are clearly not what the model reads, see `looks_foreign`.
    """

    names: list[str]
    images: torch.Tensor
    foreign: list[str]


def read_batches(
        pictures: Pictures,
        model: nn.Module,
        batch_size: int,
        broken: list[str],
) -> Iterator[LoadedBatch]:
    """Pictures as a model takes them, in batches.

    Args:
        pictures: To read.
        model: Any timm model.
        batch_size: Pictures in a batch; some have fewer, where pictures cannot be read, but none is empty.
        broken: Gets what is wrong with pictures that cannot be read.
    """
    transform, digits_only = model_transform(model), reads_digits(model)
    batch: list[tuple[str, torch.Tensor, bool]] = []
    indices: Iterator = enumerate(pictures) if pictures.is_stream else ((i, None) for i in range(len(pictures)))
    for count, (i, streamed) in enumerate(indices, start=1):
        try:
            picture, _ = streamed or pictures[i]
        except PictureError as e:
            broken.append(str(e))
        else:
            batch.append((pictures.name(i), transform(picture), digits_only and looks_foreign(picture)))
        if batch and count % batch_size == 0:
            yield _collate(batch)
            batch = []
    if batch:
        yield _collate(batch)


def reads_digits(model: nn.Module) -> bool:
    """Whether a model's classes are the ten digits."""
    return label_names(model) == _DIGITS


def looks_foreign(picture: Image.Image) -> bool:
    """Whether a picture is clearly no canvas of a digit: more than twice its size, or coloured."""
    if max(picture.size) > 2 * CANVAS:
        return True
    pixels = np.asarray(picture, dtype=np.float32)
    return bool((pixels.max(axis=2) - pixels.min(axis=2)).mean() > _COLOURED)


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor, names: Sequence[str], topk: int = 5) -> list[list[ClassScore]]:
    """The most probable classes of each image.

    Args:
        model: A classifier in eval mode.
        images: (B, C, H, W), normalised.
        names: One for each class, see `pictures.classes.class_names`.
        topk: Classes to return, at most all.

    Returns:
        For each image its classes, most probable first.
    """
    probabilities, labels = model(images).softmax(dim=1).topk(min(topk, len(names)), dim=1)
    return [
        [ClassScore(label, names[label], probability) for probability, label in zip(p, row)]
        for p, row in zip(probabilities.tolist(), labels.tolist())]


def _collate(batch: Sequence[tuple[str, torch.Tensor, bool]]) -> LoadedBatch:
    names, images, foreign = zip(*batch)
    return LoadedBatch(list(names), torch.stack(images), [name for name, is_so in zip(names, foreign) if is_so])
