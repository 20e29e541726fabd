"""Models built with weights that were checked: our own from their entrypoints, any other of timm's by its name.

What a file does not fill is named, in an error, unless the caller asked for it to be fresh.
"""
from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    model_entrypoint,
    parse_model_name,
    resolve_model_input_args,
    split_model_name_tag,
)
from torch import nn

from .checkpoint_file import StateDict, shorten
from .download import CheckedSource, check_source, download, prefer_file
from .subpixel_embed import SIZE_WEIGHT

_SOURCE_FIELDS = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load')


def build_checked(
        model_cls: Callable[..., nn.Module],
        variant: str,
        pretrained: bool,
        pretrained_cfg: PretrainedCfg,
        pretrained_filter_fn: Callable[[StateDict, nn.Module], StateDict] | None = None,
        checked: CheckedSource | None = None,
        **kwargs: Any,
) -> nn.Module:
    """`timm.models.build_model_with_cfg` that checks where the weights come from, and that they fill the model.

    A caller asks for a fresh head by `num_classes=`, and for whatever else is missing by `pretrained_strict=False`;
    arguments that were saved beside the weights ask for nothing.

    Args:
        model_cls, variant, pretrained, pretrained_cfg, pretrained_filter_fn: As in timm.
        checked: What `check_source` gave for the config, if it was asked before.
        **kwargs: Of timm's function and of the model.

    Raises:
        ValueError: The file is no checkpoint, its weights are unusable or not those of the model.
        OSError: As `check_source`.
    """
    if not pretrained:
        return build_model_with_cfg(model_cls, variant, False, pretrained_cfg=pretrained_cfg, **kwargs)
    cfg, _ = checked or check_source(pretrained_cfg, kwargs.get('cache_dir'))
    saved = kwargs.get('pretrained_model_args') or {}
    asked = {k for k in ('num_classes', 'pretrained_strict') if k in kwargs and kwargs[k] != saved.get(k)}
    strict = kwargs.pop('pretrained_strict', True) or 'pretrained_strict' not in asked
    fresh_head = 'num_classes' in asked or kwargs.get('features_only', False)
    where = 'state_dict' if cfg.state_dict else str(cfg.file)

    def filter_and_check(state_dict: StateDict, model: nn.Module) -> StateDict:
        if pretrained_filter_fn is not None:
            state_dict = pretrained_filter_fn(state_dict, model)
        if strict:
            check_fit(state_dict, model, where, variant, fresh_head)
        return state_dict

    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Detected pickle protocol')
        model = build_model_with_cfg(
            model_cls, variant, True, pretrained_cfg=cfg, pretrained_filter_fn=filter_and_check,
            pretrained_strict=False, **kwargs)  # by timm; it is by us
    _name_source(model, pretrained_cfg)
    return model


def check_fit(
        state_dict: StateDict,
        model: nn.Module,
        where: str,
        variant: str,
        fresh_head: bool = False,
) -> None:
    """Raise ValueError, with the names, unless weights fill a model.

    Args:
        state_dict: Under the model's own names.
        model: Built, not yet filled; timm adapts the channels of its first convolution and drops a head later on.
        where: What the weights were read from.
        variant: The model's name.
        fresh_head: Whether its classifier may stay as it is.
    """
    target = model.state_dict()
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    names = cfg.get('classifier') or ()
    head = tuple(f'{name}.' for name in ([names] if isinstance(names, str) else names))
    dropped = head and getattr(model, 'num_classes', None) != cfg.get('num_classes')  # by timm, whatever it is
    free = head if fresh_head else ()
    stem = cfg.get('first_conv') if getattr(model, 'in_chans', None) != (cfg.get('input_size') or [3])[0] else None
    missing = [
        k for k in target if not k.startswith(free) and (k not in state_dict or (dropped and k.startswith(head)))]
    unknown = [k for k in state_dict if k not in target and not k.startswith(head)]
    shapes = [
        f'{k} {tuple(v.shape)} instead of {tuple(target[k].shape)}' for k, v in state_dict.items()
        if k in target and v.shape != target[k].shape and not (dropped and k.startswith(head))
        and not (k == f'{stem}.weight' and v.ndim == 4)]
    faults = [
        f'{what} {shorten(names)}'
        for what, names in (('it lacks', missing), ('the model has no', unknown), ('shapes differ:', shapes)) if names]
    if SIZE_WEIGHT in unknown:
        faults.append('its tokens are told their size, which size_embed=True asks for')
    if dropped and any(k.startswith(head) for k in missing):
        faults.append(f"it is said to have num_classes={cfg.get('num_classes')}, the model has {model.num_classes}")
    if faults:
        raise ValueError(
            f"the weights in {where} are not those of {variant}: {'; '.join(faults)}. Give the model and the keywords "
            'that they were made with (num_classes= for a fresh head).')


