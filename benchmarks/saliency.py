"""What spectral residual costs, and what it is worth on the digits.

    python -m benchmarks.saliency

Time: the map of a 512 x 512 photograph against a forward pass of spot_vit_base_patch16_mae at 25 tokens on the same
photograph, timed in turn in one run; the ratio is that of the medians. Worth: accuracy of the shipped digit model on
canvases of held-out digits, the same 3,590 as in its model card, by prior and budget.
"""
from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import List

import click
import numpy as np
import timm
import torch
from PIL import Image

import timm_spot
from timm_spot.ops import energy, spectral_residual
from timm_spot.tasks.pictures.digits import draw_canvases, load_digits, to_input

PHOTO = Path(__file__).parent.parent / 'examples' / 'photos' / 'cowbike.jpg'
BUDGETS = (9, 16, 25, 49)
PRIORS = ('isotropic', 'salient', 'salient_sobol', 'salient_inverse', 'salient_lattice')
ROWS = [*((prior, spectral_residual) for prior in PRIORS), ('salient_sobol', energy), ('salient_lattice', energy)]
CANVASES_PER_DIGIT = 10


@torch.inference_mode()
def measure_time(repeats: int) -> str:
    with Image.open(PHOTO) as photo:
        images = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255
    model = timm.create_model('spot_vit_base_patch16_mae', n_tokens=25).eval()
    maps: List[float] = []
    passes: List[float] = []
    for repeat in range(repeats + 3):
        for times, call in ((maps, spectral_residual), (passes, model)):
            begin = time.perf_counter()
            call(images)
            if repeat >= 3:  # the first ones warm up
                times.append(time.perf_counter() - begin)
    saliency, forward = statistics.median(maps), statistics.median(passes)
    return (
        f'spectral_residual {saliency * 1e3:.1f} ms, spot_vit_base_patch16_mae at 25 tokens {forward * 1e3:.1f} ms: '
        f'ratio {saliency / forward:.3f} (threads: {torch.get_num_threads()}, medians of {repeats})')


@torch.inference_mode()
def measure_accuracy() -> str:
    model = timm.create_model('spot_vit_pico_patch8_64', pretrained=True).eval()
    digits, labels = load_digits('held_out')
    generator = torch.Generator().manual_seed(1)
    canvases = [draw_canvases(digits, generator) for _ in range(CANVASES_PER_DIGIT)]
    lines = ['| prior | ' + ' | '.join(f'{n} tokens' for n in BUDGETS) + ' |', '|---' * (len(BUDGETS) + 1) + '|']
    for prior, saliency in ROWS:
        row = []
        for n_tokens in BUDGETS:
            generator = torch.Generator().manual_seed(0)
            correct = 0
            for batch in canvases:
                images = to_input(batch, model)
                positions = timm_spot.sample_positions(
                    prior, n_tokens, (64, 64), len(images), saliency=saliency(images), generator=generator)
                correct += (model(images, positions).argmax(dim=1) == labels).sum().item()
            row.append(f'{100 * correct / (len(labels) * CANVASES_PER_DIGIT):.1f}')
        lines.append(f"| {prior}{' on energy' * (saliency is energy)} | {' | '.join(row)} |")
    return '\n'.join(lines)


@click.command(help=__doc__)
@click.option('--repeats', default=30, show_default=True, help='Timed passes of each.')
def main(repeats: int) -> None:
    click.echo(measure_time(repeats))
    click.echo(measure_accuracy())


if __name__ == '__main__':
    main()
