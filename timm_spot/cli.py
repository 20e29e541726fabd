"""The `timm-spot` command: one thin sub-command for each task."""
from __future__ import annotations

import difflib
import io
import json
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, List, Optional, Tuple

import click
import timm
import torch
from safetensors import SafetensorError
from torch import nn

import timm_spot

from .models.token_pruning import TokenPruning
from .tasks import predict as prediction
from .tasks.objectives import OBJECTIVES
from .tasks.oracle_run import open_dataset, run_oracle
from .tasks.saliency_maps import choose_prior
from .tasks.vectorize import CLOSE, RasterToVector, read_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BATCH_SIZE = 32
DEFAULT_MODEL = 'spot_vit_pico_patch8_64'
_DEFAULT_SPARSE_MODEL = f'relevance_{DEFAULT_MODEL}'
_NAMES = ['spot_*', 'dht_*', 'relevance_spot_*']


@click.group(context_settings=dict(help_option_names=['-h', '--help'], max_content_width=120))
@click.version_option(timm_spot.__version__)
def main() -> None:
    """Vision Transformers off the grid."""
    warnings.showwarning = lambda message, *_: click.secho(f'warning: {message}', fg='yellow', err=True)


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turn what a user can put right into one line and exit status 1, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OSError, ImportError, SafetensorError) as e:
        raise click.ClickException(str(e) or type(e).__name__) from e


def create_any_model(name: str, weights: Optional[str] = None, **kwargs: Any) -> nn.Module:
    """A timm model in eval mode with its weights; for an unknown name an error with the closest known ones."""
    if ':' not in name and not timm.is_model(name):
        known = timm.list_models(_NAMES) + timm.list_models(_NAMES, include_tags=True)
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(close)}?" if close else ''
        raise ValueError(f'unknown model {name}.{hint} `timm-spot models` lists them all.')
    overlay = dict(file=weights) if weights else None
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def create_model(name: str, weights: Optional[str] = None, **kwargs: Any) -> nn.Module:
    """A model of ours, see `create_any_model`; an error for any other."""
    model = create_any_model(name, weights, **kwargs)
    if not isinstance(model, timm_spot.models.SubpixelVisionTransformer) and not _is_dht(model):
        raise ValueError(f'{name} is no model of timm_spot: `timm-spot models` lists those that are.')
    return model


def create_subpixel_model(name: str, weights: Optional[str] = None, **kwargs: Any) -> nn.Module:
    """A model of ours that places its tokens; an error for a dHT model."""
    model = create_model(name, weights, **kwargs)
    if _is_dht(model):
        raise ValueError(
            f'{name} is a dHT model, whose tokens are regions that it finds itself: this command is for subpixel ViTs.')
    return model


def _is_dht(model: nn.Module) -> bool:
    return isinstance(model, timm_spot.models.DhtVisionTransformer)


saliency_option = click.option(
    '--saliency', metavar='spectral|attention:NAME|FOLDER',
    help="Map for the salient samplers (without --sampler: 'salient'): spectral residual, the attention of a "
         'pretrained timm ViT, or a folder with a map for each picture.')


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
        files = prediction.find_images(images)
        model = create_model(name, weights, n_tokens=n_tokens)
        transform, names = prediction.model_transform(model), prediction.class_names(model)
        set_saliency = _choose_prior(model, sampler, saliency, transform)
        results, broken = [], []
        with click.progressbar(length=len(files), file=sys.stderr, label='predict') as bar:
            for start in range(0, len(files), _BATCH_SIZE):
                loaded = []
                for file in files[start:start + _BATCH_SIZE]:
                    try:
                        loaded.append((file, prediction.load_image(file, transform)))
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
                        _save_placement(model, image, _picture_path(save_placement, file, len(files)))
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


def _choose_prior(
        model: nn.Module, sampler: Optional[str], saliency: Optional[str], transform: Callable[..., Any],
) -> Callable[..., Any]:
    """`choose_prior`, which a dHT model has no use for: its tokens follow the image."""
    if not _is_dht(model):
        return choose_prior(model, sampler, saliency, transform)
    if sampler or saliency:
        raise ValueError('a dHT model finds its tokens itself: leave out --sampler and --saliency.')
    return lambda *_: None


def _save_placement(model: nn.Module, image: torch.Tensor, path: Path) -> None:
    """Draw the windows, or the regions, that a model takes as the tokens of an image (3, H, W)."""
    from .tasks.draw import draw_placement, draw_regions

    picture = prediction.denormalize(model, image)
    if _is_dht(model):
        figure = draw_regions(picture, model.segment(image[None]).segmentation[0]).figure
    else:
        embed, positions = model.patch_embed, model.place(image[None])
        figure = draw_placement(picture, positions, embed.window, convention=embed.convention).figure
    _save_figure(figure, path)


