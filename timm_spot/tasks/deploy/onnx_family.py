"""Exported files among the models that commands take: `predict --model m.onnx`, `evaluate --model m.onnx`.

Torch holds the pictures and the scores; what is between pixels and logits is ONNX Runtime's.
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...models.placement import SAMPLED
from ..evaluation import rows
from ..evaluation.families import Family, register_family
from ..evaluation.request import Request
from ..evaluation.ways import ImageBatch, Way
from ..pictures.images import model_normalization
from .onnx_model import OnnxModel


class OnnxClassifier(nn.Module):
    """An `OnnxModel` in the place of a model: normalised images (B, C, H, W) to logits (B, classes).

    Args:
        file: The exported file.
        n_tokens: Budget, where the file takes one; by default its own.
    """

    def __init__(self, file: OnnxModel, n_tokens: int | None = None) -> None:
        super().__init__()
        info = file.info
        self.file = file
        self.num_classes, self.in_chans, self.class_names = len(info.class_names), info.channels, info.class_names
        self.pretrained_cfg = dict(
            info.config, architecture=info.model, num_classes=self.num_classes, label_names=info.label_names)
        # By which evaluations tell its weights from those of other files.
        digest = hashlib.sha256(Path(file.path).read_bytes()).digest()
        self.register_buffer('digest', torch.frombuffer(bytearray(digest), dtype=torch.uint8))
        self.set_budget(n_tokens)

    def set_budget(self, n_tokens: int | None) -> None:
        """Choose the budget of calls that name none.

        Raises:
            ValueError: The file has no such budget.
        """
        info = self.file.info
        self.file.feed(np.zeros((1, info.channels, *info.image_size), np.uint8), n_tokens)
        self.n_tokens = n_tokens

    def forward(self, images: torch.Tensor, n_tokens: int | None = None) -> torch.Tensor:
        if self.file.info.images == 'uint8':
            images = (255 * model_normalization(self).undo(images)).round().to(torch.uint8)
        logits = self.file(images.cpu().numpy(), self.n_tokens if n_tokens is None else n_tokens)
        return torch.from_numpy(logits).to(images.device)

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` gives is behind the head already."""
        return x


def open_classifier(path: str | Path, n_tokens: int | None = None) -> OnnxClassifier:
    """An exported file as a model.

    Raises:
        FileNotFoundError, ValueError: See `OnnxModel`.
    """
    return OnnxClassifier(OnnxModel(path, threads=torch.get_num_threads()), n_tokens)


def _ways(model: OnnxClassifier, request: Request) -> Iterator[Way]:
    """The file's own placement at each budget; one that it has not is refused here already."""
    info = model.file.info
    if request.amp:
        raise ValueError(f'amp={request.amp!r}: {model.file.path.name} has the precision in which it was exported.')
    kind, name = (rows.SAMPLER, info.sampler) if info.placer == SAMPLED else (rows.PLACER, info.placer)
    for n in request.budgets if info.takes_budgets else (None,):
        model.set_budget(n)
        yield Way(
            kind, name, n or info.n_tokens, partial(_classified, n_tokens=n), has_knn=False, can_prune=False,
            coverage=info.coverage, flops=info.count_flops(n or info.n_tokens))


def _classified(model: OnnxClassifier, batch: ImageBatch, n_tokens: int | None) -> torch.Tensor:
    return model(batch.images, n_tokens)


register_family(Family(
    name='frozen', patterns=(), suits=lambda model: isinstance(model, OnnxClassifier), ways=_ways, kinds=(),
    set_budget=lambda model, n_tokens: model.set_budget(n_tokens), tokens='placement is part of its file'))
