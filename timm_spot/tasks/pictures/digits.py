"""Digit canvases: real scanned handwriting at random places of a 64 x 64 canvas, among noise and stray strokes.

The digits are scikit-learn's `load_digits`, the test part of the UCI set `Optical Recognition of Handwritten Digits`
(1,797 digits of 8 x 8 pixels, https://doi.org/10.24432/C50P49). Most of a canvas is empty, so that it matters where
tokens lie; the shipped `spot_vit_pico_patch8_64.digits` is trained on them.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .images import model_normalization, picture_channels

CANVAS = 64
_STROKES = 4


def load_digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scanned digits of one split; every fifth digit is held out.

    Args:
        split: 'train' (1,438 digits) or 'held_out' (359).

    Returns:
        Digits (M, 8, 8) in [0, 1] and labels (M,).
    """
    if split not in ('train', 'held_out'):
        raise ValueError(f"split={split!r} must be 'train' or 'held_out'.")
    from sklearn import datasets  # extra `train`

    images, labels = datasets.load_digits(return_X_y=True)
    held_out = torch.arange(len(labels)) % 5 == 4
    keep = held_out if split == 'held_out' else ~held_out
    return torch.from_numpy(images).float().view(-1, 8, 8)[keep] / 16, torch.from_numpy(labels)[keep]


def draw_canvases(digits: torch.Tensor, generator: torch.Generator, distort: bool = False) -> torch.Tensor:
    """Put each digit on a canvas of its own.

    A digit is enlarged to 24-40 px and lies wholly inside the canvas; up to four strokes of 6-20 px and Gaussian
    noise are added.

    Args:
        digits: (B, 8, 8) in [0, 1].
        generator: Source of all randomness.
        distort: Turn, shear and stretch the digits a little, for training.

    Returns:
        Canvases (B, 64, 64), uint8.
    """
    B = digits.shape[0]

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(B, *shape).uniform_(low, high, generator=generator)

    side = uniform(24, 40, 1)
    centre = side / 2 + uniform(0, 1, 2) * (CANVAS - side)
    # Canvas pixels to the digit's square [-1, 1]^2.
    pixel = torch.stack(torch.meshgrid(torch.arange(CANVAS), torch.arange(CANVAS), indexing='xy'), dim=-1) + 0.5
    points = (pixel[None] - centre[:, None, None]) / (side[:, None, None] / 2)
    if distort:
        turn, shear = uniform(-0.3, 0.3), uniform(-0.2, 0.2)
        stretch = uniform(0.85, 1.15, 2)
        matrix = torch.stack([
            torch.stack([turn.cos(), -turn.sin() + shear], dim=-1),
            torch.stack([turn.sin(), turn.cos()], dim=-1)], dim=1) * stretch[:, None]
        points = torch.einsum('bhwc,bdc->bhwd', points, matrix)
    ink = F.grid_sample(digits[:, None], points, mode='bicubic', padding_mode='zeros', align_corners=False)[:, 0]
    canvas = ink.clamp(0, 1) * uniform(0.7, 1.0, 1, 1)

    start = uniform(0, CANVAS, _STROKES, 2)
    angle, length = uniform(0, 2 * math.pi, _STROKES), uniform(6, 20, _STROKES)
    step = torch.stack([angle.cos(), angle.sin()], dim=-1) * length[..., None]
    strength = uniform(0.4, 0.9, _STROKES) * (uniform(0, 1, _STROKES) < 0.75)
    width = uniform(0.5, 1.2, _STROKES)
    for i in range(_STROKES):
        offset = pixel[None] - start[:, i, None, None]
        along = (offset * step[:, i, None, None]).sum(-1) / length[:, i, None, None].square()
        distance = (offset - along.clamp(0, 1)[..., None] * step[:, i, None, None]).norm(dim=-1)
        stroke = (width[:, i, None, None] + 0.5 - distance).clamp(0, 1) * strength[:, i, None, None]
        canvas = torch.maximum(canvas, stroke)

    noise = torch.empty(B, CANVAS, CANVAS).normal_(0, 0.08, generator=generator)
    return ((canvas + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def to_input(canvases: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Canvases (B, 64, 64) of uint8 to the input (B, C, 64, 64) that a model's own transform makes of such pictures."""
    return model_normalization(model)(canvases[:, None].expand(-1, picture_channels(model), -1, -1))