def _save_figure(figure: Figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    try:
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


@main.command()
@click.argument('data', type=click.Path())
@click.option('--model', 'name', default=DEFAULT_MODEL, show_default=True, help='Name, hf-hub:ID or local-dir:PATH.')
@click.option('--weights', type=click.Path(), help="Checkpoint: timm_spot's, the authors' or a timm ViT's.")
@click.option('--dataset', 'kind', default='', help="timm's name of the dataset in DATA, such as torch/cifar10.")
@click.option('--split', default='validation', show_default=True)
@click.option('--class-map', default='', help="Names of the model's classes in order, one a line, for a folder.")
@click.option('--n-tokens', type=int, help='Budget; by default that of the model.')
@click.option('--init', default='isotropic', show_default=True, help='Sampler of the start.')
@click.option('--saliency', metavar='spectral|attention:NAME|FOLDER', help='Maps for a salient --init.')
@click.option('--objective', type=click.Choice(list(OBJECTIVES)), default='label', show_default=True)
@click.option('--steps', type=int, default=5, show_default=True)
@click.option('--lr', type=float, default=3e-3, show_default=True)
@click.option('--optimizer', default='adamw', show_default=True, help='Any first-order optimizer of timm.')
@click.option('--keep', type=click.Choice(['last', 'best']), default='last', show_default=True)
@click.option('--bounds', type=click.Choice(['none', 'clamp', 'reflect']), default='none', show_default=True)
@click.option('--patience', type=int, help='Stop an image whose loss did not fall for so many steps.')
@click.option('--tol', type=float, default=0., show_default=True, help='Smallest fall that counts.')
@click.option('--batch-size', type=click.IntRange(min=1), default=_BATCH_SIZE, show_default=True)
@click.option('--seed', type=int, default=0, show_default=True, help='For samplers that draw.')
@click.option('--workers', type=int, default=0, show_default=True, help='Processes that read pictures.')
@click.option('--device', default='cpu', show_default=True)
@click.option('--amp-dtype', type=click.Choice(['bfloat16', 'float16']), help='Run the model under autocast.')
@click.option('--out', type=click.Path(dir_okay=False), required=True, help='RESULT.safetensors to write.')
def oracle(
        data: str,
        name: str,
        weights: Optional[str],
        kind: str,
        split: str,
        class_map: str,
        n_tokens: Optional[int],
        objective: str,
        batch_size: int,
        device: str,
        amp_dtype: Optional[str],
        out: str,
        **options: Any,
) -> None:
    """Search the placement of every image of DATA by gradient (SPoT-ON), an upper bound: 'label' sees the label.

    DATA is a folder of pictures, or of a dataset that timm opens. A run that was killed goes on where it was.
    """
    with clean_errors():
        model = create_subpixel_model(name, weights, n_tokens=n_tokens).to(device)
        dataset, labels = open_dataset(model, data, kind, split, class_map)
        if objective == 'label' and not labels:
            raise ValueError(
                f"{data} has no subfolder for each of the model's {model.num_classes} classes, so there are no labels: "
                'give --class-map, or another --objective (entropy, teacher or feature need no label).')
        counts: List[int] = []
        begin = time.monotonic()
        with click.progressbar(
                length=len(dataset), file=sys.stderr, label='oracle', show_pos=True) as bar:
            def advance(count: int) -> None:
                counts.append(count)
                bar.update(count)

            result = run_oracle(
                model, dataset, out, labels=labels, objective=objective, batch_size=batch_size,
                amp_dtype=getattr(torch, amp_dtype) if amp_dtype else None, progress=advance, **options)
        rate = sum(counts[1:]) / (time.monotonic() - begin)
    budget, steps = result.positions.shape[1], result.losses.shape[1] - 1
    click.echo(f'{len(result.positions)} images, {budget} tokens, {steps} steps, {rate:.1f} images/s, written to {out}')
    click.echo(f'loss      {result.losses[:, 0].mean():.4f} -> {result.losses[:, -1].mean():.4f}')
    if result.correct_before is not None:
        before, after = (c.float().mean() for c in (result.correct_before, result.correct_after))
        click.echo(f'accuracy  {before:.2%} -> {after:.2%}')


@main.command()
def models() -> None:
    """List names, tags, parameters and where the weights come from."""
    rows = [('model', 'tag', 'parameters', 'weights')]
    for name in timm.list_models(_NAMES):
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


@main.command()
@click.argument('source')
@click.argument('dest', type=click.Path(path_type=Path))
@click.option('--model', help="timm's name of what the weights belong to, where SOURCE does not say.")
def convert(source: str, dest: Path, model: Optional[str]) -> None:
    """Convert SOURCE into the folder DEST: safetensors, config.json, model card.

    SOURCE is the authors' .pth, a timm checkpoint (.pth, .pth.tar, .safetensors) of a subpixel ViT or of any ViT that
    can be retrofitted, a model folder, or ORG/NAME on the Hugging Face Hub. No pickled code is ever run. What was
    written is loaded back and compared.
    """
    from .tasks import convert as conversion

    with clean_errors():
        click.echo(conversion.convert(source, dest, model))
    click.echo(f'\ntimm.create_model({f"local-dir:{dest}"!r}, pretrained=True)')


@main.command()
@click.argument('name', metavar='MODEL')
@click.argument('out', type=click.Path(path_type=Path, dir_okay=False), metavar='OUT.onnx|OUT.pt2')
@click.option('--weights', type=click.Path(), help="Checkpoint: timm_spot's, the authors' or a timm ViT's.")
@click.option('--n-tokens', type=int, help='Budget; by default that of the model.')
@click.option('--positions-as-input', is_flag=True, help='Let the placement (B, N, 2), of any budget, be an input.')
def export(name: str, out: Path, weights: Optional[str], n_tokens: Optional[int], positions_as_input: bool) -> None:
    """Write MODEL (name, hf-hub:ID or local-dir:PATH) as ONNX or as PyTorch's exported program.

    The batch is dynamic, the image size the model's own. What was written is loaded back and compared.
    """
    from .tasks.export import export_model

    with clean_errors():
        difference = export_model(create_subpixel_model(name, weights, n_tokens=n_tokens), out, positions_as_input)
    click.echo(f'{out} ({out.stat().st_size / 1e6:.1f} MB), largest difference to the model {difference:.1g}')


@main.command()
@click.argument('folder', type=click.Path(path_type=Path))
@click.argument('repo_id', metavar='ORG/NAME')
@click.option('--private', is_flag=True, help='Make a new repository private.')
@click.option('--revision', help='Branch to push to; made if there is none.')
@click.option('--dry-run', is_flag=True, help='Check the folder and say what would be sent; send nothing.')
def push(folder: Path, repo_id: str, private: bool, revision: Optional[str], dry_run: bool) -> None:
    """Publish FOLDER, as `timm-spot convert` writes it, on the Hugging Face Hub.

    Sends the weights (safetensors), config.json and the model card; with a results.csv in the folder the card shows
    its accuracies. Log in first: `hf auth login`.
    """
    from .tasks import hub

    with clean_errors():
        for name in hub.check_folder(folder, repo_id):
            click.echo(f'{name} is no part of the model and stays here', err=True)
        if dry_run:
            for name in hub.FILES:
                click.echo(f'would send {name} ({(folder / name).stat().st_size:,} bytes)')
            click.echo(f"to {repo_id}{'@' + revision if revision else ''}{' (private)' if private else ''}")
            return
        click.echo(hub.push_folder(folder, repo_id, private, revision))
    click.echo(f"timm.create_model('hf-hub:{repo_id}{'@' + revision if revision else ''}', pretrained=True)")


@main.command()
@click.argument('image', type=click.Path(path_type=Path))
@click.option('--out', type=click.Path(path_type=Path), required=True, help='Picture to write.')
@click.option('--kind', type=click.Choice([
    'placement', 'seen', 'priors', 'trajectory', 'film', 'pruning', 'regions', 'means', 'hierarchy']),
    show_default='placement')
@click.option('--model', 'name', default=DEFAULT_MODEL, show_default=True, help='Name, hf-hub:ID or local-dir:PATH.')
@click.option('--n-tokens', type=int, help='Budget; by default that of the model (priors: 25).')
@click.option('--sampler', help='Spatial prior that places the tokens; by default that of the model.')
@saliency_option
@click.option('--weights', type=click.Path(), help="Checkpoint: timm_spot's, the authors' or a timm ViT's.")
@click.option('--steps', type=int, default=30, show_default=True, help='Steps of the search in a trajectory or film.')
@click.option('--lr', type=float, default=1e-2, show_default=True, help='Its learning rate.')
@click.option('--scorer', default='cls-attention', show_default=True, help='What a pruning goes by.')
@click.option('--keep-rate', type=float, default=0.7, show_default=True, help='Share that each stage of it keeps.')
def draw(
        image: Path,
        out: Path,
        kind: Optional[str],
        name: str,
        n_tokens: Optional[int],
        sampler: Optional[str],
        saliency: Optional[str],
        weights: Optional[str],
        steps: int,
        lr: float,
        scorer: str,
        keep_rate: float,
) -> None:
    """Draw IMAGE, as the model takes it, with its tokens.

    \b
    placement   the windows, their centres and the share of the image they cover
    seen        only what the model reads
    priors      the spatial priors side by side
    trajectory  a search for the placement of least entropy: start, path and end of every token, and the loss
    film        the same as a .gif, or .mp4 with ffmpeg
    pruning     which tokens the model drops at which stage; one that drops none is pruned by --scorer
    regions     of a dHT model (the only kinds it has, and this the default): borders of its tokens
    means       each of them filled with its mean colour
    hierarchy   its levels, one by one
    """
    from .tasks.draw import (
        animate,
        draw_hierarchy,
        draw_placement,
        draw_priors,
        draw_pruning,
        draw_region_means,
        draw_regions,
        draw_seen,
        draw_trajectory,
    )
    from .tasks.oracle import optimize_positions

    with clean_errors():
        model = create_model(name, weights, n_tokens=n_tokens)
        transform, embed = prediction.model_transform(model), model.patch_embed
        batch = prediction.load_image(image, transform)[None]
        picture = prediction.denormalize(model, batch[0])
        region_kinds = dict(regions=draw_regions, means=draw_region_means)
        if _is_dht(model) != ((kind or ('regions' if _is_dht(model) else '')) in (*region_kinds, 'hierarchy')):
            raise ValueError(f'--kind {kind} does not suit {name}: see `timm-spot draw --help`.')
        if _is_dht(model):
            _choose_prior(model, sampler, saliency, transform)
            regions = model.segment(batch)
            if kind == 'hierarchy':
                axes = draw_hierarchy(picture, [level[0] for level in regions.levels])[0, 0]
            else:
                axes = region_kinds[kind or 'regions'](picture, regions.segmentation[0])
            _save_figure(axes.figure, out)
            return
        kind = kind or 'placement'
        if kind == 'priors':
            _save_figure(draw_priors(picture, n_tokens or 25, embed.window)[0, 0].figure, out)
            return
        choose_prior(model, sampler, saliency, transform)(batch, [image])
        positions = model.place(batch)
        if kind in ('placement', 'seen'):
            function = dict(placement=draw_placement, seen=draw_seen)[kind]
            _save_figure(function(picture, positions[0], embed.window, convention=embed.convention).figure, out)
            return
        if kind == 'pruning':
            if isinstance(model, TokenPruning):
                model.set_keep_rate(keep_rate)
            else:
                model = timm_spot.sparsify(model, keep_rate, scorer=scorer)
            with torch.no_grad():
                kept = [index[0] for index in model.kept_tokens(batch, positions=positions)]
            _save_figure(
                draw_pruning(picture, positions[0], kept, embed.window, convention=embed.convention).figure, out)
            return
        result = optimize_positions(
            model, batch, init=positions, objective='entropy', steps=steps, lr=lr, bounds='clamp')
        if kind == 'trajectory':
            _save_figure(draw_trajectory(picture, result)[0].figure, out)
        else:
            animate(picture, result, embed.window, out, convention=embed.convention)


@main.command()
@click.argument('images', nargs=-1, required=True)
@click.option('--out', type=click.Path(file_okay=False, path_type=Path), required=True, help='Folder for the SVGs.')
@click.option('--max-side', type=click.IntRange(min=1), default=512, show_default=True,
              help='Shrink pictures whose longer side exceeds this.')
@click.option('--regions', type=click.IntRange(min=1), help='About how many; by default sqrt(height * width).')
@click.option('--tolerance', type=float, default=0.1, show_default=True, help='More leaves out more detail.')
@click.option('--smoothing', type=int, default=CLOSE['smoothing'], show_default=True,
              help='How often corners are rounded: 2 looks drawn, 1 is nearer to the picture.')
@click.option('--stroke', type=float, default=CLOSE['stroke'], show_default=True,
              help='Width of the lines that close gaps, in px.')
@click.option('--longest-edge', type=float, default=CLOSE['longest_edge'], show_default=True,
              help='Split straight borders into pieces of so many px: less keeps corners sharper, in larger files.')
@click.option('--background/--no-background', default=True, show_default=True)
def vectorize(
        images: Tuple[str, ...],
        out: Path,
        max_side: int,
        regions: Optional[int],
        tolerance: float,
        smoothing: int,
        stroke: float,
        longest_edge: float,
        background: bool,
) -> None:
    """Draw IMAGES (files, folders, globs) as SVG: a path of smooth curves for each region."""
    with clean_errors():
        files = prediction.find_images(images)
        by_stem = {file.stem: file for file in files}
        for file in files:
            if by_stem[file.stem] != file:
                raise ValueError(f'{file} and {by_stem[file.stem]} would both be {out / file.stem}.svg: rename one.')
        model = RasterToVector(
            target=regions, tolerance=tolerance, smoothing=smoothing, stroke=stroke, longest_edge=longest_edge,
            patch_size=32 if background else None)
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            begin = time.monotonic()
            svg, = model(read_picture(file, max_side))
            path = out / f'{file.stem}.svg'
            path.write_text(svg)
            click.echo(f'{path}  {svg.count("<path")} paths, {path.stat().st_size / 1024:.0f} KiB, '
                       f'{time.monotonic() - begin:.1f} s')


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
@click.option('--workers', type=int, default=0, show_default=True, help='Processes that decode pictures.')
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
    from .tasks import evaluate as evaluation
    from .tasks.data import Pictures
    from .tasks.processes import start_processes
    from .tasks.report import check_matplotlib, write_report

    with clean_errors():
        check_matplotlib()
        processes = start_processes(device)
        out.mkdir(parents=True, exist_ok=True)
        names = names or (_DEFAULT_SPARSE_MODEL if 'relevance' in what['scorers'] else DEFAULT_MODEL,)
        models = {name: create_any_model(name) for name in names}
        pictures = Pictures(data, split, data_dir, class_map)
        knn = None
        if train is not None:
            knn = evaluation.Knn(Pictures(train, 'train', data_dir, class_map), knn_k, knn_temperature)
        budgets = budgets or ((9, 25, 49, 64) if data == 'digits' else (25, 49, 100, 196))
        cells = evaluation.list_cells(models, pictures, split, budgets=budgets, amp=amp, knn=knn, **what)
        missing = evaluation.missing_cells(cells, out)
        with click.progressbar(
                length=evaluation.count_work(missing, pictures, knn), label=f'{len(missing)} rows',
                file=sys.stderr if processes.is_main else io.StringIO()) as bar:
            broken = evaluation.evaluate(
                cells, pictures, out, processes, knn, amp, batch_size, workers, skip_broken,
                progress=lambda count: bar.update(count * processes.count))
        if not processes.is_main:
            return
        write_report(out, models, pictures)
    for message in broken:
        click.secho(f'skipped: {message}', fg='yellow', err=True)
    click.echo((out / 'results.md').read_text(encoding='utf-8'))
    click.echo(f'{len(missing)} rows computed, {len(cells) - len(missing)} found; report: {out / "report.html"}')


@main.command()
@click.argument('name', type=click.Choice(['grids', 'priors', 'saliency', 'transfer']))
@click.option('--weights', type=click.Path(), multiple=True,
              help='Also study the digit model with these weights (recipes/train_digits.py --seed 1 makes some).')
@click.option('--images', type=click.IntRange(2, 359), default=359, show_default=True,
              help='Canvases, one of each held-out digit.')
@click.option('--out', type=click.Path(file_okay=False, path_type=Path), default='studies', show_default=True)
def study(name: str, weights: Tuple[str, ...], images: int, out: Path) -> None:
    """Run one of the page's case studies on digit canvases; writes NAME.md and NAME.png.

    \b
    grids      off the grid against on it, oracle placements snapped to it included
    priors     object-centric against even priors
    saliency   do oracle placements drift towards salient pixels?
    transfer   placements found with one model, used by another (needs --weights)
    """
    from .tasks import studies

    with clean_errors():
        out.mkdir(parents=True, exist_ok=True)
        models = {'shipped': create_model(DEFAULT_MODEL)}
        models.update({Path(file).parent.name or file: create_model(DEFAULT_MODEL, file) for file in weights})
        found = studies.STUDIES[name](models, studies.draw_study_canvases(images), out)
        table = studies.format_study(found)
        (out / f'{name}.md').write_text(table + '\n', encoding='utf-8')
        studies.draw_study(found).savefig(out / f'{name}.png', dpi=110)
    click.echo(table)


if __name__ == '__main__':
    main()
