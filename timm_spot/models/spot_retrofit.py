"""Retrofit: any timm VisionTransformer turned into a subpixel one, with its weights.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

The ViT keeps its own modules, so whatever it is made of carries over (class token or not, registers, pre_norm, SwiGLU,
pooling, heads, weights changed by hand). Only two things go: the patch embedding, whose projection is kept, and the
position table, which becomes position weights in closed form.
"""
from __future__ import annotations

import copy
from functools import partial
from typing import Any

from timm.layers import PatchEmbed
from timm.models import VisionTransformer, generate_default_cfgs, register_model
from torch import nn

from ._timm import update_model_args
from .loading import create_checked, resolve_checked
from .spot_checkpoint import fold_table
from .spot_config import PLACEMENT_FIELDS, SpotPretrainedCfg, pop_placement, resolve_cfg
from .spot_vit import SubpixelVisionTransformer
from .spot_zoo import create_spot_vit
from .subpixel_embed import DEFAULT_NODES, SubpixelEmbed, WindowProjection

__all__ = ['retrofit']


def retrofit(vit: str | VisionTransformer, **model_keywords: Any) -> SubpixelVisionTransformer:
    """Turn any timm VisionTransformer into a subpixel one with its weights.

    With the full patch grid as placement (`sampler='grid'`) its logits are the source's.

    Args:
        vit: Name of a timm model, with a tag or not, 'hf-hub:ORG/NAME', 'local-dir:FOLDER', or an instance, which is
            not changed.
        **model_keywords: `n_tokens`, `sampler`, `seed`, `saliency`, `pos_nodes` (by default 16, or the longer side of
            the position table + 2 where that side exceeds 16). For a name also `pretrained=True` and all else that
            `timm.create_model` takes for the source.

    Returns:
        The model, in the mode (train, eval), on the device and in the dtype of the source.

    Raises:
        ValueError: The model is no ViT whose tokens are a patch grid (the message says why), convention='spot', or
            fewer nodes than the table's longer side.
        TypeError: A keyword that an instance cannot take any more.

    Example:
        >>> import timm_spot
        >>> model = timm_spot.retrofit('vit_tiny_patch16_224', depth=2, n_tokens=25, sampler='center')
        >>> model.n_tokens
        25
    """
    placement = pop_placement(model_keywords)
    if isinstance(vit, str):
        vit = create_checked(vit, **model_keywords)
    elif model_keywords:
        raise TypeError(
            f"a model that is already built takes no {', '.join(model_keywords)}: give a name instead of an instance, "
            f"or only {', '.join(PLACEMENT_FIELDS)}.")
    else:
        check_patch_grid(vit)
        vit = copy.deepcopy(vit)
    return retrofit_in_place(vit, fold=True, **placement)


def check_patch_grid(vit: nn.Module) -> None:
    """Raise ValueError, with the reason, unless `vit` is a timm VisionTransformer whose tokens are a patch grid."""
    if not isinstance(vit, nn.Module):
        raise TypeError(f'vit must be the name of a timm model or an instance, got {type(vit).__name__}.')
    reason = _unsuitable(vit)
    if reason:
        name = getattr(vit, 'pretrained_cfg', {}).get('architecture') or type(vit).__name__
        raise ValueError(f'{name} cannot be retrofitted: {reason}.')


def _unsuitable(vit: nn.Module) -> str | None:
    kind = type(vit).__name__
    if isinstance(vit, SubpixelVisionTransformer):
        return 'it is a subpixel ViT already'
    stem = getattr(vit, 'patch_embed', None)
    if isinstance(vit, VisionTransformer) and type(stem) is not PatchEmbed:
        return f'its stem is a {type(stem).__name__}, no linear projection of patches'
    if hasattr(vit, 'dist_token'):
        return 'it has a distillation token with a head of its own'
    if getattr(vit, 'rope', None) is not None:
        return f'a {kind} rotates queries and keys by their grid position in every block'
    if any('rel_pos' in name or 'relative_position' in name for name in vit.state_dict()):
        return f'a {kind} adds relative grid positions to the attention of every block'
    if any(getattr(m, 'window_size', None) for m in vit.modules()):
        return f'a {kind} attends within windows of the grid'
    if type(vit) is not VisionTransformer:
        return f'it is a {kind}, not a timm VisionTransformer'
    if stem.patch_size[0] != stem.patch_size[1]:
        return f'its patches of {stem.patch_size[0]} x {stem.patch_size[1]} px are not square'
    return None


