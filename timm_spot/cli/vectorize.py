"""`timm-spot vectorize`."""
from __future__ import annotations

import time
from pathlib import Path

import click
from PIL import Image

from ..tasks.kept import check_overwrite, write_whole
from ..tasks.pictures.datasets import Pictures
from ..tasks.pictures.files import printable
from ..tasks.pictures.images import PictureError
from ..tasks.vectors.vectorize import MODES, Detail, picture_to_svg
from .common import clean_errors, main, report_broken
from .options import overwrite_option
from .params import COUNT, POSITIVE, OutputFolder


@main.command()
@click.argument('images', nargs=-1, required=True)
@click.option('--out', type=OutputFolder(), required=True, help='Folder for the SVGs.')
@click.option('--max-side', type=COUNT, default=512, show_default=True,
              help='Shrink pictures whose longer side exceeds this.')
@click.option('--regions', type=COUNT, help='Exactly so many; by default those that are worth their bytes.')
@click.option('--max-kb', type=POSITIVE, help='As many regions as fit in so many kB, of 1,000 bytes.')
@click.option('--psnr', type=POSITIVE, help='As few regions as come so near to the picture, in dB.')
@click.option('--mode', type=click.Choice(MODES), default='auto', show_default=True,
              help='auto: polygons, or curves where they make the file smaller and no worse.')
@click.option('--tolerance', type=POSITIVE, help='How far, in pixels, borders may move to become simpler.')
@overwrite_option
def vectorize(
        images: tuple[str, ...],
        out: Path,
        max_side: int,
        regions: int | None,
        max_kb: float | None,
        psnr: float | None,
        mode: str,
        tolerance: float | None,
        overwrite: bool,
) -> None:
    """Draw IMAGES (files, folders, tars, globs) as SVG: regions of one colour, with shared borders.

    A file that is no picture, or is not there, is reported at the end on standard error; the others are still drawn,
    and the exit status is 1.
    """
    with clean_errors():
        if out.suffix.lower() == '.svg' and not out.is_dir():
            raise ValueError(f'out={printable(out)} is to be a folder, in which each picture is drawn under its name.')
        detail = Detail(regions, max_kb, psnr, tolerance, mode)
        pictures = Pictures(images, alpha=True)
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
                picture, _ = pictures[i]
                if max(picture.size) > max_side:
                    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
                svg = picture_to_svg(picture, detail, title=printable(Path(paths[path]).stem))
            except PictureError as e:
                broken.append(str(e))
                continue
            except ValueError as e:  # the limits leave nothing of it
                broken.append(f'{printable(paths[path])}: {e}')
                continue
            write_whole(path, svg)
            click.echo(f'{printable(path)}  {svg.count("<path")} paths, {path.stat().st_size / 1000:.1f} kB, '
                       f'{time.monotonic() - begin:.1f} s')
    report_broken(broken)
