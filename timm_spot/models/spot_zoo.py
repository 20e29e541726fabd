"""Subpixel ViTs by name, with their weights, and how they are built.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654
"""
from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._timm import update_model_args
from .download import check_source
from .loading import build_checked
from .spot_checkpoint import checkpoint_filter_fn, is_authors
from .spot_config import (
    PROJECT_PAGE,
    SpotPretrainedCfg,
    cfg_from_authors,
    cfg_from_package,
    cfg_from_timm,
    pop_placement,
    resolve_cfg,
    resolve_placement,
    timm_cfg,
)
from .spot_vit import SubpixelVisionTransformer
from .subpixel_embed import SIZE_WEIGHT

_DIGITS = dict(
    input_size=(3, 64, 64),
    crop_pct=1.0,
    crop_mode='squash',
    mean=(0.1, 0.1, 0.1),  # a canvas is mostly empty
    std=(0.25, 0.25, 0.25),
    num_classes=10,
    label_names=tuple('0123456789'),
    license='apache-2.0',
    description='Trained on scanned handwritten digits (UCI, scikit-learn) on 64 x 64 canvases.',
)

default_cfgs = generate_default_cfgs({
    'spot_vit_base_patch16_mae.mae': cfg_from_timm('vit_base_patch16_224.mae', num_classes=1000),
    'spot_vit_base_patch16_mae.spot_in1k': cfg_from_authors(),
    'spot_vit_base_patch16_in21k.augreg2_in21k_ft_in1k': cfg_from_timm('vit_base_patch16_224.augreg2_in21k_ft_in1k'),
    'spot_vit_base_patch16_in21k.spot_in21k_ft_in1k': cfg_from_authors(),
    'spot_vit_base_patch16_in1k.augreg_in1k': cfg_from_timm('vit_base_patch16_224.augreg_in1k'),
    'spot_vit_base_patch16_in1k.spot_in1k': cfg_from_authors(),
    'spot_vit_tiny_patch16_in21k.augreg_in21k_ft_in1k': cfg_from_timm('vit_tiny_patch16_224.augreg_in21k_ft_in1k'),
    'spot_vit_small_patch16_in21k.augreg_in21k_ft_in1k': cfg_from_timm('vit_small_patch16_224.augreg_in21k_ft_in1k'),
    'spot_vit_large_patch16_in21k.augreg_in21k_ft_in1k': cfg_from_timm('vit_large_patch16_224.augreg_in21k_ft_in1k'),
    'spot_vit_base_patch32_in21k.augreg_in21k_ft_in1k': cfg_from_timm('vit_base_patch32_224.augreg_in21k_ft_in1k'),
    'spot_vit_large_patch16_mae.mae': cfg_from_timm('vit_large_patch16_224.mae', num_classes=1000),
    'spot_vit_pico_patch8_64.digits': cfg_from_package(
        'spot_vit_pico_patch8_64.digits.safetensors', **_DIGITS),
    'spot_vit_pico_patch8_64.digits_placed': cfg_from_package(
        'spot_vit_pico_patch8_64.digits_placed.safetensors', placer='density', **_DIGITS),
})


def create_spot_vit(
        variant: str,
        pretrained: bool = False,
        model_cls: Callable[..., SubpixelVisionTransformer] = SubpixelVisionTransformer,
        filter_fn: Callable[..., dict[str, torch.Tensor]] = checkpoint_filter_fn,
        **kwargs: Any,
) -> SubpixelVisionTransformer:
    """Build a subpixel ViT from timm's keywords, as entrypoints do: settings resolved, weights checked and loaded."""
    overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
    train_only = kwargs.pop('train_only', None)
    cfg = resolve_cfg(variant, kwargs.pop('pretrained_cfg', None), overlay)
    checked = None
    if pretrained:
        cfg = find_weights(variant, cfg)
        checked = check_source(timm_cfg(cfg), kwargs.get('cache_dir'))
    saved = kwargs.get('pretrained_model_args') or {}
    keywords = pop_placement(kwargs)
    placement = resolve_placement(vars(cfg), saved, overlay, keywords)
    # A network that the caller asks for is fresh unless the weights have it; one that they were saved with is not.
    asked = {**overlay, **{name: value for name, value in keywords.items() if name not in saved}}
    fresh = ('placer.',) if asked.get('placer') or isinstance(asked.get('saliency'), nn.Module) else ()
    if checked is not None and is_authors(checked.keys):
        placement.setdefault('convention', 'spot')  # the geometry that their weights were trained with
    if checked is not None and SIZE_WEIGHT in checked.keys:
        placement.setdefault('size_embed', True)  # whatever the coverage, the weights are not thrown away
    model = build_checked(
        model_cls,
        variant,
        pretrained,
        # timm's loaders of saved configs know no fields but their own: the placement is saved as model arguments.
        pretrained_cfg=timm_cfg(cfg),
        pretrained_filter_fn=partial(filter_fn, fresh=fresh),
        checked=checked,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **{**kwargs, **placement},
    )
    update_model_args(model, **placement)
    inner = getattr(model, 'model', model)  # features_only=True wraps it
    inner.patch_embed.set_normalization(cfg.mean, cfg.std)
    if train_only is not None:
        freeze_all_but(model, train_only)
    return model


