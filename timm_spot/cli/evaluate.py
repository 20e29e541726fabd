"""`timm-spot evaluate` and `timm-spot study`."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from torch import nn

from ..tasks.pictures.files import printable
from .common import clean_errors, create_any_model, create_subpixel_model, main
from .options import (
    DEFAULT_MODEL,
    amp_option,
    batch_size_option,
    class_map_option,
    device_option,
    model_option,
    workers_option,
)
from .params import (
    BUDGET,
    COUNT,
    COVERAGE,
    POSITIVE,
    SEED,
    SHARE,
    InputFile,
    Items,
    Number,
    OutputFolder,
    SaliencyName,
    SamplerName,
)
from .progress import show_progress

if TYPE_CHECKING:
    from ..tasks.evaluation.request import Request
    from ..tasks.pictures.datasets import Pictures

_DEFAULT_SPARSE_MODEL = f'relevance_{DEFAULT_MODEL}'


@main.command()
@click.argument('data', default='digits')
@model_option(
    ours=False, parameter='names', files=True, multiple=True,
    show_default=f'{DEFAULT_MODEL}; with the scorer relevance {_DEFAULT_SPARSE_MODEL}',
    help='Any timm model: name, hf-hub:ID, local-dir:PATH, a folder with a config.json, or a .onnx that `export` '
         'wrote, which is evaluated with its own placement; several with several --model.')
@click.option('--samplers', '--sampler', 'samplers', type=Items(SamplerName()), show_default=True,
              default='grid,uniform,gaussian,sobol,isotropic,center,salient')
@click.option('--budgets', '--n-tokens', 'budgets', type=Items(BUDGET), default='',
              show_default='25,49,100,196; for digits 9,25,49,64')
@click.option('--oracle', type=SamplerName(), metavar='SAMPLER',
              help='Also search by gradient from this start; it sees the labels.')
@click.option('--knn', 'train', metavar='TRAIN_DATA', help='Also classify by nearest neighbours in this data set.')
@click.option('--knn-k', type=COUNT, default=20, show_default=True)
@click.option('--knn-temperature', type=POSITIVE, default=0.07, show_default=True)
@click.option('--baselines', type=Items(click.STRING), default='', help='Any of patch-drop,low-res,top-k.')
@click.option('--scorers', '--scorer', 'scorers', type=Items(click.STRING), default='',
              help='Also drop tokens by any of relevance (of a model with trained predictors), cls-attention, '
                   'received-attention, norm, random; merge merges them.')
@click.option('--keep-rates', '--keep-rate', 'keep_rates', type=Items(SHARE), default='', show_default='1,0.9,0.7,0.5',
              help='Shares of the tokens that each stage keeps.')
@click.option('--flops', type=Items(SHARE), default='',
              help="Shares of the dense model's multiply-adds: the keep rate, or how many to merge, is found for each.")
@click.option('--coverages', '--coverage', 'coverages', type=Items(COVERAGE), default='',
              show_default='that of each model',
              help='How much of its cell a window covers, from 0 (a pixel a sample) to 1 (windows tile the picture).')
@click.option('--seeds', '--seed', 'seeds', type=Items(SEED), default='0', show_default=True,
              help='For placements and tokens that are drawn.')
@click.option('--saliency', type=SaliencyName(), metavar='spectral|energy|self|attention:NAME|FOLDER',
              default='spectral', show_default=True, help='Maps for the salient samplers.')
@click.option('--split', default='validation', show_default=True)
@click.option('--data-dir', help='Folder of a data set that DATA names with a prefix.')
@class_map_option
@amp_option
@batch_size_option(64)
@workers_option
@device_option
@click.option('--skip-broken', is_flag=True, help='Leave out pictures that cannot be read, and list them.')
@click.option('--out', type=OutputFolder(holds_weights=True), default='evaluation', show_default=True)
def evaluate(data: str, names: tuple[str, ...], device: str, out: Path, **given: Any) -> None:
    """Measure models by placement and budget on DATA, and write results.csv, results.md and report.html.

    DATA is 'digits' (the shipped canvases), a folder or tar of pictures, or a data set of timm by name, such as
    hfds/imagenet-1k. Rows that OUT has already are not computed again. Several processes: `accelerate launch -m
    timm_spot.cli evaluate ...`.
    """
    from ..tasks.evaluation import run as evaluation
    from ..tasks.evaluation.plan import plan_rows
    from ..tasks.evaluation.report.page import write_report
    from ..tasks.evaluation.report.plots import check_matplotlib
    from ..tasks.processes import start_processes

    with clean_errors():
        check_matplotlib()
        processes = start_processes(device)
        how = {name: given.pop(name) for name in ('batch_size', 'workers', 'skip_broken')}
        names = names or (_DEFAULT_SPARSE_MODEL if 'relevance' in given['scorers'] else DEFAULT_MODEL,)
        models = {name: create_any_model(name) for name in names}
        pictures, request = _request(data, **given)
        planned = plan_rows(models, pictures, request)
        with evaluation.open_folder(out, processes) as problems:
            missing = evaluation.missing_rows(planned, out)
            length = evaluation.count_work(missing, pictures, request.knn)
            with show_progress(length, f'{len(missing)} rows', processes.is_main) as progress:
                run = evaluation.Run(
                    out, processes, request.knn, request.amp,
                    progress=lambda count, what: progress.update(count * processes.count, what), **how)
                broken = evaluation.evaluate(missing, pictures, run)
            if processes.is_main:
                problems += write_report(out, models, pictures, processes.device)
    if not processes.is_main:
        return
    for message in (*(f'skipped: {m}' for m in broken), *(f'warning: {m}' for m in problems)):
        click.secho(message, fg='yellow', err=True)
    click.echo((out / 'results.md').read_text(encoding='utf-8'))
    report = printable(out / 'report.html')
    click.echo(f'{len(missing)} rows computed, {len(planned) - len(missing)} found; report: {report}')


def _request(
        data: str,
        budgets: tuple[int, ...],
        split: str,
        data_dir: str | None,
        class_map: str,
        train: str | None,
        knn_k: int,
        knn_temperature: float,
        **what: Any,
) -> tuple[Pictures, Request]:
    """The pictures and what is asked of models on them."""
    from ..tasks.evaluation.request import Knn, Request
    from ..tasks.pictures.datasets import Pictures

    pictures = Pictures(data, split, data_dir, class_map)
    knn = None if train is None else Knn(Pictures(train, 'train', data_dir, class_map), knn_k, knn_temperature)
    budgets = budgets or ((9, 25, 49, 64) if data == 'digits' else (25, 49, 100, 196))
    return pictures, Request(budgets=budgets, knn=knn, split=split, **what)


@main.command()
@click.argument('name')
@click.argument('data', default='digits')
@model_option(
    parameter='names', multiple=True, show_default=DEFAULT_MODEL,
    help='A subpixel ViT: name, hf-hub:ID, local-dir:PATH or a folder with a config.json; several with several '
         '--model.')
@click.option('--weights', type=InputFile(), multiple=True,
              help='Also study the model with these weights (recipes/train_digits.py --seed 1 makes some).')
@click.option('--budgets', '--n-tokens', 'budgets', type=Items(BUDGET), default='',
              show_default='25,49,100; for digits 9,16,25')
@click.option('--images', type=Number(int, 2, 1_000_000), default=359, show_default=True,
              help='Canvases, one of each held-out digit; or pictures, spread evenly over DATA.')
@class_map_option
@device_option
@click.option('--out', type=OutputFolder(), default='studies', show_default=True)
def study(
        name: str,
        data: str,
        names: tuple[str, ...],
        weights: tuple[str, ...],
        budgets: tuple[int, ...],
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
    placers    lattices on saliency and the model's own placer against even ones, the oracle and the full budget
    saliency   do oracle placements drift towards salient pixels?
    transfer   placements found with one model, used by another (needs --weights, or two --model)
    """
    from ..tasks.evaluation.comparisons import draw_study, format_study
    from ..tasks.evaluation.report.plots import check_matplotlib
    from ..tasks.evaluation.studies import BUDGETS, check_study, run_study
    from ..tasks.evaluation.study_pictures import open_study_pictures
    from ..tasks.kept import lock_output, whole_file, write_whole

    with clean_errors():
        check_matplotlib()
        check_study(name)
        models = {title: model.to(device) for title, model in _study_models(names, weights).items()}
        pictures = open_study_pictures(data, images, class_map)
        budgets = budgets or (BUDGETS if data == 'digits' else (25, 49, 100))
        found = run_study(name, models, pictures, budgets, out)
        table = format_study(found)
        with lock_output(out / f'{name}.md'):
            write_whole(out / f'{name}.md', table + '\n')
            with whole_file(out / f'{name}.png') as file:
                draw_study(found).savefig(file, dpi=110)
    click.echo(table)


def _study_models(names: tuple[str, ...], weights: tuple[str, ...]) -> dict[str, nn.Module]:
    """Models by the names that a study's table has for them."""
    if weights and len(names) > 1:
        raise ValueError(f"--weights belong to one model, and there are {len(names)}: {', '.join(names)}.")
    models = {name: create_subpixel_model(name) for name in names} or {'shipped': create_subpixel_model(DEFAULT_MODEL)}
    for file in weights:
        title = Path(file).parent.name or file
        models[file if title in models else title] = create_subpixel_model(names[0] if names else DEFAULT_MODEL, file)
    return models
