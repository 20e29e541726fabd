"""`timm-spot predict` and `timm-spot models`."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import click
import timm
import torch
from torch import nn

from ..tasks import predict as prediction
from ..tasks.drawing.figure import check_figure
from ..tasks.drawing.kinds import KINDS, Settings, Subject
from ..tasks.evaluation.families import name_patterns
from ..tasks.kept import check_overwrite
from ..tasks.pictures.classes import class_names
from ..tasks.pictures.datasets import Pictures
from ..tasks.pictures.files import printable
from ..tasks.pictures.images import model_transform
from .common import (
    clean_errors,
    create_placed_model,
    kinds_of,
    main,
    report_broken,
    set_prior,
    warn_of_foreign,
)
from .options import (
    DEFAULT_MODEL,
    amp_option,
    batch_size_option,
    coverage_option,
    device_option,
    model_option,
    n_tokens_option,
    overwrite_option,
    placer_option,
    saliency_option,
    sampler_option,
    seed_option,
    weights_option,
)
from .params import COUNT, OutputFile
from .progress import show_progress


@main.command()
@click.argument('images', nargs=-1, required=True)
@model_option(default=DEFAULT_MODEL, files=True, show_default=True)
@weights_option
@n_tokens_option
@sampler_option
@saliency_option
@placer_option
@coverage_option
@seed_option()
@click.option('--topk', type=COUNT, default=5, show_default=True, help='Classes for each picture.')
@click.option('--json', 'as_json', is_flag=True, help='Print one JSON list instead of lines.')
@click.option('--save-placement', type=OutputFile(), metavar='PNG',
              help='Save the picture with its windows, as .png, .svg, .pdf ...; of several pictures NAME-<picture>.png '
                   'for each, numbered where two have one name.')
@batch_size_option()
@device_option
@amp_option
@overwrite_option
def predict(
        images: tuple[str, ...],
        name: str,
        as_json: bool,
        save_placement: Path | None,
        overwrite: bool,
        **given: Any,
) -> None:
    """Print the most probable classes of IMAGES (files, folders, tars, globs, or a data set by name).

    A file that is no picture, or is not there, is reported at the end on standard error; the others are still
    predicted, and the exit status is 1.
    """
    with clean_errors():
        if save_placement is not None:
            save_placement = save_placement if save_placement.suffix else save_placement.with_suffix('.png')
            check_figure(save_placement)
        pictures = Pictures(images)
        if save_placement is not None:
            check_overwrite(_picture_paths(save_placement, pictures), overwrite)
        broken, results = list(pictures.broken), []
        if len(pictures) or pictures.is_stream:
            results = _predict(pictures, broken, name, save_placement, **given)
    if as_json:
        click.echo(json.dumps(
            [dict(file=file, classes=[score._asdict() for score in row]) for file, row in results], indent=1))
    else:
        for file, row in results:
            scores = '  '.join(f'{score.name} {score.probability:.1%}' for score in row)
            click.echo(f'{printable(file)}  {scores}')
    report_broken(broken)


def _predict(
        pictures: Pictures,
        broken: list[str],
        name: str,
        save_placement: Path | None,
        topk: int,
        batch_size: int,
        sampler: str | None,
        saliency: str | None,
        device: str,
        amp: str | None,
        **given: Any,
) -> list[tuple[str, list[prediction.ClassScore]]]:
    """Names and classes of all pictures that can be read; what is wrong with the others goes into `broken`."""
    model = create_placed_model(name, device=device, sampler=sampler, saliency=saliency, **given)
    names = class_names(model)
    set_saliency = set_prior(model, sampler, saliency, model_transform(model))
    draw = None if save_placement is None else _placement_drawer(model, save_placement, len(pictures) != 1)
    results, foreign = [], []
    with show_progress(len(pictures), 'predict') as progress:
        for batch in prediction.read_batches(pictures, model, batch_size, broken):
            images = batch.images.to(device)
            set_saliency(images, batch.names)
            with torch.autocast(images.device.type, amp and getattr(torch, amp), enabled=amp is not None):
                results += zip(batch.names, prediction.predict(model, images, names, topk))
            foreign += batch.foreign
            for file, image in zip(batch.names, images.split(1)) if draw else ():
                set_saliency(image, [file])
                draw(file, Subject(model, image))
            progress.update(len(batch.names))
    warn_of_foreign(foreign)
    return results


def _placement_drawer(model: nn.Module, path: Path, several: bool) -> Callable[[str, Subject], None]:
    """What draws where a model's tokens lie, for the file of a picture."""
    kind, used = KINDS[kinds_of(model)[0]], set()

    def draw(file: str, subject: Subject) -> None:
        kind.write(subject, Settings(), _picture_path(path, file, several, used))

    return draw


def _picture_paths(path: Path, pictures: Pictures) -> list[Path]:
    """Where the placements of all pictures may go; of a stream, whose names none knows, nothing."""
    used: set[str] = set()
    count = 0 if pictures.is_stream else len(pictures)
    return [_picture_path(path, pictures.name(i), count != 1, used) for i in range(count)]


def _picture_path(path: Path, file: str, several: bool, used: set[str]) -> Path:
    """Where the placement of a picture goes: a file of its own."""
    if not several:
        return path
    stem = f'{path.stem}-{printable(Path(file).stem)}'
    chosen, count = stem, 1
    while chosen.casefold() in used:
        count += 1
        chosen = f'{stem}-{count}'
    used.add(chosen.casefold())
    return path.with_name(chosen + path.suffix)


@main.command()
def models() -> None:
    """List names, tags, parameters and where the weights come from."""
    rows = [('model', 'tag', 'parameters', 'weights')]
    for name in timm.list_models(name_patterns()):
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
