"""Write the digit canvases as a folder of pictures that timm's scripts read: OUT/{train,validation}/CLASS/NUMBER.png.

    python recipes/digits_folder.py --out build/digits_folder

Training canvases are distorted a little, as in `train_digits.py`; those for validation show held-out digits only.
"""
from __future__ import annotations

from pathlib import Path

import click
import torch
from PIL import Image

from timm_spot.tasks.pictures.digits import draw_canvases, load_digits


@click.command(help=__doc__)
@click.option('--out', type=click.Path(path_type=Path), required=True, help='Folder to write.')
@click.option('--train-canvases', default=10, show_default=True, help='Canvases of each training digit.')
@click.option('--validation-canvases', default=4, show_default=True, help='Canvases of each held-out digit.')
@click.option('--seed', default=0, show_default=True)
def main(out: Path, train_canvases: int, validation_canvases: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for folder, split, count in (
            ('train', 'train', train_canvases), ('validation', 'held_out', validation_canvases)):
        digits, labels = load_digits(split)
        for label in range(10):
            (out / folder / str(label)).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            canvases = draw_canvases(digits, generator, distort=split == 'train')
            for j, (canvas, label) in enumerate(zip(canvases, labels.tolist())):
                Image.fromarray(canvas.numpy()).save(out / folder / str(label) / f'{i:02d}_{j:04d}.png')
        click.echo(f'{count * len(labels):,} canvases in {out / folder}')


if __name__ == '__main__':
    main()