def create_checked(
        name: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
) -> nn.Module:
    """`timm.create_model` whose weights are checked, for models of timm's own too.

    Args:
        name: A name that timm knows, 'hf-hub:ORG/NAME' or 'local-dir:FOLDER'.
        pretrained: Whether to load weights.
        pretrained_cfg: As in timm.
        pretrained_cfg_overlay: As in timm; a `file` in it comes before what the name says.
        cache_dir: Folder of the cache instead of the client's own.
        **kwargs: Of the model.

    Raises:
        ValueError: config.json or the weights are damaged, unusable or do not fit.
        OSError: As `download`.
    """
    architecture, name, overlay, config = _find_source(name, pretrained_cfg_overlay, cache_dir)
    if 'pretrained_strict' in config.get('model_args', {}):
        kwargs.setdefault('pretrained_strict', True)
    arguments = dict(pretrained_cfg=pretrained_cfg, cache_dir=cache_dir, **kwargs)
    if not pretrained or _is_ours(architecture):
        return timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=overlay or None, **arguments)

    resolved = resolve_model_input_args(name, pretrained_cfg_overlay=overlay, **arguments)
    cfg = PretrainedCfg(**resolved['pretrained_cfg'])
    checked = check_source(cfg, cache_dir).cfg
    if checked.file:
        overlay.update(file=checked.file, source=None, custom_load=checked.custom_load)
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay or None, **arguments)
    except RuntimeError as e:
        if 'loading state_dict' not in str(e):
            raise
        reason = ' '.join(str(e).split())
        raise ValueError(f'the weights in {checked.file} are not those of {architecture}: {reason[:400]}') from e
    _name_source(model, cfg)
    return model


def resolve_checked(name: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """`timm.models.resolve_model_input_args` of a name whose config.json is checked."""
    _, name, overlay, _ = _find_source(name, None, cache_dir)
    return resolve_model_input_args(name, pretrained_cfg_overlay=overlay, cache_dir=cache_dir)


def _find_source(
        name: str,
        overlay: dict[str, Any] | None,
        cache_dir: str | Path | None,
) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """What a name stands for.

    Returns:
        The architecture; a name for timm that needs no connection; the overlay, in which the place of the weights is
        named; the content of config.json, if there is one.
    """
    overlay = prefer_file(overlay)
    source, location = parse_model_name(name)
    if source is None:
        return split_model_name_tag(location)[0], name, overlay, {}
    file = download(location, ['config.json'], cache_dir) if source == 'hf-hub' else Path(location) / 'config.json'
    config = read_config(file)
    if source == 'hf-hub' and not overlay.get('file'):
        overlay.update(source='hf-hub', hf_hub_id=location, file=None)
    return config['architecture'], f'local-dir:{file.parent}', overlay, config


def read_config(file: str | Path) -> dict[str, Any]:
    """Read the config.json of a model folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged or no config of timm's, or contradicts itself in the number of classes.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f'{file} does not exist: a model folder has config.json beside its weights.')
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as e:
        raise ValueError(f'{file} is damaged, it is no JSON: {e}.') from e
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise ValueError(f"{file} is no config of timm's: expected is an object with the name of an 'architecture'.")
    if not timm.is_model(config['architecture']):
        raise ValueError(f"{file} names the architecture {config['architecture']!r}, which timm does not know.")
    for name in ('pretrained_cfg', 'model_args'):
        if not isinstance(config.get(name, {}), dict):
            raise ValueError(f'{file}: {name}={config[name]!r:.100} must be an object.')
    cfg, arguments = config.get('pretrained_cfg', config), config.get('model_args', {})
    _check_fields(cfg, file)
    classes, built = config.get('num_classes', cfg.get('num_classes')), arguments.get('num_classes')
    if None not in (classes, built) and classes != built:
        raise ValueError(
            f'{file} contradicts itself: num_classes={classes!r} of the weights, {built!r} of the model to build.')
    return config


def _check_fields(cfg: dict[str, Any], file: Path) -> None:
    """Raise ValueError unless the fields of a saved config that everything relies on are what they should be."""
    def is_number(value: Any, kinds: type | tuple[type, ...] = (int, float)) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)

    for name, kind, rule in (
            ('mean', (int, float), 'a list of numbers'),
            ('std', (int, float), 'a list of numbers'),
            ('input_size', int, 'three whole numbers (channels, height, width)'),
    ):
        value = cfg.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or not value or not all(is_number(v, kind) for v in value) or (
                name == 'input_size' and (len(value) != 3 or min(value) < 1)):
            raise ValueError(f'{file}: {name}={value!r:.100} must be {rule}.')
    if 'num_classes' in cfg and not is_number(cfg['num_classes'], int):
        raise ValueError(f"{file}: num_classes={cfg['num_classes']!r:.100} must be a whole number.")


def _is_ours(architecture: str) -> bool:
    """Whether an entrypoint of this package builds the model, and checks its weights."""
    if not timm.is_model(architecture):
        return False
    return model_entrypoint(architecture).__module__.partition('.')[0] == __name__.partition('.')[0]


def _name_source(model: nn.Module, cfg: PretrainedCfg) -> None:
    """Let a model's config say where its weights come from, not in which file of the cache they were found."""
    inner = getattr(model, 'model', None)  # features_only=True wraps it
    for module in (model, inner):
        if isinstance(module, nn.Module) and isinstance(getattr(module, 'pretrained_cfg', None), dict):
            for field in _SOURCE_FIELDS:
                module.pretrained_cfg.pop(field, None)
                if getattr(cfg, field) is not None:
                    module.pretrained_cfg[field] = getattr(cfg, field)
