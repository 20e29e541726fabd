"""`timm-spot predict` and `timm-spot models`."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Optional, Tuple

import click
import timm
import torch
from torch import nn

from ..tasks import predict as prediction
from ..tasks.drawing.kinds import KINDS, Settings, Subject
from ..tasks.evaluation.families import name_patterns
from ..tasks.pictures import images as pictures
from .common import (
    BATCH_SIZE,
    DEFAULT_MODEL,
    clean_errors,
    create_model,
    kinds_of,
    main,
    saliency_option,
    set_prior,
)


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
              help='Save the picture with its windows; with several pictures PNG-<picture>.png for each.')
def predict(
        images: Tuple[str, ...],
        name: str,
        n_tokens: Optional[int],
        sampler: Optional[str],
        saliency: Optional[str],
        topk: int,
        weights: Optional[str],
        as_json: bool,
        save_placement: Optional[Path],
) -> None:
    """Print the most probable classes of IMAGES (files, folders, globs).

    A file that is no picture is reported on standard error, the others are still predicted, and the exit status is 1.
    """
    with clean_errors():
        files = pictures.find_images(images)
        model = create_model(name, weights, n_tokens=n_tokens)
        transform, names = pictures.model_transform(model), prediction.class_names(model)
        set_saliency = set_prior(model, sampler, saliency, transform)
        results, broken = [], []
        with click.progressbar(length=len(files), file=sys.stderr, label='predict') as bar:
            for start in range(0, len(files), BATCH_SIZE):
                loaded = []
                for file in files[start:start + BATCH_SIZE]:
                    try:
                        loaded.append((file, pictures.load_image(file, transform)))
                    except ValueError as e:
                        broken.append(str(e))
                    bar.update(1)
                if not loaded:
                    continue
                batch = torch.stack([image for _, image in loaded])
                set_saliency(batch, [file for file, _ in loaded])
                scores = prediction.predict(model, batch, names, topk)
                results += [(file, row) for (file, _), row in zip(loaded, scores)]
                if save_placement is not None:
                    for file, image in loaded:
                        _draw_placement(model, image, _picture_path(save_placement, file, len(files)))
    if as_json:
        click.echo(json.dumps(
            [dict(file=str(file), classes=[score._asdict() for score in row]) for file, row in results], indent=1))
    else:
        for file, row in results:
            click.echo(f'{file}  ' + '  '.join(f'{score.name} {score.probability:.1%}' for score in row))
    for message in broken:
        click.secho(f'error: {message}', fg='red', err=True)
    if broken:
        raise SystemExit(1)


def _picture_path(path: Path, file: Path, n_files: int) -> Path:
    return path if n_files == 1 else path.with_name(f'{path.stem}-{file.stem}.png')


def _draw_placement(model: nn.Module, image: torch.Tensor, path: Path) -> None:
    """Draw what a model takes as the tokens of an image (3, H, W): its windows, or its regions."""
    KINDS[kinds_of(model)[0]].write(Subject(model, image[None]), Settings(), path)


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
