"""`timm-spot play`."""
from __future__ import annotations

import webbrowser
from pathlib import Path

import click

from ..tasks.extras import need
from ..tasks.pictures.files import printable
from ..tasks.play.server import listen, serve
from ..tasks.play.stage import Stage
from ..tasks.play.static import write_static
from .common import clean_errors, create_subpixel_model, main
from .options import model_option, weights_option
from .params import Number, OutputFolder

PLAY_MODEL = 'spot_vit_pico_patch8_64.digits_placed'
PORT = Number(int, 0, 65535)


@main.command()
@click.argument('images', nargs=-1)
@model_option(default=PLAY_MODEL, show_default=True)
@weights_option
@click.option('--port', type=PORT, default=8646, show_default=True, help='Of this machine; 0 for any that is free.')
@click.option('--browser/--no-browser', default=True, help='Open the page, or only say where it is.')
@click.option('--static', 'folder', type=OutputFolder(), metavar='DIR',
              help='Write the page into a new folder instead, with the exported model, for any file server (needs the '
                   'extra export, and npm for onnxruntime-web); without the search and pruning.')
def play(
        images: tuple[str, ...],
        name: str,
        weights: str | None,
        port: int,
        browser: bool,
        folder: Path | None,
) -> None:
    """Open a page on which tokens are dragged over a picture while the prediction follows.

    IMAGES (files, folders, tars, globs) are the pictures to begin with, by default some in the package; others are
    dropped or pasted on the page. Nobody but this machine is served, and nothing is fetched from elsewhere.
    """
    with clean_errors():
        if folder is not None:
            need('onnxruntime')
            need('onnxscript')
            files = write_static(Stage(create_subpixel_model(name, weights), name, images), folder)
            size = sum(file.stat().st_size for file in files) / 1e6
            where = printable(folder)
            click.echo(f'{where}  {len(files)} files, {size:.0f} MB; python -m http.server -d {where}')
            return
        need('starlette')
        need('uvicorn')
        with listen(port) as opened:
            stage = Stage(create_subpixel_model(name, weights), name, images)
            address = f'http://127.0.0.1:{opened.getsockname()[1]}/'
            click.echo(f'{address}  {name}; Ctrl-C ends')
            if browser:
                webbrowser.open(address)
            serve(stage, opened)
