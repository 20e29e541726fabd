"""`timm-spot oracle`."""
from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import click
import torch

from ..tasks.kept import check_output
from ..tasks.pictures.datasets import Pictures
from ..tasks.search.dataset_run import list_broken, run_oracle
from ..tasks.search.objectives import OBJECTIVES
from ..tasks.search.settings import Search
from .common import clean_errors, create_subpixel_model, main
from .options import (
    DEFAULT_MODEL,
    Renamed,
    amp_option,
    batch_size_option,
    class_map_option,
    coverage_option,
    device_option,
    model_option,
    n_tokens_option,
    placer_option,
    saliency_option,
    seed_option,
    weights_option,
    workers_option,
)
from .params import Items, StartName
from .progress import show_progress


@main.command()
@click.argument('data')
@model_option(default=DEFAULT_MODEL, show_default=True)
@weights_option
@click.option('--dataset', 'kind', default='',
              help="timm's name of the data set in the folder DATA, such as torch/cifar10.")
@click.option('--data-dir', help='Folder of a data set that DATA names with a prefix.')
@click.option('--split', default='validation', show_default=True)
@class_map_option
@n_tokens_option
@click.option('--sampler', '--init', 'init', cls=Renamed, type=StartName(),
              show_default='that of --placer, or isotropic',
              help="Spatial prior of the start, or the model's own placer by its name.")
@saliency_option
@placer_option
@coverage_option
@seed_option(0)
@click.option('--objective', type=click.Choice(list(OBJECTIVES)), default='label', show_default=True)
@click.option('--optimize', type=Items(click.Choice(['position', 'size'])), default='position', show_default=True,
              help='What moves: position, size, or position,size.')
@click.option('--steps', type=int, default=5, show_default=True)
@click.option('--lr', type=float, default=3e-3, show_default=True)
@click.option('--optimizer', default='adamw', show_default=True, help='Any first-order optimizer of timm.')
@click.option('--keep', type=click.Choice(['last', 'best']), default='last', show_default=True)
@click.option('--bounds', type=click.Choice(['none', 'clamp', 'reflect']), default='none', show_default=True)
@click.option('--patience', type=int, help='Stop an image whose loss did not fall for so many steps.')
@click.option('--tol', type=float, default=0., show_default=True, help='Smallest fall that counts.')
@batch_size_option()
@workers_option
@click.option('--skip-broken', is_flag=True, help='Leave out pictures that cannot be read, and list them.')
@device_option
@amp_option
@click.option('--out', type=click.Path(dir_okay=False), required=True, help='RESULT.safetensors to write.')
def oracle(
        data: str,
        name: str,
        weights: str | None,
        kind: str,
        data_dir: str | None,
        split: str,
        class_map: str,
        init: str | None,
        placer: str | None,
        device: str,
        amp: str | None,
        out: str,
        **given: Any,
) -> None:
    """Search the placement of every image of DATA by gradient (SPoT-ON), an upper bound: 'label' sees the label.

    DATA is 'digits' (the shipped canvases), a folder or tar of pictures, or a data set of timm by name, such as
    hfds/imagenet-1k. A run that was killed goes on where it was.
    """
    given['amp_dtype'] = amp and getattr(torch, amp)
    search = {field.name: given.pop(field.name) for field in fields(Search) if field.name in given}
    with clean_errors():
        # What is wrong with the command line shows before a model is built.
        Search(**search)
        check_output(out)
        pictures = Pictures(kind or data, split, data if kind else data_dir, class_map)
        model = create_subpixel_model(name, weights, placer=placer, coverage=given.pop('coverage')).to(device)
        counts: list[int] = []
        begin = time.monotonic()
        with show_progress(len(pictures), 'oracle') as progress:
            def advance(count: int) -> None:
                counts.append(count)
                progress.update(count)

            result = run_oracle(
                model, pictures, out, init=init or placer or 'isotropic', progress=advance, **given, **search)
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
