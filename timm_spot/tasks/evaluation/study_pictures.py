"""The pictures of a study: digit canvases, or some of a data set's, with their labels."""
from __future__ import annotations

import hashlib
from typing import Callable, Dict

import torch
from torch import nn

from ..pictures.datasets import DIGITS, Pictures, check_classes
from ..pictures.digits import draw_canvases, load_digits, to_input
from ..pictures.images import model_transform


class StudyPictures:
    """Pictures that every model of a study sees, each by its own transform.

    Args:
        labels: (B,), class numbers.
        load: From a model to the images (B, C, H, W), normalised as it takes them.
        digest: Of the pictures and labels, by which kept searches are found.

    Attributes:
        labels: Likewise.
        digest: Likewise.
    """

    def __init__(self, labels: torch.Tensor, load: Callable[[nn.Module], torch.Tensor], digest: str) -> None:
        self.labels, self.digest = labels, digest
        self._load = load
        self._loaded: Dict[str, torch.Tensor] = {}  # by transform: models often share one

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, model: nn.Module) -> torch.Tensor:
        """(B, C, H, W), normalised, on the CPU."""
        key = str(model_transform(model))
        if key not in self._loaded:
            self._loaded[key] = self._load(model)
        return self._loaded[key]


def open_study_pictures(source: str, count: int, class_map: str = '') -> StudyPictures:
    """One canvas of each of the first `count` held-out digits, or `count` pictures spread evenly over a data set.

    Args:
        source: 'digits', or a folder or tar of pictures, a subfolder for each class.
        count: Pictures; all of a data set that has fewer.
        class_map: File of class names, one a line in the order of the classes.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: A data set of fewer than two pictures, or a stream.
    """
    if source == DIGITS:
        digits, labels = load_digits('held_out')
        canvases = draw_canvases(digits[:count], torch.Generator().manual_seed(3))
        return StudyPictures(
            labels[:count], lambda model: to_input(canvases, model), hashlib.sha256(canvases.numpy()).hexdigest()[:12])
    pictures = Pictures(source, class_map=class_map)
    if pictures.is_stream or len(pictures) < 2:
        raise ValueError(f'{source} must have two pictures at least, which can be read in any order.')
    count = min(count, len(pictures))
    numbers = torch.linspace(0, len(pictures) - 1, count, dtype=torch.float64).round().long().tolist()
    return _read(pictures, numbers)


def _read(pictures: Pictures, numbers: list[int]) -> StudyPictures:
    found = [pictures[i] for i in numbers]

    def load(model: nn.Module) -> torch.Tensor:
        check_classes(pictures, model)
        transform = model_transform(model)
        return torch.stack([transform(picture) for picture, _ in found])

    digest = hashlib.sha256(f'{pictures.digest()} {numbers}'.encode())
    return StudyPictures(torch.tensor([label for _, label in found]), load, digest.hexdigest()[:12])
