"""`timm-spot vectorize`."""
from __future__ import annotations

import time
from pathlib import Path

import click

from ..tasks.kept import write_whole
from ..tasks.pictures.datasets import Pictures
from ..tasks.pictures.files import printable
from ..tasks.pictures.images import PictureError
from ..tasks.vectorize import CLOSE, RasterToVector, to_input
from .common import clean_errors, main, report_broken
from .options import device_option, overwrite_option
from .params import COUNT, OutputFolder, check_overwrite


@main.command()
@click.argument('images', nargs=-1, required=True)
@click.option('--out', type=OutputFolder(), required=True, help='Folder for the SVGs.')
@click.option('--max-side', type=COUNT, default=512, show_default=True,
              help='Shrink pictures whose longer side exceeds this.')
@click.option('--regions', type=COUNT, help='About how many; by default sqrt(height * width).')
@click.option('--tolerance', type=float, default=0.1, show_default=True, help='More leaves out more detail.')
@click.option('--smoothing', type=int, default=CLOSE['smoothing'], show_default=True,
              help='How often corners are rounded: 2 looks drawn, 1 is nearer to the picture.')
@click.option('--stroke', type=float, default=CLOSE['stroke'], show_default=True,
              help='Width of the lines that close gaps, in px.')
@click.option('--longest-edge', type=float, default=CLOSE['longest_edge'], show_default=True,
              help='Split straight borders into pieces of so many px: less keeps corners sharper, in larger files.')
@click.option('--background/--no-background', default=True, show_default=True)
@device_option
@overwrite_option
def vectorize(
        images: tuple[str, ...],
        out: Path,
        max_side: int,
        regions: int | None,
        tolerance: float,
        smoothing: int,
        stroke: float,
        longest_edge: float,
        background: bool,
        device: str,
        overwrite: bool,
) -> None:
    """Draw IMAGES (files, folders, tars, globs) as SVG: a path of smooth curves for each region.

    A file that is no picture, or is not there, is reported at the end on standard error; the others are still drawn,
    and the exit status is 1.
    """
    with clean_errors():
        model = RasterToVector(
            target=regions, tolerance=tolerance, smoothing=smoothing, stroke=stroke, longest_edge=longest_edge,
            patch_size=32 if background else None).to(device)
        pictures = Pictures(images)
        broken = list(pictures.broken)
        paths: dict[Path, str] = {}
        for i in range(len(pictures)):
            file = pictures.name(i)
            path = out / f'{Path(file).stem}.svg'
            if path in paths:
                raise ValueError(f'{printable(file)} and {printable(paths[path])} would both be {path}: rename one.')
            paths[path] = file
        check_overwrite(list(paths), overwrite)
        if paths:
            out.mkdir(parents=True, exist_ok=True)
        for i, path in enumerate(paths):
            begin = time.monotonic()
            try:
                svg, = model(to_input(pictures[i][0], max_side).to(device))
            except PictureError as e:
                broken.append(str(e))
                continue
            except ValueError as e:  # the options leave nothing of its outlines
                broken.append(f'{printable(paths[path])}: {e}')
                continue
            write_whole(path, svg)
            click.echo(f'{printable(path)}  {svg.count("<path")} paths, {path.stat().st_size / 1024:.0f} KiB, '
                       f'{time.monotonic() - begin:.1f} s')
    report_broken(broken)
