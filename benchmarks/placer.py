"""What it costs to look first: images/s of a model placed by a network, and by a map, beside a fixed placement.

    python -m benchmarks.placer

Time from images to logits, medians of passes that take turns in one run, with random weights: what a placer says does
not change its time. The ratio is to the fixed placement of the same model, budget and batch.
"""
from __future__ import annotations

from functools import partial

import click
import timm
import torch

import timm_spot  # noqa: F401  registers the models

from .measure import Config, alternate

PLACEMENTS = {
    'fixed': {},
    'density': dict(placer='density'),
    'energy lattice': dict(sampler='salient_lattice', saliency='energy'),
}
MODELS = {'spot_vit_pico_patch8_64': (9, 64), 'spot_vit_base_patch16_in21k': (25, 224)}


@click.command(help=__doc__)
@click.option('--batch', 'batches', multiple=True, type=int, default=(1, 8, 64), show_default=True)
@click.option('--seconds', default=60., show_default=True, help='For each line.')
@torch.inference_mode()
def main(batches: tuple[int, ...], seconds: float) -> None:
    click.echo(f'threads: {torch.get_num_threads()}')
    click.echo(f"| model | batch | {' | '.join(f'{how}, images/s' for how in PLACEMENTS)} | "
               f"{' | '.join(f'{how} / fixed' for how in PLACEMENTS if how != 'fixed')} |")
    click.echo('|---' * (1 + 2 * len(PLACEMENTS)) + '|')
    for name, (n_tokens, side) in MODELS.items():
        models = {how: timm.create_model(name, n_tokens=n_tokens, **kw).eval() for how, kw in PLACEMENTS.items()}
        for batch in batches:
            images = torch.randn(batch, 3, side, side)
            times = alternate({how: partial(model, images) for how, model in models.items()}, Config(seconds=seconds))
            cells = [f'{batch / value:.1f}' for value in times.values()]
            cells += [f"{times['fixed'] / value:.3f}" for how, value in times.items() if how != 'fixed']
            click.echo(f'| {name}, {n_tokens} tokens | {batch} | {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
