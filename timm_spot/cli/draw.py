"""`timm-spot draw` and `timm-spot vectorize`."""
from __future__ import annotations

import time
from pathlib import Path
from typing import Optional, Tuple

import click
import torch

import timm_spot

from ..models.pruning import TokenPruning
from ..tasks.evaluation.families import family_of
from ..tasks.pictures import images as pictures
from ..tasks.pictures.saliency_maps import choose_prior
from ..tasks.vectorize import CLOSE, RasterToVector, read_picture
from .common import DEFAULT_MODEL, clean_errors, create_model, main, saliency_option, save_figure, set_prior


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
    with clean_errors():
        model = create_model(name, weights, n_tokens=n_tokens)
        transform, embed = pictures.model_transform(model), model.patch_embed
        batch = pictures.load_image(image, transform)[None]
        picture = pictures.denormalize(model, batch[0])
        region_kinds = dict(regions=timm_spot.draw_regions, means=timm_spot.draw_region_means)
        kinds = family_of(model).kinds
        kind = kind or (kinds[0] if kinds else None)
        if kind not in kinds:
            raise ValueError(f'--kind {kind} does not suit {name}: see `timm-spot draw --help`.')
        if kind in (*region_kinds, 'hierarchy'):
            set_prior(model, sampler, saliency, transform)
            regions = model.segment(batch)
            if kind == 'hierarchy':
                axes = timm_spot.draw_hierarchy(picture, [level[0] for level in regions.levels])[0, 0]
            else:
                axes = region_kinds[kind](picture, regions.segmentation[0])
            save_figure(axes.figure, out)
            return
        if kind == 'priors':
            save_figure(timm_spot.draw_priors(picture, n_tokens or 25, embed.window)[0, 0].figure, out)
            return
        choose_prior(model, sampler, saliency, transform)(batch, [image])
        positions = model.place(batch)
        if kind in ('placement', 'seen'):
            function = dict(placement=timm_spot.draw_placement, seen=timm_spot.draw_seen)[kind]
            save_figure(function(picture, positions[0], embed.window, convention=embed.convention).figure, out)
            return
        if kind == 'pruning':
            if isinstance(model, TokenPruning):
                model.set_keep_rate(keep_rate)
            else:
                model = timm_spot.sparsify(model, keep_rate, scorer=scorer)
            with torch.no_grad():
                kept = [index[0] for index in model.kept_tokens(batch, positions=positions)]
            ax = timm_spot.draw_pruning(picture, positions[0], kept, embed.window, convention=embed.convention)
            save_figure(ax.figure, out)
            return
        result = timm_spot.optimize_positions(
            model, batch, init=positions, objective='entropy', steps=steps, lr=lr, bounds='clamp')
        if kind == 'trajectory':
            save_figure(timm_spot.draw_trajectory(picture, result)[0].figure, out)
        else:
            timm_spot.animate(picture, result, embed.window, out, convention=embed.convention)


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
        files = pictures.find_images(images)
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
