"""`timm-spot convert`, `timm-spot export` and `timm-spot push`."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..tasks.pictures.files import printable
from .common import clean_errors, create_subpixel_model, main
from .options import (
    coverage_option,
    overwrite_option,
    placer_option,
    sampler_option,
    seed_option,
    weights_option,
)
from .params import BUDGET, ModelName, OutputFile, OutputFolder


@main.command()
@click.argument('source')
@click.argument('dest', type=OutputFolder())
@click.option('--model', type=ModelName(), help="timm's name of what the weights belong to, where SOURCE does not say.")
def convert(source: str, dest: Path, model: str | None) -> None:
    """Convert SOURCE into the folder DEST: safetensors, config.json, model card.

    SOURCE is the authors' .pth, a timm checkpoint (.pth, .pth.tar, .safetensors) of a subpixel ViT or of any ViT that
    can be retrofitted, a model folder, or ORG/NAME on the Hugging Face Hub. No pickled code is ever run. What was
    written is loaded back and compared.
    """
    from ..tasks.publishing import convert as conversion

    with clean_errors():
        click.echo(conversion.convert(source, dest, model))
    click.echo(f'\ntimm.create_model({f"local-dir:{dest}"!r}, pretrained=True)')


@main.command()
@click.argument('name', type=ModelName(ours=True), metavar='MODEL')
@click.argument('out', type=OutputFile('.onnx', '.pt2'), metavar='OUT.onnx|OUT.pt2')
@weights_option
@click.option('--n-tokens', type=BUDGET, help='The one budget of the file, for images of one size; by default an .onnx '
              "takes any of both, a .pt2 has the model's own.")
@sampler_option
@placer_option
@coverage_option
@seed_option()
@click.option('--positions-as-input', is_flag=True,
              help='Let the placement of each image, of any budget, be an input: (B, N, 2), with a coverage (B, N, 4).')
@click.option('--uint8', is_flag=True, help='Let images be bytes, which the file normalises.')
@click.option('--int8', is_flag=True, help='Multiply bytes: a quarter of the size, and faster on a CPU.')
@click.option('--fp16', is_flag=True, help='Half precision, for runtimes on a GPU.')
@click.option('--calibrate', metavar='FOLDER', help='Pictures (a folder, a tar, digits) by which the scales of --int8 '
              'are found once for all; by default they follow from each token.')
@click.option('--verify', metavar='FOLDER', help='Pictures on which --int8 and --fp16 are compared with the model; by '
              'default the other half of --calibrate.')
@click.option('--force', is_flag=True, help='Keep a file that loses more than 0.5 points, or without labels answers '
              'otherwise on more than 3 % of the pictures.')
@overwrite_option
def export(
        name: str,
        out: Path,
        overwrite: bool,
        positions_as_input: bool,
        uint8: bool,
        int8: bool,
        fp16: bool,
        calibrate: str | None,
        verify: str | None,
        force: bool,
        n_tokens: int | None,
        **placement: Any,
) -> None:
    """Write MODEL as ONNX or as PyTorch's exported program.

    MODEL is a name, hf-hub:ID, local-dir:PATH or a folder with a config.json. The batch is dynamic. What was written
    is loaded back and compared. An .onnx is run by `timm_spot.OnnxModel`, and by `--model OUT.onnx` of predict and
    evaluate.
    """
    from ..tasks.deploy.onnx_export import OnnxOptions, precision_of
    from ..tasks.evaluation.ways import image_size
    from ..tasks.kept import check_overwrite
    from ..tasks.publishing.export import export_with

    with clean_errors():
        precision = precision_of(int8, fp16)
        options = OnnxOptions(positions_as_input, n_tokens, uint8, precision, calibrate, verify, force)
        check_overwrite([out], overwrite)
        model = create_subpixel_model(name, **placement)
        if image_size(model) != tuple(model.patch_embed.img_size):  # the size at which the other commands run it
            model.set_input_size(image_size(model))
        difference, fidelity = export_with(model, out, options, overwrite)
    size = out.stat().st_size / 1e6
    click.echo(f'{printable(out)} ({size:.1f} MB), largest difference to the model {difference:.1g}')
    if fidelity is not None:
        click.echo(str(fidelity))


@main.command()
@click.argument('folder', type=click.Path(path_type=Path))
@click.argument('repo_id', metavar='ORG/NAME')
@click.option('--private', is_flag=True, help='Make a new repository private.')
@click.option('--revision', help='Branch to push to; made if there is none.')
@click.option('--dry-run', is_flag=True, help='Check the folder and say what would be sent; send nothing.')
def push(folder: Path, repo_id: str, private: bool, revision: str | None, dry_run: bool) -> None:
    """Publish FOLDER, as `timm-spot convert` writes it, on the Hugging Face Hub.

    Sends the weights (safetensors), config.json and the model card; with a results.csv in the folder the card shows
    its accuracies. Log in first: `hf auth login`.
    """
    from ..tasks.publishing import hub

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
