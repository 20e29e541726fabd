"""Time of the hierarchical tokenizer as a share of a base model's forward pass, and its growth with the image.

    OMP_NUM_THREADS=2 python -m benchmarks.dht_speed --plot docs/images/dht_speed.png

Wall-clock time, the least of several runs, on a machine that does nothing else.
"""
from __future__ import annotations

import time
from pathlib import Path
from typing import Callable, Optional, Sequence

import click
import timm
import torch

import timm_spot
from timm_spot.tasks.drawing.figure import BLUE, GREY
from timm_spot.tasks.vectorize import read_picture

from .measure import peak

PHOTOS = Path(__file__).parent.parent / 'examples' / 'photos'
SIDES = (224, 320, 448, 640, 832, 1024)


def least(function: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return 1000 * min(times)


def crops(side: int, batch_size: int) -> torch.Tensor:
    """Photographs resized to `side` px and mirrored, turned and shifted to be different images."""
    photos = [read_picture(file) for file in sorted(PHOTOS.glob('*.jpg'))]
    photos = [torch.nn.functional.interpolate(p, (side, side), mode='bicubic', antialias=True) for p in photos]
    images = [p.roll(37 * i, -1).rot90(i, (2, 3)) for i in range(batch_size) for p in photos]
    return torch.cat(images[:batch_size])


def draw(times: Sequence[float], path: Path) -> None:
    """Milliseconds against megapixels, with the straight line through the origin that fits best."""
    from matplotlib.figure import Figure

    pixels = torch.tensor([side ** 2 / 1e6 for side in SIDES])
    ms = torch.tensor(times)
    figure = Figure(figsize=(5, 3.2), layout='constrained')
    ax = figure.subplots()
    slope = (pixels @ ms / (pixels @ pixels)).item()
    ax.plot([0, pixels[-1]], [0, slope * pixels[-1]], color=GREY, linestyle='--', label=f'{slope:.0f} ms per megapixel')
    ax.plot(pixels, ms, 'o', color=BLUE, label='released tokenizer, one image')
    for x, y, side in zip(pixels, ms, SIDES):
        ax.annotate(f'{side} px', (x, y), (4, -12), textcoords='offset points', color=GREY, fontsize='small')
    ax.set_xlim(right=1.16 * pixels[-1].item())  # room for the last label
    ax.set_xlabel('megapixels', color=GREY)
    ax.set_ylabel('ms', color=GREY)
    ax.tick_params(colors=GREY)
    for spine in ax.spines.values():
        spine.set_color(GREY)
    ax.legend(frameon=False, labelcolor=GREY)
    figure.savefig(path, dpi=110, transparent=True)


@click.command(help=__doc__)
@click.option('--batch-size', default=8, show_default=True)
@click.option('--runs', default=5, show_default=True)
@click.option('--plot', type=click.Path(path_type=Path, dir_okay=False), help='Picture of the growth to write.')
@torch.inference_mode()
def main(batch_size: int, runs: int, plot: Optional[Path]) -> None:
    released = timm_spot.RasterToVector().tokenizer
    times = []
    for side in SIDES:
        image = crops(side, 1)
        released(image)
        times.append(least(lambda image=image: released(image), runs))
        click.echo(f'{side:5d} px  {times[-1]:7.0f} ms  {1e6 * times[-1] / side ** 2:.0f} ns per pixel')
    click.echo(f'peak memory of the process so far {peak("cpu") / 1024:.2f} GiB')

    images = crops(224, batch_size)
    model = timm.create_model('dht_vit_base_patch16_in1k').eval()
    tokenizer = model.patch_embed.tokenizer
    model(images)
    forward = least(lambda: model(images), runs)
    for name, function in (
            ('tokenizer of the base model', lambda: tokenizer(images)),
            ('released tokenizer', lambda: released(images)),
            ('embedding with its tokenizer', lambda: model.patch_embed(images))):
        ms = least(function, runs)
        click.echo(f'{name:30s} {ms:7.0f} ms for {batch_size} images of 224 x 224, {ms / forward:.1%} of the forward')
    click.echo(f'{"whole forward":30s} {forward:7.0f} ms')
    click.echo(f'peak memory of the process {peak("cpu") / 1024:.2f} GiB')
    if plot is not None:
        draw(times, plot)


if __name__ == '__main__':
    main()
