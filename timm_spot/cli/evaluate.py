"""`timm-spot evaluate` and `timm-spot study`."""
from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import click
from torch import nn

from .common import DEFAULT_MODEL, clean_errors, create_any_model, create_model, main

_DEFAULT_SPARSE_MODEL = f'relevance_{DEFAULT_MODEL}'


class _List(click.ParamType):
    """Values separated by commas."""

    name = 'LIST'

    def __init__(self, convert: Callable[[str], Any]) -> None:
        self.convert_one = convert

    def convert(self, value: Any, param: Any, ctx: Any) -> Tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.convert_one(part.strip()) for part in value.split(',') if part.strip())
        except ValueError:
            self.fail(f'{value!r} is no list of numbers, such as 25,49.', param, ctx)


@main.command()
@click.argument('data', default='digits')
@click.option('--model', 'names', multiple=True,
              show_default=f'{DEFAULT_MODEL}; with the scorer relevance {_DEFAULT_SPARSE_MODEL}',
              help='Any timm model: name, hf-hub:ID or local-dir:PATH; several with several --model.')
@click.option('--samplers', type=_List(str), default='grid,uniform,gaussian,sobol,isotropic,center,salient',
              show_default=True)
@click.option('--budgets', type=_List(int), default='', show_default='25,49,100,196; for digits 9,25,49,64')
@click.option('--oracle', metavar='SAMPLER', help='Also search by gradient from this start; it sees the labels.')
@click.option('--knn', 'train', metavar='TRAIN_DATA', help='Also classify by nearest neighbours in this data set.')
@click.option('--knn-k', type=click.IntRange(min=1), default=20, show_default=True)
@click.option('--knn-temperature', type=float, default=0.07, show_default=True)
@click.option('--baselines', type=_List(str), default='', help='Any of patch-drop,low-res,top-k.')
@click.option('--scorers', type=_List(str), default='', help='Also drop tokens by any of relevance (of a model with '
              'trained predictors), cls-attention, received-attention, norm, random.')
@click.option('--keep-rates', type=_List(float), default='', show_default='1,0.9,0.7,0.5',
              help='Shares of the tokens that each stage keeps.')
@click.option('--seeds', type=_List(int), default='0', show_default=True,
              help='For placements and tokens that are drawn.')
@click.option('--saliency', metavar='spectral|attention:NAME|FOLDER', default='spectral', show_default=True,
              help='Maps for the salient samplers.')
@click.option('--split', default='validation', show_default=True)
@click.option('--data-dir', help='Folder of a data set that DATA names with a prefix.')
@click.option('--class-map', default='', help="Names of the model's classes in order, one a line, for a folder or tar.")
@click.option('--amp', type=click.Choice(['bfloat16', 'float16']), help='Run the models under autocast.')
@click.option('--batch-size', type=click.IntRange(min=1), default=64, show_default=True)
@click.option('--workers', type=click.IntRange(min=0), default=0, show_default=True,
              help='Processes that decode pictures.')
@click.option('--device', default='cpu', show_default=True)
@click.option('--skip-broken', is_flag=True, help='Leave out pictures that cannot be read, and list them.')
@click.option('--out', type=click.Path(file_okay=False, path_type=Path), default='evaluation', show_default=True)
def evaluate(
        data: str,
        names: Tuple[str, ...],
        budgets: Tuple[int, ...],
        train: Optional[str],
        knn_k: int,
        knn_temperature: float,
        split: str,
        data_dir: Optional[str],
        class_map: str,
        device: str,
        out: Path,
        amp: Optional[str],
        batch_size: int,
        workers: int,
        skip_broken: bool,
        **what: Any,
) -> None:
    """Measure models by placement and budget on DATA, and write results.csv, results.md and report.html.

    DATA is 'digits' (the shipped canvases), a folder or tar of pictures, or a data set of timm by name, such as
    hfds/imagenet-1k. Rows that OUT has already are not computed again. Several processes: `accelerate launch -m
    timm_spot.cli evaluate ...`.
    """
    from ..tasks.evaluation import run as evaluation
    from ..tasks.evaluation.plan import plan_rows
    from ..tasks.evaluation.report.page import write_report
    from ..tasks.evaluation.report.plots import check_matplotlib
    from ..tasks.evaluation.request import Knn, Request
    from ..tasks.pictures.datasets import Pictures
    from ..tasks.processes import start_processes

    with clean_errors():
        check_matplotlib()
        processes = start_processes(device)
        names = names or (_DEFAULT_SPARSE_MODEL if 'relevance' in what['scorers'] else DEFAULT_MODEL,)
        models = {name: create_any_model(name) for name in names}
        pictures = Pictures(data, split, data_dir, class_map)
        knn = None
        if train is not None:
            knn = Knn(Pictures(train, 'train', data_dir, class_map), knn_k, knn_temperature)
        request = Request(
            budgets=budgets or ((9, 25, 49, 64) if data == 'digits' else (25, 49, 100, 196)), knn=knn, amp=amp,
            split=split, labelled=_labelled(data_dir, class_map), **what)
        planned = plan_rows(models, pictures, request)
        with evaluation.open_folder(out, processes) as problems:
            missing = evaluation.missing_rows(planned, out)
            with click.progressbar(
                    length=evaluation.count_work(missing, pictures, knn), label=f'{len(missing)} rows',
                    file=sys.stderr if processes.is_main else io.StringIO()) as bar:
                run = evaluation.Run(
                    out, processes, knn, amp, batch_size, workers, skip_broken,
                    progress=lambda count: bar.update(count * processes.count))
                broken = evaluation.evaluate(missing, pictures, run)
            if processes.is_main:
                problems += write_report(out, models, pictures, processes.device)
    if not processes.is_main:
        return
    for message in (*(f'skipped: {m}' for m in broken), *(f'warning: {m}' for m in problems)):
        click.secho(message, fg='yellow', err=True)
    click.echo((out / 'results.md').read_text(encoding='utf-8'))
    click.echo(f'{len(missing)} rows computed, {len(planned) - len(missing)} found; report: {out / "report.html"}')