def retrofit_in_place(vit: VisionTransformer, fold: bool, **placement: Any) -> SubpixelVisionTransformer:
    """`retrofit` of an instance without copying it: `vit` itself becomes the subpixel ViT.

    Args:
        vit: The source; changed in place.
        fold: Whether to turn its position table into position weights; else these stay random.
        **placement: Model keywords of the placement.
    """
    check_patch_grid(vit)
    convention = placement.pop('convention', None) or 'patch'
    if convention != 'patch':
        raise ValueError(f"convention={convention!r} does not suit a ViT's weights, they need convention='patch'.")
    source = vit.patch_embed
    side = max(source.grid_size)
    nodes = placement.pop('pos_nodes', None) or (DEFAULT_NODES if side <= DEFAULT_NODES else side + 2)
    weight = source.proj.weight
    embed = SubpixelEmbed(
        img_size=source.img_size,
        patch_size=source.patch_size,
        in_chans=weight.shape[1],
        embed_dim=weight.shape[0],
        pos_nodes=nodes,
        device=weight.device,
        dtype=weight.dtype,
    )
    embed.proj, embed.norm = source.proj, source.norm
    if type(embed.proj) is nn.Conv2d:
        embed.proj.__class__ = WindowProjection  # the same weights, by a faster product

    state_dict = vit.state_dict()
    table = state_dict.pop('pos_embed', None)
    # The subpixel class adds methods only: what the constructor built is what the ViT already has.
    vit.__class__ = SubpixelVisionTransformer
    vit.patch_embed = embed
    vit.pos_embed = None
    vit.dynamic_img_size = False
    placer = placement.pop('placer', None)
    vit.init_placer(placer, placement, weight.device)
    if table is None:
        nn.init.zeros_(embed.pos_proj.weight)
    elif fold and not table.is_meta:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        patches = table[0, prefix:].reshape(*source.grid_size, -1)
        extent = [n * embed.window / size for n, size in zip(source.grid_size, source.img_size)]
        fold_table(state_dict, table[:, :prefix], patches, nodes, (extent[0], extent[1]))
        fresh = ('placer.', 'patch_embed.size_proj.')
        own = {name: value for name, value in vit.state_dict().items() if name.startswith(fresh)}
        vit.load_state_dict({**state_dict, **own})
    for module in (embed, vit.placer):
        module.train(vit.training)

    vit._traits = dict(getattr(vit, '_traits', {}), fixed_input_size=False)
    if hasattr(vit, 'pretrained_cfg'):  # built by timm: say how it can be built again
        backbone = vit.pretrained_cfg['architecture']
        embed.set_normalization(vit.pretrained_cfg['mean'], vit.pretrained_cfg['std'])
        vit.pretrained_cfg = dict(vit.pretrained_cfg, architecture='spot_retrofit', fixed_input_size=False)
        vit.default_cfg = vit.pretrained_cfg
        settings = dict(placement, convention=convention, pos_nodes=nodes, placer=placer)
        update_model_args(vit, backbone=backbone, **{k: v for k, v in settings.items() if v is not None})
    return vit


default_cfgs = generate_default_cfgs({
    'spot_retrofit': SpotPretrainedCfg(first_conv='patch_embed.proj', classifier='head'),
})


@register_model
def spot_retrofit(
        pretrained: bool = False,
        backbone: str = 'vit_tiny_patch16_224',
        **kwargs: Any,
) -> SubpixelVisionTransformer:
    """Any timm VisionTransformer as a subpixel one, see `timm_spot.retrofit`.

    `backbone` is a timm name or 'hf-hub:ORG/NAME'. With `pretrained=True` the weights are the backbone's, or those
    that a config given with this model names.
    """
    overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
    cfg = resolve_cfg('spot_retrofit', kwargs.pop('pretrained_cfg', None), overlay)
    cache_dir = kwargs.get('cache_dir')
    source = resolve_checked(backbone, cache_dir)
    own_weights = bool(cfg.has_weights or cfg.state_dict)
    if not own_weights:
        cfg = backbone_cfg('spot_retrofit', cfg, source['pretrained_cfg'], fixed_input_size=False)

    saved = {name: value for name, value in source.items() if name not in SOURCE_FIELDS}
    return create_spot_vit(
        'spot_retrofit',
        pretrained=pretrained and own_weights,
        model_cls=partial(_build, source=source, pretrained=pretrained and not own_weights),
        pretrained_cfg=cfg,
        pretrained_cfg_overlay=overlay,
        **{**saved, **kwargs},
    )


SOURCE_FIELDS = ('model_name', 'pretrained_cfg', 'pretrained_model_args', 'cache_dir')


def backbone_cfg(
        variant: str,
        cfg: SpotPretrainedCfg,
        source_cfg: dict[str, Any],
        **fixed: Any,
) -> SpotPretrainedCfg:
    """Config of a model built from a backbone: the backbone's, but for what `cfg` changes of the variant's own."""
    default = resolve_cfg(variant, None, None)
    changed = {name: value for name, value in vars(cfg).items() if value != getattr(default, name)}
    return SpotPretrainedCfg(**{**source_cfg, **changed, 'architecture': variant, **fixed})


def _build(source: dict[str, Any], pretrained: bool, **kwargs: Any) -> SubpixelVisionTransformer:
    placement = pop_placement(kwargs)
    return retrofit_in_place(build_backbone(source, pretrained, **kwargs), fold=pretrained, **placement)


def build_backbone(source: dict[str, Any], pretrained: bool, **kwargs: Any) -> nn.Module:
    """The model that `resolve_checked` resolved, with more keywords."""
    fields = {name: source[name] for name in SOURCE_FIELDS[1:] if name in source}
    return create_checked(source['model_name'], pretrained, **fields, **kwargs)
