"""What the tests of pictures share."""
from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

import timm_spot

PHOTOS = Path(__file__).parent.parent / 'examples' / 'photos'


def read_photo(name: str, width: int, height: int) -> Image.Image:
    with Image.open(PHOTOS / f'{name}.jpg') as photo:
        return photo.resize((width, height))


def place(n_tokens: int, image: Image.Image) -> torch.Tensor:
    return timm_spot.sample_positions(
        'sobol', n_tokens, (image.height, image.width), generator=torch.Generator().manual_seed(0))


def spirals(n_tokens: int, steps: int, turns: float = 1.) -> SimpleNamespace:
    """Two images' worth of a search in which every token spirals outwards; in the second nothing moves."""
    start = timm_spot.sample_positions('isotropic', n_tokens, (100, 100))[0]
    angle = torch.linspace(0, 2 * math.pi * turns, steps + 1)[:, None] + torch.arange(n_tokens)
    spiral = torch.stack([angle.sin(), angle.cos()], dim=-1) * torch.linspace(0, 0.09, steps + 1)[:, None, None]
    losses = 0.2 + 2 * torch.linspace(0, -3, steps + 1).exp()
    return SimpleNamespace(
        trajectory=torch.stack([start + spiral, start.expand(steps + 1, -1, -1)]),
        losses=torch.stack([losses, torch.ones(steps + 1)]))


def render(figure: plt.Figure, dpi: int = 50, page: str = 'white') -> Image.Image:
    """The figure as it looks on a page."""
    figure.set_dpi(dpi)
    figure.canvas.draw()
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))
    on_page = Image.new('RGBA', drawn.size, page)
    on_page.alpha_composite(drawn)
    return on_page.convert('RGB')
