"""What the values of options must be: refused in one line, before a model loads or anything is written."""
from __future__ import annotations

import difflib
import math
import os
from pathlib import Path
from typing import Any

import click
import timm
import torch

from ..models.checkpoint_file import check_utf8
from ..models.placement import get_placer, list_placers
from ..models.pruning_scorers import get_scorer
from ..ops.samplers import get_sampler
from ..tasks.drawing.kinds import KINDS
from ..tasks.evaluation.families import name_patterns
from ..tasks.pictures.saliency_maps import SELF, WITHOUT_WEIGHTS
from ..tasks.search.settings import MAX_STEPS

MAX_BUDGET = 1_000_000  # tokens: the pixels of an image of 1,000 x 1,000
MAX_SEED = 2 ** 32 - 1


def told(error: Exception) -> click.ClickException:
    """An error as a line on standard error and exit status 1; bytes of names that are no UTF-8 as escapes."""
    text = str(error) or type(error).__name__
    return click.ClickException(text.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace'))


class _Param(click.ParamType):
    """A type whose refusals are `clean_errors`' lines: exit status 1, no usage text around them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.check(value, param.name if param is not None else self.name)
        except (ValueError, OSError) as e:
            raise told(e) from e

    def check(self, value: Any, name: str) -> Any:
        """The value as the command takes it; ValueError or OSError says what is wrong with it."""
        raise NotImplementedError


class Number(_Param):
    """A finite number in a range.

    Args:
        kind: int or float.
        low: Smallest, or what it must exceed if `above`.
        high: Largest.
        above: Refuse `low` itself.
        why: Where the range comes from, where it does not speak for itself.
    """

    def __init__(self, kind: type, low: float, high: float = math.inf, above: bool = False, why: str = '') -> None:
        self.kind, self.low, self.high, self.above, self.why = kind, low, high, above, why
        self.name = 'integer' if kind is int else 'number'

    def check(self, value: Any, name: str) -> Any:
        whole = 'a whole number' if self.kind is int else 'a number'
        least = f'above {self.low:,}' if self.above else f'of at least {self.low:,}'
        most = '' if math.isinf(self.high) else f' and at most {self.high:,}'
        rule = f'must be {whole} {least}{most}{self.why and f" ({self.why})"}'
        try:
            number = self.kind(value)
        except (ValueError, OverflowError):
            raise ValueError(f'{name}={value} {rule}.') from None
        above_low = number > self.low if self.above else number >= self.low
        if not (above_low and number <= self.high and math.isfinite(number)):
            raise ValueError(f'{name}={value} {rule}.')
        return number


BUDGET = Number(int, 1, MAX_BUDGET)
SEED = Number(int, 0, MAX_SEED, why='with the number of an image it makes the seed of its draw')
COUNT = Number(int, 1, MAX_BUDGET)
STEPS = Number(int, 0, MAX_STEPS)
POSITIVE = Number(float, 0, above=True)
SHARE = Number(float, 0, 1, above=True)
COVERAGE = Number(float, 0, 1)


class Items(click.ParamType):
    """Values separated by commas, each of a type of its own."""

    name = 'list'

    def __init__(self, item: click.ParamType) -> None:
        self.item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self.item.convert(part.strip(), param, ctx) for part in value.split(',') if part.strip())


class SamplerName(_Param):
    """A registered spatial prior."""

    name = 'name'

    def check(self, value: str, name: str) -> str:
        get_sampler(value)
        return value


class StartName(_Param):
    """A registered spatial prior, or the placer of the model."""

    name = 'name'

    def check(self, value: str, name: str) -> str:
        if value not in list_placers():
            get_sampler(value)
        return value


class PlacerName(_Param):
    """A registered placer."""

    name = 'name'

    def check(self, value: str, name: str) -> str:
        get_placer(value)
        return value


class ScorerName(_Param):
    """What tokens are judged by."""

    name = 'name'

    def check(self, value: str, name: str) -> str:
        get_scorer(value)
        return value


class SaliencyName(_Param):
    """'spectral', 'energy', 'self', 'attention:NAME' or a folder."""

    name = 'source'

    def check(self, value: str, name: str) -> str:
        kind, _, vit = value.partition(':')
        if kind == 'attention':
            check_model_name(vit)
        elif value not in (SELF, *WITHOUT_WEIGHTS) and not Path(value).is_dir():
            raise FileNotFoundError(
                f"saliency={value!r} is none of: 'spectral', 'energy', 'self', 'attention:NAME', a folder of maps.")
        return value


class KindName(_Param):
    """A kind of drawing."""

    name = 'kind'

    def check(self, value: str, name: str) -> str:
        if value not in KINDS:
            raise ValueError(f"kind={value!r} is unknown, the kinds of drawing are {', '.join(KINDS)}.")
        return value


class ModelName(_Param):
    """A name of timm's, hf-hub:ID, local-dir:PATH, or a folder as timm saves one, which becomes local-dir:PATH.

    Args:
        ours: Whether only names of our own families are taken.
        files: Whether an exported .onnx is taken too.
    """

    name = 'model'

    def __init__(self, ours: bool = False, files: bool = False) -> None:
        self.ours, self.files = ours, files

    def check(self, value: str, name: str) -> str:
        if not is_onnx(value):
            return check_model_name(value, self.ours)
        if not self.files:
            raise ValueError(f'{value} is an exported file, which predict and evaluate take: give the model itself.')
        return InputFile().check(value, name)


def is_onnx(name: str) -> bool:
    """Whether a model is given as an exported file."""
    return name.lower().endswith('.onnx')


def check_model_name(value: str, ours: bool = False) -> str:
    """A model's name as `timm.create_model` takes it.

    Raises:
        ValueError: An unknown name (with the closest known ones), or one that is not of our own families.
        FileNotFoundError: A folder that holds no model.
    """
    scheme, _, rest = value.partition(':')
    if Path(value).is_dir() and not timm.is_model(value):
        scheme, rest = 'local-dir', value
    if scheme.replace('_', '-') == 'local-dir':
        if not Path(rest, 'config.json').is_file():
            raise FileNotFoundError(f'{rest} holds no config.json: it is no folder of a model.')
        return f'local-dir:{rest}'
    if scheme.replace('_', '-') == 'hf-hub' and rest:
        return value
    if ':' in value:
        raise ValueError(
            f'unknown model {value}: give a name, hf-hub:ID, local-dir:PATH or a folder with a config.json.')
    if not timm.is_model(value):
        patterns = name_patterns() if ours else '*'
        known = timm.list_models(patterns) + timm.list_models(patterns, include_tags=True)
        close = difflib.get_close_matches(value, known, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(close)}?" if close else ''
        raise ValueError(f'unknown model {value}.{hint} `timm-spot models` lists them all.')
    architecture, _, tag = value.partition('.')
    if ours and architecture not in timm.list_models(name_patterns()):
        raise ValueError(f'{value} is no model of timm_spot: `timm-spot models` lists those that are.')
    tagged = timm.list_models(f'{architecture}.*', include_tags=True)
    if tag and value not in tagged:
        raise ValueError(f"{architecture} has no weights {tag!r}: {', '.join(tagged) or 'it has none at all'}.")
    return value


class DeviceName(_Param):
    """A device of torch that this machine has."""

    name = 'device'

    def check(self, value: str, name: str) -> str:
        try:
            device = torch.device(value)
        except RuntimeError:
            raise ValueError(f'device={value!r} is no device of torch: give cpu, cuda, cuda:1 or mps, say.') from None
        if device.type == 'cpu':
            return value
        try:
            module = torch.get_device_module(device)
            count = module.device_count() if module.is_available() else 0
        except (AttributeError, RuntimeError):  # torch was built without it
            count = 0
        if (device.index or 0) >= count:
            found = f'it has {count} of that kind' if count else 'it has none of that kind'
            raise ValueError(f'device={value!r} is not on this machine: {found}.')
        return value


class InputFile(_Param):
    """A file that is there."""

    name = 'file'

    def check(self, value: str, name: str) -> str:
        if not Path(value).exists():
            raise FileNotFoundError(f'{name}: {value} does not exist.')
        if Path(value).is_dir():
            raise IsADirectoryError(f'{name}: {value} is a folder, not a file.')
        return value


class OutputFile(_Param):
    """A file that can be written, in a folder that is there.

    Args:
        suffixes: What its name may end in; by default anything.
    """

    name = 'file'

    def __init__(self, *suffixes: str) -> None:
        self.suffixes = suffixes

    def check(self, value: str | Path, name: str) -> Path:
        path = Path(value)
        check_suffix(path, self.suffixes)
        if path.is_dir():
            raise IsADirectoryError(f'{name}: {path} is a folder, not a file.')
        if not path.parent.is_dir():
            raise NotADirectoryError(f'{name}: there is no folder {path.parent} to write {path.name} to.')
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f'{name}: the folder {path.parent} cannot be written to.')
        return path


class OutputFolder(_Param):
    """A folder that is there or can be made, and can be written to.

    Args:
        holds_weights: Whether safetensors files go there, whose names are in UTF-8.
    """

    name = 'folder'

    def __init__(self, holds_weights: bool = False) -> None:
        self.holds_weights = holds_weights

    def check(self, value: str | Path, name: str) -> Path:
        path = Path(value)
        if self.holds_weights:
            check_utf8(path)
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not there.is_dir():
            raise NotADirectoryError(f'{name}: {there} is a file, not a folder.')
        if not os.access(there, os.W_OK):
            raise PermissionError(f'{name}: the folder {there} cannot be written to.')
        return path


def check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise ValueError unless a file's name ends in one of the suffixes, if any are given."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f'{path} must end in {" or ".join(map(repr, suffixes))}.')
