"""How much of the variance of photographs regions explain, and how many of them are specks, by the rule of merging.

    python -m benchmarks.regions_table FOLDER [FOLDER ...]

Photographs are squeezed to 224 x 224 px. The released tokenizer, and one with the random weights of seed 0.
"""
from __future__ import annotations

from pathlib import Path
from typing import Tuple

import click
import torch
import torch.nn.functional as F

import timm_spot
from timm_spot.ops.regions.features import region_means
from timm_spot.tasks.pictures.datasets import Pictures
from timm_spot.tasks.vectorize import to_input

from .__main__ import markdown

SIDE = 224


def explained(image: torch.Tensor, regions: timm_spot.Regions) -> float:
    """Share of the variance of (1, 3, H, W) that lies between regions."""
    means = region_means(image, regions.segmentation, regions.sizes)[:, regions.segmentation[0]]
    rest = (image[0] - means).square().sum()
    return 1. - (rest / (image[0] - image[0].mean((1, 2), keepdim=True)).square().sum()).item()


@click.command(help=__doc__)
@click.argument('pictures', nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@torch.inference_mode()
def main(pictures: Tuple[Path, ...]) -> None:
    torch.manual_seed(0)
    photos = Pictures(pictures)
    images = [
        F.interpolate(to_input(photos[i][0]), (SIDE, SIDE), mode='bicubic', antialias=True) for i in range(len(photos))]
    rows = []
    for name, tokenizer in (
            ('released', timm_spot.RasterToVector().tokenizer), ('random', timm_spot.HierarchicalTokenizer().eval())):
        for merge in ('keepers', 'ward'):
            tokenizer.merge = merge
            for target in (100, 196):
                found = [tokenizer(image, target, strict=True) for image in images]
                specks = torch.cat([regions.sizes <= 4 for regions in found]).float().mean().item()
                share = sum(map(explained, images, found)) / len(images)
                rows.append([name, merge, str(target), f'{share:.3f}', f'{specks:.1%}'])
    header = ['tokenizer', 'merge', 'regions', 'variance explained', 'of four pixels or fewer']
    click.echo('\n'.join(markdown(header, rows)))


if __name__ == '__main__':
    main()
