"""`timm-spot predict` and `timm-spot models`."""
from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import timm
import torch
from torch import nn

import timm_spot

from ..tasks import predict as prediction
from ..tasks.pictures.datasets import Pictures
from ..tasks.pictures.files import printable
from ..tasks.pictures.images import denormalize, model_transform
from .common import (
    BATCH_SIZE,
    DEFAULT_MODEL,
    NAMES,
    clean_errors,
    create_model,
    is_dht,
    main,
    saliency_option,
    save_figure,
    set_prior,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@main.command()
@click.argument('images', nargs=-1, required=True)
@click.option('--model', 'name', default=DEFAULT_MODEL, show_default=True, help='Name, hf-hub:ID or local-dir:PATH.')
@click.option('--n-tokens', type=int, help='Budget; by default that of the model.')
@click.option('--sampler', help='Spatial prior that places the tokens; by default that of the model.')
@saliency_option
@click.option('--topk', type=click.IntRange(min=1), default=5, show_default=True, help='Classes for each picture.')
@click.option('--weights', type=click.Path(), help="Checkpoint: timm_spot's, the authors' or a timm ViT's.")
@click.option('--json', 'as_json', is_flag=True, help='Print one JSON list instead of lines.')
@click.option('--save-placement', type=click.Path(path_type=Path), metavar='PNG',
              help='Save the picture with its windows, as .png, .svg, .pdf ...; of several pictures NAME-<picture>.png '
                   'for each, numbered where two have one name.')
def predict(
        images: tuple[str, ...],
        name: str,
        n_tokens: int | None,
        sampler: str | None,
        saliency: str | None,
        topk: int,
        weights: str | None,
        as_json: bool,
        save_placement: Path | None,
) -> None:
    """Print the most probable classes of IMAGES (files, folders, tars, globs, or a data set by name).

    A file that is no picture, or is not there, is reported at the end on standard error; the others are still
    predicted, and the exit status is 1.
    """
    with clean_errors():
        if save_placement is not None:
            _check_suffix(save_placement)
        pictures = Pictures(images)
        broken, results = list(pictures.broken), []
        if len(pictures) or pictures.is_stream:
            model = create_model(name, weights, n_tokens=n_tokens)
            results = _predict(model, pictures, broken, sampler, saliency, topk, save_placement)
    if as_json:
        click.echo(json.dumps(
            [dict(file=file, classes=[score._asdict() for score in row]) for file, row in results], indent=1))
    else:
        for file, row in results:
            scores = '  '.join(f'{score.name} {score.probability:.1%}' for score in row)
            click.echo(f'{printable(file)}  {scores}')
    for message in broken:
        click.secho(f'error: {message}', fg='red', err=True)
    if broken:
        raise SystemExit(1)


def _predict(
        model: nn.Module,
        pictures: Pictures,
        broken: list[str],
        sampler: str | None,
        saliency: str | None,
        topk: int,
        save_placement: Path | None,
) -> list[tuple[str, list[prediction.ClassScore]]]:
    """Names and classes of all pictures that can be read; what is wrong with the others goes into `broken`."""
    names = prediction.class_names(model)
    set_saliency = set_prior(model, sampler, saliency, model_transform(model))
    results, foreign, used = [], [], set()
    with click.progressbar(length=len(pictures), file=sys.stderr, label='predict') as bar:
        for batch in prediction.read_batches(pictures, model, BATCH_SIZE, broken):
            set_saliency(batch.images, batch.names)
            results += zip(batch.names, prediction.predict(model, batch.images, names, topk))
            foreign += batch.foreign
            if save_placement is not None:
                for file, figure in zip(batch.names, _draw_placements(model, batch.images)):
                    save_figure(figure, _picture_path(save_placement, file, len(pictures) != 1, used))
            bar.update(len(batch.names))
    if foreign:
        more = f' and {len(foreign) - 1} more' if len(foreign) > 1 else ''
        click.secho(
            f'warning: this model reads digits on canvases of 64 x 64 pixels; {printable(foreign[0])}{more} is no such '
            'picture: for photographs give another --model', fg='yellow', err=True)
    return results


def _check_suffix(path: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in ('', *known):
        raise ValueError(f"--save-placement {path} must end in one of {', '.join(known)}.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f'--save-placement {path}: there is no folder {path.parent}.')


def _picture_path(path: Path, file: str, several: bool, used: set[str]) -> Path:
    """Where the placement of a picture goes: a file of its own."""
    path = path if path.suffix else path.with_suffix('.png')
    if not several:
        return path
    stem = f'{path.stem}-{printable(Path(file).stem)}'
    chosen, count = stem, 1
    while chosen.casefold() in used:
        count += 1
        chosen = f'{stem}-{count}'
    used.add(chosen.casefold())
    return path.with_name(chosen + path.suffix)


def _draw_placements(model: nn.Module, images: torch.Tensor) -> Iterator[Figure]:
    """Draw the windows, or the regions, that a model takes as the tokens of images (B, C, H, W), one by one."""
    pictures = denormalize(model, images)
    # Placed as one batch: the maps of a salient sampler are those of the batch.
    places: Sequence[torch.Tensor] = model.segment(images).segmentation if is_dht(model) else model.place(images)
    for picture, place in zip(pictures, places):
        if is_dht(model):
            yield timm_spot.draw_regions(picture, place).figure
        else:
            embed = model.patch_embed
            yield timm_spot.draw_placement(picture, place, embed.window, convention=embed.convention).figure


@main.command()
def models() -> None:
    """List names, tags, parameters and where the weights come from."""
    rows = [('model', 'tag', 'parameters', 'weights')]
    for name in timm.list_models(NAMES):
        parameters = sum(p.numel() for p in timm.create_model(name, device='meta').parameters())
        for tagged in timm.list_models(f'{name}.*', include_tags=True) or [name]:
            cfg = timm.get_pretrained_cfg(tagged)
            if cfg.hf_hub_id:
                source = f'Hub: {cfg.hf_hub_id}'
            elif cfg.file:
                source = 'in the package'
            elif not cfg.origin_url:
                source = 'none'
            else:
                source = f"the authors' file, see {cfg.origin_url}"
            rows.append((name, cfg.tag or '', f'{parameters / 1e6:.1f} M', source))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        click.echo('  '.join(cell.ljust(width) for cell, width in zip(row, widths)) + '  ' + row[3])
