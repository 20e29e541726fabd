"""Names of dHT ViTs in timm's registry, and where their weights come from.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652
"""
from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from ._timm import update_model_args
from .dht_checkpoint import checkpoint_filter_fn, lacks_pre_norm, merges_by_ward
from .dht_vit import DhtVisionTransformer
from .download import check_source, prefer_file
from .loading import build_checked


def _from_timm(source: str) -> PretrainedCfg:
    """Config of the timm ViT whose weights are taken, safetensors from its Hub repository."""
    return dataclasses.replace(
        get_pretrained_cfg(source), url=None, custom_load=False, fixed_input_size=False, architecture=None, tag=None)


def _from_authors() -> PretrainedCfg:
    """Config of a classifier of the authors', none of which has been published so far."""
    return PretrainedCfg(
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        interpolation='bicubic',
        first_conv='patch_embed.proj',
        classifier='head',
        paper_ids='arXiv:2511.02652',
    )


default_cfgs = generate_default_cfgs({
    'dht_vit_small_patch16_in21k.augreg_in21k_ft_in1k': _from_timm('vit_small_patch16_224.augreg_in21k_ft_in1k'),
    'dht_vit_base_patch16_in21k.augreg2_in21k_ft_in1k': _from_timm('vit_base_patch16_224.augreg2_in21k_ft_in1k'),
    'dht_vit_small_patch16_in1k.augreg_in1k': _from_timm('vit_small_patch16_224.augreg_in1k'),
    'dht_vit_small_patch16_in1k.dht_in1k': _from_authors(),
    'dht_vit_base_patch16_in1k.augreg_in1k': _from_timm('vit_base_patch16_224.augreg_in1k'),
    'dht_vit_base_patch16_in1k.dht_in1k': _from_authors(),
    'dht_vit_pico_patch8_64': PretrainedCfg(
        input_size=(3, 64, 64), crop_pct=1.0, crop_mode='squash', mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
        first_conv='patch_embed.proj', classifier='head', num_classes=10),
})


def create_dht_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> DhtVisionTransformer:
    """Build a dHT ViT from timm's keywords, as entrypoints do.

    `pre_norm` is on unless given, or unless the weights are those of a ViT that has no norm before its blocks: any norm
    would change what they read. Unless `tokenizer=dict(merge=...)` says how, regions merge by Ward's criterion where
    the weights were made so or are a ViT's, which knows no regions, else by the authors' rule. A saved model keeps what
    was chosen.
    """
    cfg = resolve_pretrained_cfg(
        variant, kwargs.pop('pretrained_cfg', None), prefer_file(kwargs.pop('pretrained_cfg_overlay', None)))
    chosen, checked = {}, None
    if pretrained:
        if not (cfg.has_weights or cfg.state_dict):
            name = f'{variant}.{cfg.tag}' if cfg.tag else variant
            raise RuntimeError(
                f'{name} has no pretrained weights (the authors have published no classifier): use pretrained=False, '
                'or pretrained_cfg_overlay=dict(file=PATH), on the command line --weights PATH.')
        checked = check_source(cfg, kwargs.get('cache_dir'))
        if 'pre_norm' not in kwargs and lacks_pre_norm(checked.keys):
            chosen['pre_norm'] = False
        tokenizer = kwargs.get('tokenizer') or {}
        if 'merge' not in tokenizer and merges_by_ward(checked.keys):
            chosen['tokenizer'] = {**tokenizer, 'merge': 'ward'}
    defaults = dict(pre_norm=True, init_values=0.1, norm_layer=partial(nn.LayerNorm, eps=1e-5))
    model = build_checked(
        DhtVisionTransformer,
        variant,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=checkpoint_filter_fn,
        checked=checked,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **{**defaults, **kwargs, **chosen},
    )
    if chosen:
        update_model_args(model, **chosen)
    return model


@register_model
def dht_vit_small_patch16_in21k(pretrained: bool = False, **kwargs: Any) -> DhtVisionTransformer:
    """dHT ViT-Small (dHT-S/16), class token; starts from ImageNet-21k fine-tuned on ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return create_dht_vit('dht_vit_small_patch16_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dht_vit_base_patch16_in21k(pretrained: bool = False, **kwargs: Any) -> DhtVisionTransformer:
    """dHT ViT-Base (dHT-B/16), class token; starts from ImageNet-21k fine-tuned on ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
    return create_dht_vit('dht_vit_base_patch16_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dht_vit_small_patch16_in1k(pretrained: bool = False, **kwargs: Any) -> DhtVisionTransformer:
    """dHT ViT-Small (dHT-S/16), class token; starts from ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return create_dht_vit('dht_vit_small_patch16_in1k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dht_vit_base_patch16_in1k(pretrained: bool = False, **kwargs: Any) -> DhtVisionTransformer:
    """dHT ViT-Base (dHT-B/16), class token; starts from ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
    return create_dht_vit('dht_vit_base_patch16_in1k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dht_vit_pico_patch8_64(pretrained: bool = False, **kwargs: Any) -> DhtVisionTransformer:
    """dHT ViT-Pico with windows of 8 px on 64 px images, class token; for tests and small experiments, no weights."""
    model_args = dict(img_size=64, patch_size=8, embed_dim=128, depth=5, num_heads=4)
    return create_dht_vit('dht_vit_pico_patch8_64', pretrained=pretrained, **dict(model_args, **kwargs))
