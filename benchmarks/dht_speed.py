"""Time of the hierarchical tokenizer as a share of a base model's forward pass, and its growth with the image.

    OMP_NUM_THREADS=1 python benchmarks/dht_speed.py

CPU time, the least of several runs: other programs on the machine add little to it.
"""
from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Callable

import click
import timm
import torch

import timm_spot
from timm_spot.tasks.vectorize import read_picture

PHOTOS = Path(__file__).parent.parent / 'examples' / 'photos'


def least(function: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return 1000 * min(times)


def crops(side: int, batch_size: int) -> torch.Tensor:
    """Photographs resized to `side` px and mirrored, turned and shifted to be different images."""
    photos = [read_picture(file) for file in sorted(PHOTOS.glob('*.jpg'))]
    photos = [torch.nn.functional.interpolate(p, (side, side), mode='bicubic', antialias=True) for p in photos]
    images = [p.roll(37 * i, -1).rot90(i, (2, 3)) for i in range(batch_size) for p in photos]
    return torch.cat(images[:batch_size])


@click.command(help=__doc__)
@click.option('--batch-size', default=8, show_default=True)
@click.option('--runs', default=5, show_default=True)
@torch.inference_mode()
def main(batch_size: int, runs: int) -> None:
    images = crops(224, batch_size)
    model = timm.create_model('dht_vit_base_patch16_in1k').eval()
    released = timm_spot.RasterToVector().tokenizer
    tokenizer = model.patch_embed.tokenizer
    model(images)
    for name, function in (
            ('tokenizer of the base model', lambda: tokenizer(images)),
            ('released tokenizer', lambda: released(images)),
            ('embedding with its tokenizer', lambda: model.patch_embed(images)),
            ('whole forward', lambda: model(images))):
        click.echo(f'{name:30s} {least(function, runs):7.0f} ms for {batch_size} images of 224 x 224')
    for side in (224, 320, 448, 640, 1024):
        image = crops(side, 1)
        ms = least(lambda image=image: released(image), runs)
        click.echo(f'{side:5d} px  {ms:7.0f} ms  {1e6 * ms / side ** 2:.0f} ns per pixel')
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    click.echo(f'peak memory of the process {peak:.2f} GiB')


if __name__ == '__main__':
    main()
