"""The options that commands share: each means the same, and is checked in the same way, wherever it stands."""
from __future__ import annotations

from typing import Any, Callable

import click

from .params import (
    BUDGET,
    COUNT,
    COVERAGE,
    SEED,
    DeviceName,
    InputFile,
    ModelName,
    Number,
    PlacerName,
    SaliencyName,
    SamplerName,
)

BATCH_SIZE = 32
DEFAULT_MODEL = 'spot_vit_pico_patch8_64'

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Renamed(click.Option):
    """An option whose older spellings are still taken, but no longer shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        spellings, self.opts = self.opts, self.opts[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = spellings


def model_option(ours: bool = True, parameter: str = 'name', files: bool = False, **settings: Any) -> Decorator:
    """`--model`: any model of timm_spot or, unless `ours`, of timm; with `files` also an exported .onnx."""
    which = ', or a .onnx that `export` wrote' if files else ''
    settings.setdefault('help', f'Name, hf-hub:ID, local-dir:PATH or a folder with a config.json{which}.')
    return click.option('--model', parameter, type=ModelName(ours, files), **settings)


weights_option = click.option(
    '--weights', type=InputFile(), help="Checkpoint: timm_spot's, the authors' or a timm ViT's.")
n_tokens_option = click.option('--n-tokens', type=BUDGET, help='Budget; by default that of the model.')
sampler_option = click.option(
    '--sampler', type=SamplerName(), help='Spatial prior that places the tokens; by default that of the model.')
saliency_option = click.option(
    '--saliency', type=SaliencyName(), metavar='spectral|energy|self|attention:NAME|FOLDER',
    help="Map for the salient samplers (without --sampler: 'salient'): spectral residual, local energy, the attention "
         "of the model's own last block at its full budget or of a pretrained timm ViT, or a folder with a map for "
         'each picture.')
placer_option = click.option(
    '--placer', type=PlacerName(), help="What places the tokens, by its registered name; by default that of the model.")
coverage_option = click.option(
    '--coverage', type=COVERAGE, help='How much of its cell a window covers, from 0 (a pixel a sample) to 1 (windows '
                                      'tile the picture); by default that of the model.')
device_option = click.option(
    '--device', type=DeviceName(), default='cpu', show_default=True, help='Where the model runs: cpu, cuda, cuda:1 ...')
amp_option = click.option(
    '--amp', '--amp-dtype', 'amp', cls=Renamed, type=click.Choice(['bfloat16', 'float16']),
    help='Run the model under autocast.')
class_map_option = click.option(
    '--class-map', default='', help="Names of the model's classes in order, one a line, for a folder or tar.")
workers_option = click.option(
    '--workers', type=Number(int, 0, 1024), default=0, show_default=True, help='Processes that read pictures.')
overwrite_option = click.option('--overwrite', is_flag=True, help='Write over what is there.')


def batch_size_option(default: int = BATCH_SIZE) -> Decorator:
    """`--batch-size`: images that the model sees at a time."""
    return click.option(
        '--batch-size', type=COUNT, default=default, show_default=True, help='Images that the model sees at a time.')


def seed_option(default: int | None = None) -> Decorator:
    """`--seed`: of placements that are drawn."""
    return click.option(
        '--seed', type=SEED, default=default, show_default='that of the model' if default is None else True,
        help='For samplers that draw.')
