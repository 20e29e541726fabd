"""From images to class names and probabilities."""
from __future__ import annotations

from typing import List, NamedTuple, Sequence

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn


class ClassScore(NamedTuple):
    label: int
    name: str
    probability: float


def class_names(model: nn.Module) -> List[str]:
    """Names of a model's classes: its config's own, else timm's ImageNet tables, else the numbers."""
    names = model.pretrained_cfg.get('label_names')
    if names and len(names) == model.num_classes:
        return list(names)
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [str(i) for i in range(model.num_classes)]


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor, names: Sequence[str], topk: int = 5) -> List[List[ClassScore]]:
    """The most probable classes of each image.

    Args:
        model: A classifier in eval mode.
        images: (B, C, H, W), normalised.
        names: One for each class, see `class_names`.
        topk: Classes to return, at most all.

    Returns:
        For each image its classes, most probable first.
    """
    probabilities, labels = model(images).softmax(dim=1).topk(min(topk, len(names)), dim=1)
    return [
        [ClassScore(label, names[label], probability) for probability, label in zip(p, row)]
        for p, row in zip(probabilities.tolist(), labels.tolist())]
