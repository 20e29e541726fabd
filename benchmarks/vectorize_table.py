"""What raster to vector costs and keeps, as a Markdown table: with the settings of the hub's model and of the function.

    pip install resvg-py
    python -m benchmarks.vectorize_table [PHOTO ...]

Every file is parsed strictly and rendered by resvg; the PSNR of the rendering stands beside that of filling each region
with its mean colour. By default the photographs are those in examples/photos.
"""
from __future__ import annotations

import io
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Tuple

import click
import numpy as np
import resvg_py
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import timm_spot
from timm_spot.ops.regions.features import region_means
from timm_spot.tasks.vectorize import CLOSE, read_picture

PHOTOS = sorted((Path(__file__).parent.parent / 'examples' / 'photos').glob('*.jpg'))
SETTINGS = {'model': CLOSE, 'function': {}}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * np.log10(np.square(a - b).mean())


@click.command(help=__doc__)
@click.argument('photos', nargs=-1, type=click.Path(path_type=Path, exists=True), default=PHOTOS)
@click.option('--side', default=512, show_default=True)
@torch.inference_mode()
def main(photos: Tuple[Path, ...], side: int) -> None:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    tokenizer = timm_spot.RasterToVector().tokenizer
    click.echo('| photograph | pixels | settings | paths | KiB | s | PSNR dB | PSNR of the means dB | short by dB |')
    click.echo('|---' * 9 + '|')
    for file in photos:
        image = read_picture(file, side)
        height, width = image.shape[-2:]
        picture = (image * std + mean)[0].permute(1, 2, 0).numpy()
        found = tokenizer(image, round((height * width) ** 0.5))
        means = region_means(image * std + mean, found.segmentation, found.sizes).T[found.segmentation[0]].numpy()
        filled = psnr(means, picture)
        for name, settings in SETTINGS.items():
            begin = time.perf_counter()
            svg, = timm_spot.vectorize(image, tokenizer, **settings)
            seconds = time.perf_counter() - begin
            ET.fromstring(svg)
            with Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))) as rendered:
                drawn = psnr(np.asarray(rendered.convert('RGB')) / 255, picture)
            click.echo(
                f'| {file.stem} | {width} x {height} | {name} | {svg.count("<path")} | {len(svg) / 1024:.0f} '
                f'| {seconds:.1f} | {drawn:.1f} | {filled:.1f} | {filled - drawn:.1f} |')


if __name__ == '__main__':
    main()
