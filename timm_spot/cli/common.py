"""What the sub-commands share: the group, models by name, errors in one line."""
from __future__ import annotations

import sys
import traceback
import warnings
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, Callable, Iterator

import click
from safetensors import SafetensorError
from torch import nn

from .. import __version__
from ..models.loading import create_checked
from ..tasks.evaluation.families import Family, family_of
from ..tasks.extras import install_hint
from ..tasks.pictures.files import printable
from ..tasks.pictures.saliency_maps import choose_prior
from .params import check_model_name, is_onnx, told


@click.group(context_settings=dict(help_option_names=['-h', '--help'], max_content_width=120))
@click.version_option(__version__)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Vision Transformers off the grid."""
    ctx.call_on_close(_show_warnings_in_one_line())
    for stream in (sys.stdout, sys.stderr):  # in a locale without UTF-8 a letter it lacks is no reason to stop
        if isinstance(stream, TextIOWrapper) and stream.errors == 'strict':
            stream.reconfigure(errors='backslashreplace')


def _show_warnings_in_one_line() -> Callable[[], None]:
    """Until what is returned is called."""
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *_: click.secho(f'warning: {message}', fg='yellow', err=True)

    def restore() -> None:
        warnings.showwarning = shown

    return restore


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turn what a user can put right into one line and exit status 1; errors of a program keep their traceback."""
    try:
        yield
    except ModuleNotFoundError as e:
        hint = install_hint(e)
        if hint is None:
            raise
        raise click.ClickException(hint) from e
    except (TypeError, ImportError) as e:
        if not _is_told(e):
            raise
        raise told(e) from e
    except (ValueError, RuntimeError, OSError, SafetensorError) as e:
        raise told(e) from e


def _is_told(error: Exception) -> bool:
    """Whether someone wrote `raise` for it, and not Python stumbled over a mistake in a program."""
    return (traceback.extract_tb(error.__traceback__)[-1].line or '').startswith('raise ')


def create_any_model(name: str, weights: str | None = None, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """A timm model in eval mode with its weights; for an unknown name an error with the closest known ones.

    Args:
        name: See `check_model_name`.
        weights: File of the weights, by default the registered ones.
        pretrained: Leave the weights at random otherwise, unless there is a file.
        **kwargs: Of `timm.create_model`; None stands for the model's own.
    """
    if is_onnx(name):
        return _open_file(name, dict(kwargs, weights=weights))
    name = check_model_name(name)
    overlay = dict(file=weights) if weights else None
    try:
        model = create_checked(
            name, pretrained=pretrained or weights is not None, pretrained_cfg_overlay=overlay, **kwargs)
    except TypeError as e:  # of a keyword that it does not take, or that its config.json sets to nonsense
        raise ValueError(f'{name} cannot be made: {e}') from e
    return model.eval()


def _open_file(name: str, given: dict[str, Any], n_tokens: int | None = None) -> nn.Module:
    """An exported file as a model; what is given beside its budget is an error."""
    from ..tasks.deploy.onnx_family import open_classifier

    useless = [f'--{option}' for option, value in given.items() if value is not None]
    if useless:
        raise ValueError(f"{name} is as it was exported: leave out {' and '.join(useless)}.")
    return open_classifier(name, n_tokens)


def create_model(
        name: str, weights: str | None = None, n_tokens: int | None = None, **kwargs: Any) -> nn.Module:
    """A model of one of our families, see `create_any_model`; an error for any other.

    Args:
        name: Likewise.
        weights: Likewise.
        n_tokens: Budget, by default the model's own.
        **kwargs: Likewise.
    """
    model = create_any_model(name, weights, **kwargs)
    family = family_of(model)
    if not family.patterns:
        raise ValueError(f'{name} is no model of timm_spot: `timm-spot models` lists those that are.')
    if n_tokens is not None:
        family.set_budget(model, n_tokens)
    return model


def create_subpixel_model(name: str, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """A model of ours that places its tokens; an error, before any weights are read, for others."""
    family = family_of(create_model(name, pretrained=False, device='meta'))
    if not family.has_samplers:
        raise ValueError(f'{name} is a {family.name} model, whose {family.tokens}: this command is for subpixel ViTs.')
    return create_model(name, weights, **kwargs)


def create_placed_model(
        name: str,
        weights: str | None = None,
        *,
        device: str = 'cpu',
        sampler: str | None = None,
        saliency: str | None = None,
        **given: Any,
) -> nn.Module:
    """A model of ours on a device, with the budget, placer, coverage and seed of a command line.

    What does not suit the model's family is refused before any weights are read, sampler and saliency included; these
    two `set_prior` gives to the model.
    """
    if is_onnx(name):
        n_tokens = given.pop('n_tokens', None)
        given = dict(given, weights=weights, sampler=sampler, saliency=saliency)
        return _open_file(name, given, n_tokens).to(device)
    family = family_of(create_model(name, pretrained=False, device='meta'))
    check_placement(family, dict(given, sampler=sampler, saliency=saliency))
    return create_model(name, weights, **given).to(device)


def check_placement(family: Family, given: dict[str, Any]) -> None:
    """Raise ValueError for options on where tokens lie, given to a family whose models find that themselves."""
    options = ('sampler', 'saliency', 'placer', 'coverage', 'seed')
    useless = [f'--{name}' for name in options if given.get(name) is not None]
    if useless and not family.has_samplers:
        raise ValueError(f"a {family.name} model's {family.tokens}: leave out {' and '.join(useless)}.")


def set_prior(
        model: nn.Module, sampler: str | None, saliency: str | None, transform: Callable[..., Any],
) -> Callable[..., Any]:
    """`choose_prior`, for which families without samplers have no use."""
    family = family_of(model)
    if family.has_samplers:
        return choose_prior(model, sampler, saliency, transform)
    check_placement(family, dict(sampler=sampler, saliency=saliency))
    return lambda *_: None


def kinds_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the drawings that can be made of a model, the usual one first.

    Raises:
        ValueError: There are none.
    """
    family = family_of(model)
    if not family.kinds:
        raise ValueError(f'nothing can be drawn of a {family.name} model, whose {family.tokens}.')
    return family.kinds


def warn_of_foreign(files: list[str]) -> None:
    """Say of pictures that a model of digits is given, if there are any, that it reads no such."""
    if files:
        more, kind = (f' and {len(files) - 1} more', 'are none') if len(files) > 1 else ('', 'is none')
        click.secho(
            f'warning: this model reads digits on canvases of 64 x 64 pixels; {printable(files[0])}{more} {kind}: '
            'for photographs give another --model', fg='yellow', err=True)


def report_broken(messages: list[str]) -> None:
    """Name what could not be done, after all that could, and end with exit status 1 if there is any."""
    for message in messages:
        click.secho(f'error: {message}', fg='red', err=True)
    if messages:
        raise SystemExit(1)
