"""One filter for three kinds of checkpoint of dHT models: native, the authors' classifier, any timm VisionTransformer.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652
"""
from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import nn

from ..ops.regions.features import fit_histogram_weights
from .vit_checkpoint import NO_POSITIONS, StateDict, adapt_tail, fold_prefix, split_table

# The authors' names on the left, timm's on the right; theirs apply k_norm to queries.
_AUTHORS_NAMES = (
    (r'^tokenizer\.', 'patch_embed.tokenizer.'),
    (r'^extractor\._mix$', 'patch_embed.mix'),
    (r'^extractor\.pixel_mask_token$', 'patch_embed.pixel_token'),
    (r'^embedder\.proj\.bias$', 'patch_embed.proj.bias'),
    (r'^embedder\.norm_pre\.', 'norm_pre.'),
    (r'^blocks\.(\d+)\.(ls1|ls2)\.lambda_$', r'blocks.\1.\2.gamma'),
    (r'^blocks\.(\d+)\.attn\.k_norm\.', r'blocks.\1.attn.q_norm.'),
    (r'^blocks\.(\d+)\.attn\.q_norm\.', r'blocks.\1.attn.k_norm.'),
)
_AUTHORS_HANDLED = ('embedder.proj.weight', 'embedder.cls_token', 'tokenizer.gradient.kernel')
_AUTHORS_NEEDED = ('embedder.cls_token', 'extractor.pixel_mask_token')
BY_WARD = 'by_ward'  # among a tokenizer's weights where it merges by Ward's criterion


def _is_vit(keys: Iterable[str]) -> bool:
    return 'patch_embed.proj.weight' in keys and 'patch_embed.pos_proj.weight' not in keys


