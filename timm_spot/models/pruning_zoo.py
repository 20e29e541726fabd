"""ViTs that drop, at a few stages, the image tokens that matter least, as models of timm's registry.

Paper: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

from .download import prefer_file
from .loading import build_checked, resolve_checked
from .pruning_scorers import get_scorer
from .pruning_settings import pop_pruning
from .pruning_vit import RelevanceSubpixelVisionTransformer, RelevanceVisionTransformer, sparsify_in_place
from .spot_checkpoint import checkpoint_filter_fn, keep_fresh
from .spot_config import SpotPretrainedCfg, cfg_from_timm, resolve_cfg, timm_cfg
from .spot_retrofit import SOURCE_FIELDS, backbone_cfg, build_backbone
from .spot_vit import SubpixelVisionTransformer
from .spot_zoo import create_spot_vit

_PREDICTORS = 'predictors.'


def relevance_filter_fn(
        state_dict: dict[str, torch.Tensor],
        model: nn.Module,
        fresh: Sequence[str] = (),
        fresh_predictors: bool = False,
) -> dict[str, torch.Tensor]:
    """The filter of the backbone's checkpoints, for a model that drops tokens.

    Predictors that a model does not have, by a scorer that needs no training, are left out.

    Args:
        state_dict: Of the backbone, with or without predictors.
        model: The model to fill.
        fresh: Prefixes of what else the model keeps as it is where the checkpoint has nothing of it.
        fresh_predictors: Whether it keeps its predictors where the checkpoint has none.

    Raises:
        ValueError: The model has predictors that the checkpoint lacks, and fresh ones were not asked for.
    """
    if isinstance(model, SubpixelVisionTransformer):
        state_dict = checkpoint_filter_fn(state_dict, model, fresh)
    else:
        state_dict = vit_checkpoint_filter_fn(state_dict, model, adapt_layer_scale=True)
    if not model.predictors:
        return {name: value for name, value in state_dict.items() if not name.startswith(_PREDICTORS)}
    if fresh_predictors:
        state_dict = keep_fresh(state_dict, model, (_PREDICTORS,))
    missing = [name for name in model.state_dict() if name.startswith(_PREDICTORS) and name not in state_dict]
    if missing:
        listed = ', '.join(missing[:3]) + (f' and {len(missing) - 3} more' if len(missing) > 3 else '')
        raise ValueError(_no_predictors_message(model.scorer, f'the weights lack {listed}'))
    return state_dict


def _no_predictors_message(scorer: str, lack: str) -> str:
    return (
        f'scorer={scorer!r} needs trained predictors, and {lack}. Give weights that have them; a scorer that needs no '
        "training, such as scorer='cls-attention'; or, to train them, fresh_predictors=True (timm_spot.sparsify(vit) "
        'has fresh ones without being asked).')


def _pop_fresh(kwargs: dict[str, Any]) -> bool:
    """Take `fresh_predictors` out of a model's keywords; what a saved config says was meant for its training."""
    fresh = kwargs.pop('fresh_predictors', False)
    saved = kwargs.get('pretrained_model_args') or {}
    return bool(fresh) and not saved.get('fresh_predictors', False)


def _from_digits() -> SpotPretrainedCfg:
    """Config of the digits model with trained predictors."""
    source = get_pretrained_cfg('spot_vit_pico_patch8_64.digits')
    file = Path(source.file).with_name('relevance_spot_vit_pico_patch8_64.digits.safetensors')
    return dataclasses.replace(source, file=str(file), architecture=None, tag=None)


def _from_deit(source: str) -> PretrainedCfg:
    """Config of the DeiT whose weights are taken, safetensors from its Hub repository."""
    return dataclasses.replace(get_pretrained_cfg(source), architecture=None, tag=None, url=None)


default_cfgs = generate_default_cfgs({
    'relevance_vit': SpotPretrainedCfg(first_conv='patch_embed.proj', classifier='head'),
    'relevance_deit_tiny_patch16_224.fb_in1k': _from_deit('deit_tiny_patch16_224.fb_in1k'),
    'relevance_deit_small_patch16_224.fb_in1k': _from_deit('deit_small_patch16_224.fb_in1k'),
    'relevance_deit_base_patch16_224.fb_in1k': _from_deit('deit_base_patch16_224.fb_in1k'),
    'relevance_spot_vit_base_patch16_mae.mae': cfg_from_timm('vit_base_patch16_224.mae', num_classes=1000),
    'relevance_spot_vit_pico_patch8_64.digits': _from_digits(),
})


