"""ViTs that drop, at a few stages, the image tokens that matter least, as models of timm's registry.

Paper: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488
"""
from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence

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
from .pruning import pop_pruning
from .pruning_vit import RelevanceSubpixelVisionTransformer, RelevanceVisionTransformer, sparsify_in_place
from .spot_checkpoint import checkpoint_filter_fn
from .spot_config import SpotPretrainedCfg, cfg_from_timm, resolve_cfg, timm_cfg
from .spot_retrofit import SOURCE_FIELDS, backbone_cfg, build_backbone
from .spot_vit import SubpixelVisionTransformer
from .spot_zoo import create_spot_vit


def relevance_filter_fn(
        state_dict: Dict[str, torch.Tensor],
        model: nn.Module,
        fresh: Sequence[str] = (),
) -> Dict[str, torch.Tensor]:
    """The filter of the backbone's checkpoints; where one has no predictors, they stay fresh."""
    if isinstance(model, SubpixelVisionTransformer):
        state_dict = checkpoint_filter_fn(state_dict, model, fresh)
    else:
        state_dict = vit_checkpoint_filter_fn(state_dict, model, adapt_layer_scale=True)
    if not any(name.startswith('predictors.') for name in state_dict):
        fresh = {name: value for name, value in model.state_dict().items() if name.startswith('predictors.')}
        state_dict = {**state_dict, **fresh}
    return state_dict


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
    cfg = resolve_pretrained_cfg(variant, kwargs.pop('pretrained_cfg', None), overlay)
    return build_checked(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=relevance_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **kwargs,
    )


@register_model
def relevance_vit(
        pretrained: bool = False,
        backbone: str = 'vit_tiny_patch16_224',
        backbone_args: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """Any timm or subpixel VisionTransformer that drops tokens, see `timm_spot.sparsify`.

    `backbone` is a timm name or 'hf-hub:ORG/NAME', `backbone_args` are keywords of it that have the name of one of
    this model's; all others go to it as they are. With `pretrained=True` the weights are the backbone's, or those that
    a config given with this model names.
    """
    cache_dir = kwargs.get('cache_dir')
    cfg = resolve_cfg(
        'relevance_vit', kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None))
    source = resolve_checked(backbone, cache_dir)
    own_weights = bool(cfg.has_weights or cfg.state_dict)
    if not own_weights:
        cfg = backbone_cfg('relevance_vit', cfg, source['pretrained_cfg'])
    saved = {name: value for name, value in source.items() if name not in SOURCE_FIELDS}
    return _create_relevance_vit(
        'relevance_vit',
        pretrained=pretrained and own_weights,
        model_cls=partial(
            _build, source=source, backbone_args=backbone_args or {}, pretrained=pretrained and not own_weights),
        pretrained_cfg=timm_cfg(cfg),
        **{**saved, **kwargs},
    )


def _build(source: Dict[str, Any], backbone_args: Dict[str, Any], pretrained: bool, **kwargs: Any) -> nn.Module:
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
        filter_fn=relevance_filter_fn, **dict(model_args, **kwargs))


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
        filter_fn=relevance_filter_fn, **dict(model_args, **kwargs))
