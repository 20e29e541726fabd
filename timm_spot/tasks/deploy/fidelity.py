"""How well a file with fewer bits answers as its model does, on pictures."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..pictures.classes import class_mismatch
from ..pictures.datasets import Pictures
from ..pictures.images import PictureError
from .onnx_info import EACH
from .onnx_model import OnnxModel

LOSS = 0.5  # points of accuracy that a file may lose
CHANGED = 3.  # percent of the answers that may differ where there are no labels
COSINE = 0.9  # of the logits on generated pictures, which at least it must have
MOST = 400  # pictures, evenly of all
BATCH = 16
_Z = 1.96


@dataclass(frozen=True)
class Fidelity:
    """How a file answers beside its model.

    Attributes:
        source: Of the pictures; '' for generated ones.
        pictures: How many.
        agreement: Percent of equal top-1 answers.
        cosine: Of the logits, mean.
        accuracy: Percent that the file answers right, where labels are known.
        model_accuracy: Percent that the model does.
        error: Of the difference of these two, one standard error.
    """

    source: str
    pictures: int
    agreement: float
    cosine: float
    accuracy: float | None = None
    model_accuracy: float | None = None
    error: float = 0.

    @property
    def verdict(self) -> str:
        """Why the file is not good enough, '' where it is: by the whole 95 % interval, so that no few pictures decide.
        """
        if not self.source:
            return '' if self.cosine >= COSINE else (
                f"on generated pictures the cosine of its logits to the model's is {self.cosine:.3f}, below {COSINE}")
        if self.accuracy is not None and self.model_accuracy is not None:
            loss = self.model_accuracy - self.accuracy
            return '' if loss - _Z * self.error <= LOSS else (
                f'it loses {loss:.1f} points of accuracy on {self.pictures} pictures, more than {LOSS}')
        changed = 100. - self.agreement
        error = math.sqrt(changed * self.agreement / self.pictures)
        return '' if changed - _Z * error <= CHANGED else (
            f'{changed:.1f} % of its answers on {self.pictures} pictures are not those of the model, more than '
            f'{CHANGED}')

    def __str__(self) -> str:
        where = f'{self.pictures} pictures of {self.source}' if self.source else (
            f'{self.pictures} generated pictures, which say little: give real ones')
        said = f'{self.agreement:.1f} % of the answers are those of the model, cosine of the logits {self.cosine:.4f}'
        if self.accuracy is not None:
            said += f', accuracy {self.accuracy:.1f} % (model {self.model_accuracy:.1f} %)'
        return f'{said}, on {where}'


def compare(model: nn.Module, file: OnnxModel, pictures: Pictures | None, first: int = 0, step: int = 1) -> Fidelity:
    """Compare a file with its model.

    Args:
        model: In eval mode, on the CPU, with the file's own placement.
        file: Of the model.
        pictures: To compare on; None for generated ones.
        first, step: Which of them: of a folder that scales were found on, the others.
    """
    ours, theirs, labels = [], [], []
    batches = _generated(model) if pictures is None else read_batches(file, pictures, first, step)
    with torch.inference_mode():
        for images, numbers in batches:
            tensors = model.patch_embed.normalize(torch.from_numpy(images))
            placement = model.place(tensors) if file.info.placement == EACH else None
            ours.append(model(tensors, placement))
            theirs.append(torch.from_numpy(file(images, positions=None if placement is None else placement.numpy())))
            labels += numbers
    if not ours:
        raise ValueError(f'{pictures.source} holds no picture that can be read.')
    own, read, right = torch.cat(ours), torch.cat(theirs), torch.tensor(labels)
    equal = (own.argmax(1) == read.argmax(1)).double()
    cosine = F.cosine_similarity(own, read).mean().item()
    source = pictures.source if pictures is not None else ''
    if pictures is None or not pictures.has_labels or class_mismatch(pictures, model):
        return Fidelity(source, len(own), 100 * equal.mean().item(), cosine)
    lost = (own.argmax(1) == right).double() - (read.argmax(1) == right).double()
    return Fidelity(
        source, len(own), 100 * equal.mean().item(), cosine, 100 * (read.argmax(1) == right).double().mean().item(),
        100 * (own.argmax(1) == right).double().mean().item(),
        100 * lost.std(correction=0).item() / math.sqrt(len(lost)))


def read_batches(
        file: OnnxModel,
        pictures: Pictures,
        first: int = 0,
        step: int = 1,
        most: int = MOST,
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """uint8 images (B, C, H, W) and labels, evenly of all pictures; those that cannot be read are left out."""
    chosen = range(first if first < len(pictures) else 0, len(pictures), step)
    chosen = [chosen[int(i)] for i in np.linspace(0, len(chosen) - 1, min(most, len(chosen)))]
    images: list[np.ndarray] = []
    labels: list[int] = []
    for i in chosen:
        try:
            picture, label = pictures[i]
        except PictureError:
            continue
        images.append(file.prepare(picture))
        labels.append(int(label))
        if len(images) == BATCH:
            yield np.stack(images), labels
            images, labels = [], []
    if images:
        yield np.stack(images), labels


def _generated(model: nn.Module) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Clouds of colour with some noise."""
    generator = torch.Generator().manual_seed(0)
    size = model.patch_embed.img_size
    for _ in range(4):
        clouds = torch.rand(BATCH, model.patch_embed.in_chans, 6, 6, generator=generator)
        images = F.interpolate(clouds, size, mode='bicubic')
        images = images + 0.05 * torch.randn(images.shape, generator=generator)
        yield (255 * images.clamp(0, 1)).to(torch.uint8).numpy(), [-1] * BATCH
