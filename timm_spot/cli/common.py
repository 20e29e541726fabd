"""What the sub-commands share: the group, models by name, errors in one line."""
from __future__ import annotations

import difflib
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Optional

import click
import timm
from safetensors import SafetensorError
from torch import nn

import timm_spot

from ..models.loading import create_checked
from ..tasks.pictures.saliency_maps import choose_prior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH_SIZE = 32
DEFAULT_MODEL = 'spot_vit_pico_patch8_64'
NAMES = ['spot_*', 'dht_*', 'relevance_spot_*']


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
        known = timm.list_models(NAMES) + timm.list_models(NAMES, include_tags=True)
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(close)}?" if close else ''
        raise ValueError(f'unknown model {name}.{hint} `timm-spot models` lists them all.')
    overlay = dict(file=weights) if weights else None
    return create_checked(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def create_model(name: str, weights: Optional[str] = None, **kwargs: Any) -> nn.Module:
    """A model of ours, see `create_any_model`; an error for any other."""
    model = create_any_model(name, weights, **kwargs)
    if not isinstance(model, timm_spot.models.SubpixelVisionTransformer) and not is_dht(model):
        raise ValueError(f'{name} is no model of timm_spot: `timm-spot models` lists those that are.')
    return model


def create_subpixel_model(name: str, weights: Optional[str] = None, **kwargs: Any) -> nn.Module:
    """A model of ours that places its tokens; an error for a dHT model."""
    model = create_model(name, weights, **kwargs)
    if is_dht(model):
        raise ValueError(
            f'{name} is a dHT model, whose tokens are regions that it finds itself: this command is for subpixel ViTs.')
    return model


def is_dht(model: nn.Module) -> bool:
    return isinstance(model, timm_spot.models.DhtVisionTransformer)


saliency_option = click.option(
    '--saliency', metavar='spectral|attention:NAME|FOLDER',
    help="Map for the salient samplers (without --sampler: 'salient'): spectral residual, the attention of a "
         'pretrained timm ViT, or a folder with a map for each picture.')


def set_prior(
        model: nn.Module, sampler: Optional[str], saliency: Optional[str], transform: Callable[..., Any],
) -> Callable[..., Any]:
    """`choose_prior`, which a dHT model has no use for: its tokens follow the image."""
    if not is_dht(model):
        return choose_prior(model, sampler, saliency, transform)
    if sampler or saliency:
        raise ValueError('a dHT model finds its tokens itself: leave out --sampler and --saliency.')
    return lambda *_: None


def save_figure(figure: Figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    try:
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)