def find_weights(variant: str, cfg: SpotPretrainedCfg) -> SpotPretrainedCfg:
    """A config with its weights: those of the authors may lie with an organisation on the Hub, TIMM_SPOT_HUB_ORG.

    Raises:
        RuntimeError: There are none; says where they can be had.
    """
    org = os.environ.get('TIMM_SPOT_HUB_ORG')
    if cfg.has_weights or cfg.state_dict:
        return cfg
    if org and cfg.tag and cfg.convention == 'spot':
        return dataclasses.replace(cfg, hf_hub_id=f'{org}/{variant}.{cfg.tag}')
    name = f'{variant}.{cfg.tag}' if cfg.tag else variant
    if cfg.convention == 'spot':
        raise RuntimeError(
            f'the weights of {name} are hosted by their authors only. Download the file from the links at '
            f'{PROJECT_PAGE} and load it as it is: timm.create_model({name!r}, pretrained=True, '
            "pretrained_cfg_overlay=dict(file=PATH)). Or convert it once ('timm-spot convert'), push it to "
            f"ORG/{name} on the Hugging Face Hub ('timm-spot push') and set TIMM_SPOT_HUB_ORG=ORG.")
    raise RuntimeError(
        f'{name} has no pretrained weights: use pretrained=False, or pretrained_cfg_overlay=dict(file=PATH).')


_TRAIN_ONLY = {'position': ('patch_embed.pos_proj.', 'patch_embed.size_proj.'), 'head': 'head.', 'placer': 'placer.'}


def freeze_all_but(model: nn.Module, train_only: str) -> None:
    """Freeze all parameters but the position columns (the paper's first stage), the head or the placer.

    Raises:
        ValueError: Another word, or the model has none of these.
    """
    if train_only not in _TRAIN_ONLY:
        raise ValueError(f"train_only={train_only!r} must be {' or '.join(map(repr, _TRAIN_ONLY))}.")
    trained = [p for name, p in model.named_parameters() if name.startswith(_TRAIN_ONLY[train_only])]
    if not trained:
        raise ValueError(f'train_only={train_only!r} leaves nothing to train: this model has no {train_only}.')
    model.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)


@register_model
def spot_vit_base_patch16_mae(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Base (SPoT-B/16), mean of the image tokens; starts from a masked autoencoder."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, init_values=1.0, global_pool='avg')
    return create_spot_vit('spot_vit_base_patch16_mae', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_base_patch16_in21k(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Base (SPoT-B/16), class token; starts from ImageNet-21k fine-tuned on ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, init_values=1.0)
    return create_spot_vit('spot_vit_base_patch16_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_base_patch16_in1k(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Base (SPoT-B/16), class token; starts from ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, init_values=1.0)
    return create_spot_vit('spot_vit_base_patch16_in1k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_tiny_patch16_in21k(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Tiny (SPoT-Ti/16), class token; starts from ImageNet-21k fine-tuned on ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3, init_values=1.0)
    return create_spot_vit('spot_vit_tiny_patch16_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_small_patch16_in21k(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Small (SPoT-S/16), class token; starts from ImageNet-21k fine-tuned on ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6, init_values=1.0)
    return create_spot_vit('spot_vit_small_patch16_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_large_patch16_in21k(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Large (SPoT-L/16), class token; starts from ImageNet-21k fine-tuned on ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16, init_values=1.0)
    return create_spot_vit('spot_vit_large_patch16_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_base_patch32_in21k(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Base with windows of 32 px (SPoT-B/32), class token; starts from ImageNet-21k fine-tuned on 1k."""
    model_args = dict(patch_size=32, embed_dim=768, depth=12, num_heads=12, init_values=1.0)
    return create_spot_vit('spot_vit_base_patch32_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_large_patch16_mae(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Large (SPoT-L/16), mean of the image tokens; starts from a masked autoencoder."""
    model_args = dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16, init_values=1.0, global_pool='avg')
    return create_spot_vit('spot_vit_large_patch16_mae', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_pico_patch8_64(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Pico with windows of 8 px on 64 px images, mean of the image tokens; its digit weights are inside."""
    model_args = dict(
        img_size=64, patch_size=8, embed_dim=128, depth=5, num_heads=4, init_values=1.0, global_pool='avg')
    return create_spot_vit('spot_vit_pico_patch8_64', pretrained=pretrained, **dict(model_args, **kwargs))