def _create_relevance_vit(
        variant: str,
        pretrained: bool = False,
        model_cls: Callable[..., nn.Module] = RelevanceVisionTransformer,
        **kwargs: Any,
) -> nn.Module:
    overlay = prefer_file(kwargs.pop('pretrained_cfg_overlay', None))
    fresh = _pop_fresh(kwargs)
    cfg = resolve_pretrained_cfg(variant, kwargs.pop('pretrained_cfg', None), overlay)
    return build_checked(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=partial(relevance_filter_fn, fresh_predictors=fresh),
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **kwargs,
    )


@register_model
def relevance_vit(
        pretrained: bool = False,
        backbone: str = 'vit_tiny_patch16_224',
        backbone_args: dict[str, Any] | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Any timm or subpixel VisionTransformer that drops tokens, see `timm_spot.sparsify`.

    `backbone` is a timm name or 'hf-hub:ORG/NAME', `backbone_args` are keywords of it that have the name of one of
    this model's; all others go to it as they are. With `pretrained=True` the weights are the backbone's, or those that
    a config given with this model names. A backbone's have no predictors: they go with a scorer that needs no training,
    or with `fresh_predictors=True`.
    """
    cache_dir = kwargs.get('cache_dir')
    cfg = resolve_cfg(
        'relevance_vit', kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None))
    source = resolve_checked(backbone, cache_dir)
    own_weights = bool(cfg.has_weights or cfg.state_dict)
    if not own_weights:
        cfg = backbone_cfg('relevance_vit', cfg, source['pretrained_cfg'])
        if pretrained:
            scorer = {**source, **kwargs}.get('scorer', 'relevance')
            if get_scorer(scorer).needs_training and not _pop_fresh(kwargs):
                raise ValueError(_no_predictors_message(
                    scorer, f'the weights of the backbone {backbone} have none ({_PREDICTORS}*)'))
    saved = {name: value for name, value in source.items() if name not in SOURCE_FIELDS}
    return _create_relevance_vit(
        'relevance_vit',
        pretrained=pretrained and own_weights,
        model_cls=partial(
            _build, source=source, backbone_args=backbone_args or {}, pretrained=pretrained and not own_weights),
        pretrained_cfg=timm_cfg(cfg),
        **{**saved, **kwargs},
    )


def _build(source: dict[str, Any], backbone_args: dict[str, Any], pretrained: bool, **kwargs: Any) -> nn.Module:
    pruning = pop_pruning(kwargs)
    return sparsify_in_place(build_backbone(source, pretrained, **backbone_args, **kwargs), **pruning)


@register_model
def relevance_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> RelevanceVisionTransformer:
    """DeiT-Tiny that drops tokens."""
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)
    return _create_relevance_vit('relevance_deit_tiny_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def relevance_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> RelevanceVisionTransformer:
    """DeiT-Small that drops tokens."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return _create_relevance_vit('relevance_deit_small_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def relevance_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> RelevanceVisionTransformer:
    """DeiT-Base that drops tokens."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
    return _create_relevance_vit('relevance_deit_base_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def relevance_spot_vit_base_patch16_mae(
        pretrained: bool = False,
        **kwargs: Any,
) -> RelevanceSubpixelVisionTransformer:
    """SPoT ViT-Base (SPoT-B/16) that drops placed tokens."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, init_values=1.0, global_pool='avg')
    return create_spot_vit(
        'relevance_spot_vit_base_patch16_mae', pretrained, model_cls=RelevanceSubpixelVisionTransformer,
        filter_fn=partial(relevance_filter_fn, fresh_predictors=_pop_fresh(kwargs)), **dict(model_args, **kwargs))


@register_model
def relevance_spot_vit_pico_patch8_64(
        pretrained: bool = False,
        **kwargs: Any,
) -> RelevanceSubpixelVisionTransformer:
    """SPoT ViT-Pico that drops placed tokens; its digit weights, trained predictors included, are inside."""
    model_args = dict(
        img_size=64, patch_size=8, embed_dim=128, depth=5, num_heads=4, init_values=1.0, global_pool='avg')
    return create_spot_vit(
        'relevance_spot_vit_pico_patch8_64', pretrained, model_cls=RelevanceSubpixelVisionTransformer,
        filter_fn=partial(relevance_filter_fn, fresh_predictors=_pop_fresh(kwargs)), **dict(model_args, **kwargs))
