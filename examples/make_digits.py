"""Draw the held-out digit canvases of the demo: examples/digits/<number>_<label>.png."""
from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from timm_spot.tasks.pictures.digits import draw_canvases, load_digits

COUNT = 40

if __name__ == '__main__':
    folder = Path(__file__).parent / 'digits'
    folder.mkdir(exist_ok=True)
    digits, labels = load_digits('held_out')
    spread = slice(None, None, len(labels) // COUNT)
    digits, labels = digits[spread][:COUNT], labels[spread][:COUNT]
    canvases = draw_canvases(digits, torch.Generator().manual_seed(2))
    for i, (canvas, label) in enumerate(zip(canvases, labels.tolist())):
        Image.fromarray(canvas.numpy()).save(folder / f'{i:02d}_{label}.png')
