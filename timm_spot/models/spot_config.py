"""Settings of a subpixel ViT: which there are, where they come from, and which source wins.

In rising priority: the registered default, the `pretrained_cfg` (registered, from a Hub or local `config.json`, or a
dict), the model arguments saved beside it, `pretrained_cfg_overlay`, keywords of `timm.create_model`.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, get_pretrained_cfg, resolve_pretrained_cfg

from ..ops.samplers import check_budgets
from ..ops.sizes import check_coverage
from .download import prefer_file
from .prior import Prior, Saliency

PROJECT_PAGE = 'https://dsb-ifi.github.io/SPoT/'


@dataclasses.dataclass
class SpotPretrainedCfg(PretrainedCfg):
    """timm's PretrainedCfg with the placement that the weights are meant for; None leaves it to the model."""

    n_tokens: int | Sequence[int] | None = None
    sampler: str | None = None
    convention: str | None = None
    seed: int | None = None
    saliency: Saliency | None = None
    pos_nodes: int | None = None
    eval_n_tokens: int | None = None
    eval_sampler: str | None = None
    placer: str | None = None
    coverage: float | Sequence[float] | None = None
    eval_coverage: float | None = None
    n_coarse: int | None = None
    size_embed: bool | None = None


TIMM_FIELDS = tuple(f.name for f in dataclasses.fields(PretrainedCfg))
BOTH_MODES = ('n_tokens', 'sampler', 'coverage')  # eval mode follows training, unless its own is given
PLACEMENT_FIELDS = tuple(f.name for f in dataclasses.fields(SpotPretrainedCfg) if f.name not in TIMM_FIELDS)


def resolve_cfg(
        variant: str,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None,
        overlay: dict[str, Any] | None,
) -> SpotPretrainedCfg:
    """`timm.models.resolve_pretrained_cfg` that knows the placement fields."""
    if isinstance(pretrained_cfg, dict):
        pretrained_cfg = SpotPretrainedCfg(**pretrained_cfg)
    elif isinstance(pretrained_cfg, PretrainedCfg) and not isinstance(pretrained_cfg, SpotPretrainedCfg):
        pretrained_cfg = SpotPretrainedCfg(**vars(pretrained_cfg))
    return resolve_pretrained_cfg(variant, pretrained_cfg, prefer_file(overlay))


def timm_cfg(cfg: PretrainedCfg) -> PretrainedCfg:
    """The part of a config that timm's own loaders of saved configs know."""
    return PretrainedCfg(**{name: getattr(cfg, name) for name in TIMM_FIELDS})


def pop_placement(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the placement keywords out of a model's."""
    return {name: kwargs.pop(name) for name in PLACEMENT_FIELDS if name in kwargs}


def resolve_placement(
        cfg: Mapping[str, Any],
        saved: Mapping[str, Any],
        overlay: Mapping[str, Any],
        keywords: Mapping[str, Any],
) -> dict[str, Any]:
    """Placement settings from all that may hold some, see the top of this file; what nobody sets is left out.

    Args:
        cfg: Fields of the `pretrained_cfg`.
        saved: Model arguments saved beside it.
        overlay: `pretrained_cfg_overlay`.
        keywords: Of `timm.create_model`, which mixes the saved arguments into them: a keyword that equals its saved
            argument counts as that.

    Example:
        >>> resolve_placement(dict(n_tokens=49, sampler='center'), {}, dict(n_tokens=25), dict(seed=3))
        {'sampler': 'center', 'n_tokens': 25, 'seed': 3}
    """
    given = {name: value for name, value in keywords.items() if name not in saved or value != saved[name]}
    layers = [
        {name: layer[name] for name in PLACEMENT_FIELDS if layer.get(name) is not None}
        for layer in (cfg, saved, overlay, given)]
    return merge_settings(*layers)


def make_priors(
        window: int,
        n_tokens: int | Sequence[int] | None = None,
        sampler: str | None = None,
        seed: int | None = None,
        saliency: Saliency | None = None,
        eval_n_tokens: int | None = None,
        eval_sampler: str | None = None,
        coverage: float | Sequence[float] | None = None,
        eval_coverage: float | None = None,
        n_coarse: int | None = None,
) -> tuple[Prior, Prior]:
    """The priors of training and of evaluation that the keywords of a model stand for; None is the default.

    By default evaluation has the largest budget and coverage of training, and its sampler.

    Raises:
        TypeError, ValueError: As `Prior`; `eval_n_tokens` or `eval_coverage` that is no single one.
    """
    default = Prior()
    budget = tuple(n_tokens) if isinstance(n_tokens, list) else n_tokens  # JSON has no tuples
    train = Prior(
        sampler=default.sampler if sampler is None else sampler,
        n_tokens=budget,  # type: ignore[arg-type]  # of two numbers, which `Prior` checks
        seed=default.seed if seed is None else seed,
        saliency=saliency,
        window=window,
        coverage=default.coverage if coverage is None else tuple(coverage) if isinstance(coverage, list) else coverage,
        n_coarse=n_coarse,
    )
    if eval_n_tokens is None:
        largest = None if train.n_tokens is None else check_budgets(train.n_tokens)[1]
    elif isinstance(eval_n_tokens, (list, tuple)):
        raise TypeError(f'eval_n_tokens={eval_n_tokens!r} must be one budget: only training draws budgets.')
    else:
        largest = eval_n_tokens
    if isinstance(eval_coverage, (list, tuple)):
        raise TypeError(f'eval_coverage={eval_coverage!r} must be one number: only training draws coverages.')
    return train, dataclasses.replace(
        train,
        sampler=train.sampler if eval_sampler is None else eval_sampler,
        n_tokens=largest,
        coverage=check_coverage(train.coverage)[1] if eval_coverage is None else eval_coverage,
    )


def merge_settings(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Placement settings from layers of rising priority; what a layer sets for both modes clears lower `eval_` values.

    Example:
        >>> merge_settings(dict(n_tokens=64, eval_n_tokens=49, seed=1), dict(n_tokens=25))
        {'seed': 1, 'n_tokens': 25}
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for name in BOTH_MODES:
            if name in layer:
                merged.pop(name, None)
                merged.pop(f'eval_{name}', None)
        merged.update(layer)
    return merged


def cfg_from_timm(source: str, **changes: Any) -> SpotPretrainedCfg:
    """Config of the timm ViT whose weights are taken, safetensors from its Hub repository."""
    cfg = get_pretrained_cfg(source)
    fields = {name: getattr(cfg, name) for name in TIMM_FIELDS}
    fields.update(url=None, custom_load=False, fixed_input_size=False, architecture=None, tag=None)
    return SpotPretrainedCfg(**{**fields, **changes})


def cfg_from_authors() -> SpotPretrainedCfg:
    """Config of a released SPoT checkpoint; its file is not hosted anywhere that can be downloaded from here."""
    return SpotPretrainedCfg(
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        interpolation='bicubic',
        crop_pct=0.875,
        crop_mode='squash',
        first_conv='patch_embed.proj',
        classifier='head',
        origin_url=PROJECT_PAGE,
        paper_ids='arXiv:2507.01654',
        convention='spot',
    )


def cfg_from_package(file: str, **fields: Any) -> SpotPretrainedCfg:
    """Config of weights that the package itself holds."""
    path = Path(__file__).parent.parent / 'weights' / file
    return SpotPretrainedCfg(file=str(path), first_conv='patch_embed.proj', classifier='head', **fields)