def lacks_pre_norm(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a ViT that has no norm before its blocks: it needs a model with pre_norm=False."""
    return _is_vit(keys) and 'norm_pre.weight' not in keys


def merges_by_ward(keys: Iterable[str]) -> bool:
    """Whether a model with weights of these keys merges by Ward's criterion: made so, or of a ViT, to be fine-tuned."""
    return _is_vit(keys) or f'patch_embed.tokenizer.{BY_WARD}' in keys


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Turn any known checkpoint into one of `model`'s keys; the model stays as it is.

    Recognised by their keys: native ones (unchanged), the authors' (`embedder.proj.weight`), and those of any timm
    VisionTransformer, whose position table becomes weights of the position histogram in closed form. A ViT knows
    nothing of regions: the tokenizer keeps its start.

    Raises:
        ValueError: The checkpoint has none of these forms, or one that does not suit the model.
    """
    state_dict = state_dict.get('model', state_dict)
    if 'patch_embed.pixel_token' in state_dict:
        out = state_dict
    elif 'embedder.proj.weight' in state_dict:
        out = _from_authors(state_dict, model)
    elif own := [key for key in state_dict if key.startswith('patch_embed.tokenizer.')]:
        raise ValueError(
            f"this checkpoint has {', '.join(own[:3])} and so is one of timm_spot's dHT models, but it lacks "
            "'patch_embed.pixel_token'.")
    elif _is_vit(state_dict):
        out = _from_vit(state_dict, model)
    else:
        raise ValueError(
            "this checkpoint is none of: a timm_spot dHT model (has 'patch_embed.pixel_token'), the authors' dHT (has "
            "'embedder.proj.weight'), a timm VisionTransformer (has 'patch_embed.proj.weight'). "
            f"Its first keys are {', '.join(map(repr, list(state_dict)[:5])) or 'none at all'}.")
    out = _name_merge(out, model)
    has_norm = 'norm_pre.weight' in out
    if has_norm == isinstance(model.norm_pre, nn.Identity):
        raise ValueError(
            f'this checkpoint has {"a" if has_norm else "no"} norm before its blocks: build the model with '
            f'pre_norm={has_norm}. timm.create_model(..., pretrained=True) does so for a ViT where pre_norm= is not '
            'given.')
    return out


def _name_merge(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Let weights name the rule of merging that the model was built with: given by the caller, or theirs."""
    key = f'patch_embed.tokenizer.{BY_WARD}'
    if (key in state_dict) == (key in model.state_dict()):
        return state_dict
    if key in state_dict:
        return {k: v for k, v in state_dict.items() if k != key}
    return {**state_dict, key: torch.ones(())}


def _from_authors(state_dict: StateDict, model: nn.Module) -> StateDict:
    missing = [key for key in _AUTHORS_NEEDED if key not in state_dict]
    if missing:
        raise ValueError(f"this looks like the authors' dHT but lacks {' and '.join(map(repr, missing))}.")
    embed = model.patch_embed
    out = {}
    for key, value in state_dict.items():
        if key in _AUTHORS_HANDLED:
            continue
        for pattern, name in _AUTHORS_NAMES:
            key, found = re.subn(pattern, name, key)
            if found:
                break
        out[key] = value
    prefix = state_dict['embedder.cls_token'][None]
    out['cls_token'] = prefix[:, :1]
    if prefix.shape[1] > 1:
        out['reg_token'] = prefix[:, 1:]
    side = out['patch_embed.pixel_token'].shape[-1]
    if side != embed.patch_size[0]:
        raise ValueError(f'this checkpoint has windows of {side} px, the model patch_size={embed.patch_size[0]}.')

    weight = state_dict['embedder.proj.weight']
    pixels, cells = 3 * side ** 2, side ** 2
    # Whether a vector holds the gradient histogram is seen from the length of what is left for the position.
    rest = weight.shape[1] - pixels
    has_gradient = 'tokenizer.gradact.lmbda' in state_dict and rest > cells and _is_square(rest - cells)
    positions = rest - cells if has_gradient else rest
    if positions < 1 or not _is_square(positions):
        raise ValueError(
            f"'embedder.proj.weight' of shape {tuple(weight.shape)} should have 3 p p + P P (+ p p) columns, p={side}.")
    out['patch_embed.proj.weight'] = weight[:, :pixels].reshape(-1, 3, side, side)
    out['patch_embed.pos_proj.weight'] = weight[:, pixels:pixels + positions]
    if has_gradient:
        out['patch_embed.grad_proj.weight'] = weight[:, pixels + positions:]
    _resize_positions(out, model)
    if embed.grad_proj is None:
        out.pop('patch_embed.tokenizer.gradact.lmbda', None)
        if has_gradient:
            raise ValueError("this checkpoint has a gradient histogram: build with tokenizer=dict(compute_grad=True).")
    elif not has_gradient:
        out['patch_embed.grad_proj.weight'] = weight.new_zeros(weight.shape[0], cells)
        out.setdefault('patch_embed.tokenizer.gradact.lmbda', weight.new_zeros(2, 1, 1))
    return out


def _is_square(n: int) -> bool:
    return math.isqrt(n) ** 2 == n


def _resize_positions(state_dict: StateDict, model: nn.Module) -> None:
    """Resize position columns to the model's cells, and to the values that its histograms have in them."""
    embed, key = model.patch_embed, 'patch_embed.pos_proj.weight'
    weight = state_dict[key]
    old, side = math.isqrt(weight.shape[1]), embed.pos_size
    if old == side:
        return
    resized = F.interpolate(weight.view(-1, 1, old, old).float(), (side, side), mode='bicubic').flatten(1)
    # A histogram is divided by (scale / 32)^2, and the old one's scale was its number of cells.
    state_dict[key] = (resized * (embed.pos_scale / old) ** 2).to(weight.dtype)


def _from_vit(state_dict: StateDict, model: nn.Module) -> StateDict:
    out = dict(state_dict)
    embed = model.patch_embed
    side = embed.patch_size[0]
    grid_weight = out['patch_embed.proj.weight']
    if tuple(grid_weight.shape[-2:]) != (side, side):
        out['patch_embed.proj.weight'] = resample_patch_embed(grid_weight, [side, side])
    target = model.state_dict()
    table = out.pop('pos_embed', None)
    if table is None:
        raise ValueError(NO_POSITIONS)
    prefix, table = split_table(table, out, model, grid_weight)
    fold_prefix(out, prefix)
    out['patch_embed.pos_proj.weight'] = fit_histogram_weights(table, embed.pos_size, embed.pos_scale)
    if embed.grad_proj is not None:
        out['patch_embed.grad_proj.weight'] = torch.zeros(target['patch_embed.grad_proj.weight'].shape)
    if 'norm_pre.weight' in out:  # such a ViT projects without one
        out.setdefault('patch_embed.proj.bias', torch.zeros(model.embed_dim))
    for key, value in target.items():
        if key.startswith('patch_embed.') and not key.startswith('patch_embed.proj.'):
            out.setdefault(key, value)
    return adapt_tail(out, model)