def _labelled(data_dir: Optional[str], class_map: str) -> str:
    """What labels depend on beside the pictures; '' by default."""
    parts = [str(Path(data_dir).resolve())] if data_dir else []
    if class_map:
        parts.append(Path(class_map).read_text(encoding='utf-8'))
    return '\n'.join(parts)


@main.command()
@click.argument('name')
@click.argument('data', default='digits')
@click.option('--model', 'names', multiple=True, show_default=DEFAULT_MODEL,
              help='A subpixel ViT: name, hf-hub:ID or local-dir:PATH; several with several --model.')
@click.option('--weights', type=click.Path(), multiple=True,
              help='Also study the model with these weights (recipes/train_digits.py --seed 1 makes some).')
@click.option('--budgets', type=_List(int), default='', show_default='25,49,100; for digits 9,16,25')
@click.option('--images', type=click.IntRange(min=2), default=359, show_default=True,
              help='Canvases, one of each held-out digit; or pictures, spread evenly over DATA.')
@click.option('--class-map', default='', help="Names of the model's classes in order, one a line, for a folder or tar.")
@click.option('--device', default='cpu', show_default=True)
@click.option('--out', type=click.Path(file_okay=False, path_type=Path), default='studies', show_default=True)
def study(
        name: str,
        data: str,
        names: Tuple[str, ...],
        weights: Tuple[str, ...],
        budgets: Tuple[int, ...],
        images: int,
        class_map: str,
        device: str,
        out: Path,
) -> None:
    """Run one of the page's case studies on DATA; writes NAME.md and NAME.png.

    DATA is 'digits' (canvases, the default) or a folder or tar of pictures, a subfolder for each class.

    \b
    grids      off the grid against on it, oracle placements snapped to it included
    priors     object-centric against even priors
    saliency   do oracle placements drift towards salient pixels?
    transfer   placements found with one model, used by another (needs --weights, or two --model)
    """
    from ..tasks.evaluation.comparisons import draw_study, format_study
    from ..tasks.evaluation.report.plots import check_matplotlib
    from ..tasks.evaluation.studies import BUDGETS, check_study, run_study
    from ..tasks.evaluation.study_pictures import open_study_pictures
    from ..tasks.kept import lock_output, whole_file, write_whole
    from ..tasks.processes import check_device

    with clean_errors():
        check_matplotlib()
        check_study(name)
        where = check_device(device)
        models = {title: model.to(where) for title, model in _study_models(names, weights).items()}
        pictures = open_study_pictures(data, images, class_map)
        budgets = budgets or (BUDGETS if data == 'digits' else (25, 49, 100))
        found = run_study(name, models, pictures, budgets, out)
        table = format_study(found)
        with lock_output(out / f'{name}.md'):
            write_whole(out / f'{name}.md', table + '\n')
            with whole_file(out / f'{name}.png') as file:
                draw_study(found).savefig(file, dpi=110)
    click.echo(table)


def _study_models(names: Tuple[str, ...], weights: Tuple[str, ...]) -> Dict[str, nn.Module]:
    """Models by the names that a study's table has for them."""
    if weights and len(names) > 1:
        raise ValueError(f"--weights belong to one model, and there are {len(names)}: {', '.join(names)}.")
    models = {name: create_model(name) for name in names} or {'shipped': create_model(DEFAULT_MODEL)}
    for file in weights:
        title = Path(file).parent.name or file
        models[file if title in models else title] = create_model(names[0] if names else DEFAULT_MODEL, file)
    return models
