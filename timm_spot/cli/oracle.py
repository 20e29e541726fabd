"""`timm-spot oracle`."""
from __future__ import annotations

import sys
import time
from dataclasses import fields
from typing import Any

import click
import torch

from ..tasks.kept import check_output
from ..tasks.pictures.datasets import Pictures
from ..tasks.search.dataset_run import list_broken, run_oracle
from ..tasks.search.draws import check_draw_seed
from ..tasks.search.objectives import OBJECTIVES
from ..tasks.search.settings import Search
from .common import BATCH_SIZE, DEFAULT_MODEL, clean_errors, create_subpixel_model, main


@main.command()
@click.argument('data')
@click.option('--model', 'name', default=DEFAULT_MODEL, show_default=True, help='Name, hf-hub:ID or local-dir:PATH.')
@click.option('--weights', type=click.Path(), help="Checkpoint: timm_spot's, the authors' or a timm ViT's.")
@click.option('--dataset', 'kind', default='',
              help="timm's name of the data set in the folder DATA, such as torch/cifar10.")
@click.option('--data-dir', help='Folder of a data set that DATA names with a prefix.')
@click.option('--split', default='validation', show_default=True)
@click.option('--class-map', default='', help="Names of the model's classes in order, one a line, for a folder or tar.")
@click.option('--n-tokens', type=int, help='Budget; by default that of the model.')
@click.option('--init', default='isotropic', show_default=True,
              help="Sampler of the start, or the model's own placer by its name.")
@click.option('--saliency', metavar='spectral|attention:NAME|FOLDER', help='Maps for a salient --init.')
@click.option('--objective', type=click.Choice(list(OBJECTIVES)), default='label', show_default=True)
@click.option('--steps', type=int, default=5, show_default=True)
@click.option('--lr', type=float, default=3e-3, show_default=True)
@click.option('--optimizer', default='adamw', show_default=True, help='Any first-order optimizer of timm.')
@click.option('--keep', type=click.Choice(['last', 'best']), default='last', show_default=True)
@click.option('--bounds', type=click.Choice(['none', 'clamp', 'reflect']), default='none', show_default=True)
@click.option('--patience', type=int, help='Stop an image whose loss did not fall for so many steps.')
@click.option('--tol', type=float, default=0., show_default=True, help='Smallest fall that counts.')
@click.option('--batch-size', type=click.IntRange(min=1), default=BATCH_SIZE, show_default=True)
@click.option('--seed', type=int, default=0, show_default=True, help='For samplers that draw.')
@click.option('--workers', type=click.IntRange(min=0), default=0, show_default=True,
              help='Processes that read pictures.')
@click.option('--skip-broken', is_flag=True, help='Leave out pictures that cannot be read, and list them.')
@click.option('--device', default='cpu', show_default=True)
@click.option('--amp-dtype', type=click.Choice(['bfloat16', 'float16']), help='Run the model under autocast.')
@click.option('--out', type=click.Path(dir_okay=False), required=True, help='RESULT.safetensors to write.')
def oracle(
        data: str,
        name: str,
        weights: str | None,
        kind: str,
        data_dir: str | None,
        split: str,
        class_map: str,
        device: str,
        out: str,
        **options: Any,
) -> None:
    """Search the placement of every image of DATA by gradient (SPoT-ON), an upper bound: 'label' sees the label.

    DATA is 'digits' (the shipped canvases), a folder or tar of pictures, or a data set of timm by name, such as
    hfds/imagenet-1k. A run that was killed goes on where it was.
    """
    amp_dtype = options.pop('amp_dtype')
    options['amp_dtype'] = getattr(torch, amp_dtype) if amp_dtype else None
    search = {field.name: options.pop(field.name) for field in fields(Search) if field.name in options}
    with clean_errors():
        # What is wrong with the command line shows before a model is built.
        Search(**search)
        check_draw_seed(options['seed'])
        check_output(out)
        pictures = Pictures(kind or data, split, data if kind else data_dir, class_map)
        model = create_subpixel_model(name, weights).to(device)
        counts: list[int] = []
        begin = time.monotonic()
        with click.progressbar(length=len(pictures), file=sys.stderr, label='oracle', show_pos=True) as bar:
            def advance(count: int) -> None:
                counts.append(count)
                bar.update(count)

            result = run_oracle(model, pictures, out, progress=advance, **options, **search)
        rate = sum(counts[1:]) / (time.monotonic() - begin)
        broken = list_broken(out)
    for message in broken:
        click.secho(f'skipped: {message}', fg='yellow', err=True)
    budget, steps = result.positions.shape[1], result.losses.shape[1] - 1
    click.echo(f'{len(result.positions)} images, {budget} tokens, {steps} steps, {rate:.1f} images/s, written to {out}')
    click.echo(f'loss      {result.losses[:, 0].mean():.4f} -> {result.losses[:, -1].mean():.4f}')
    if result.correct_before is not None:
        before, after = (c.float().mean() for c in (result.correct_before, result.correct_after))
        click.echo(f'accuracy  {before:.2%} -> {after:.2%}')
