"""What raster to vector costs and keeps, for the photographs in examples/photos, as a Markdown table.

    pip install resvg-py
    python benchmarks/vectorize_table.py

Every file is parsed strictly and rendered by resvg; the PSNR of the rendering stands beside that of filling each region
with its mean colour.
"""
from __future__ import annotations

import io
import itertools
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import click
import numpy as np
import resvg_py
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import timm_spot
from timm_spot.ops.region_features import region_means
from timm_spot.tasks.vectorize import read_picture

PHOTOS = Path(__file__).parent.parent / 'examples' / 'photos'


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * np.log10(np.square(a - b).mean())


@click.command(help=__doc__)
@click.option('--side', default=512, show_default=True)
@click.option('--regions', multiple=True, type=int, default=(512, 1024), show_default=True)
@click.option('--stroke', default=0.5, show_default=True)
@torch.inference_mode()
def main(side: int, regions: tuple, stroke: float) -> None:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    model = timm_spot.RasterToVector()
    click.echo('| photograph | pixels | regions | smoothing | paths | KiB | s | PSNR dB | PSNR of the means dB |')
    click.echo('|---' * 9 + '|')
    for file in sorted(PHOTOS.glob('*.jpg')):
        image = read_picture(file, side)
        picture = (image * std + mean)[0].permute(1, 2, 0).numpy()
        for target, smoothing in itertools.product(regions, (1, 2)):
            begin = time.perf_counter()
            svg, = timm_spot.vectorize(image, model.tokenizer, target, smoothing=smoothing, stroke=stroke)
            seconds = time.perf_counter() - begin
            ET.fromstring(svg)
            with Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))) as rendered:
                drawn = np.asarray(rendered.convert('RGB')) / 255
            found = model.tokenizer(image, target)
            means = region_means(image * std + mean, found.segmentation, found.sizes).T[found.segmentation[0]].numpy()
            height, width = picture.shape[:2]
            click.echo(
                f'| {file.stem} | {width} x {height} | {target} | {smoothing} | {svg.count("<path")} '
                f'| {len(svg) / 1024:.0f} | {seconds:.1f} | {psnr(drawn, picture):.1f} | {psnr(means, picture):.1f} |')


if __name__ == '__main__':
    main()
