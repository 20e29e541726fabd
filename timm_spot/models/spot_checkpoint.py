"""One filter for three kinds of checkpoint: native, the authors' release, any timm VisionTransformer."""
from __future__ import annotations

import math
import re
import warnings
from typing import Dict, List, Tuple

import torch
from timm.layers import resample_patch_embed
from timm.models._input import get_pretrained_grid_size, update_model_args
from torch import nn

from ..ops.position_feature import fit_position_weights
from .subpixel_embed import patch_sigma

StateDict = Dict[str, torch.Tensor]

# The authors' names on the left, timm's on the right.
_AUTHORS_NAMES = (
    (r'^embedder\.cls_token$', 'cls_token'),
    (r'^embedder\.emb\.bias$', 'patch_embed.proj.bias'),
    (r'^blocks\.(\d+)\.att\.(qkv|proj)\.', r'blocks.\1.attn.\2.'),
    (r'^blocks\.(\d+)\.mlp\.L1\.', r'blocks.\1.mlp.fc1.'),
    (r'^blocks\.(\d+)\.mlp\.L2\.', r'blocks.\1.mlp.fc2.'),
    (r'^blocks\.(\d+)\.(ls1|ls2)\.lambda_$', r'blocks.\1.\2.gamma'),
)
_AUTHORS_HANDLED = ('embedder.emb.weight', 'tokenizer._n_sigma', 'tokenizer.logprior')

# Tensors of a source that become part of others.
FOLDED = {
    'embedder.emb.weight': ('patch_embed.proj.weight', 'patch_embed.pos_proj.weight'),
    'tokenizer._n_sigma': ('patch_embed.n_sigma',),
    'pos_embed': ('patch_embed.pos_proj.weight', 'cls_token', 'reg_token'),
}


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Turn any known checkpoint into one of `model`'s keys.

    Recognised by their keys: native ones (unchanged), the authors' (`embedder.emb.weight`), and those of any timm
    VisionTransformer, whose position table becomes position weights in closed form.

    Raises:
        ValueError: The checkpoint has none of these forms, or one that does not suit the model.
    """
    state_dict = state_dict.get('model', state_dict)
    if 'patch_embed.pos_proj.weight' in state_dict:
        return state_dict
    if 'embedder.emb.weight' in state_dict:
        return _from_authors(state_dict, model)
    if 'patch_embed.proj.weight' in state_dict:
        return _from_vit(state_dict, model)
    raise ValueError(
        "this checkpoint is none of: a timm_spot model (has 'patch_embed.pos_proj.weight'), the authors' SPoT (has "
        "'embedder.emb.weight'), a timm VisionTransformer (has 'patch_embed.proj.weight'). "
        f"Its first keys are {', '.join(map(repr, list(state_dict)[:5])) or 'none at all'}.")


def rename_authors_key(key: str) -> str:
    """timm's name for one of the authors'; any other stays."""
    for pattern, name in _AUTHORS_NAMES:
        key, found = re.subn(pattern, name, key)
        if found:
            break
    return key


def _from_authors(state_dict: StateDict, model: nn.Module) -> StateDict:
    embed = model.patch_embed
    weight = state_dict['embedder.emb.weight']
    window = math.isqrt(weight.shape[1] // 4)
    if weight.ndim != 2 or 4 * window ** 2 != weight.shape[1]:
        raise ValueError(f"'embedder.emb.weight' of shape {tuple(weight.shape)} should have 4 k k columns.")
    if embed.convention != 'spot':
        if embed.pos_nodes != window:
            raise ValueError(
                f"the authors' checkpoint with windows of {window} px needs convention='spot', the model was built "
                f"with convention={embed.convention!r} and pos_nodes={embed.pos_nodes}.")
        embed.convention = 'spot'
        update_model_args(model, convention='spot')

    out = {}
    unknown = []
    for key, value in state_dict.items():
        if key in _AUTHORS_HANDLED:
            continue
        name = rename_authors_key(key)
        if name == key and not re.match(r'^(blocks\.\d+\.(norm1|norm2)|norm|fc_norm|head)\.', key):
            unknown.append(key)
        out[name] = value
    if unknown:
        raise ValueError(f"this looks like the authors' checkpoint but has unknown keys: {', '.join(unknown[:5])}.")
    pixels = 3 * window ** 2
    out['patch_embed.proj.weight'] = weight[:, :pixels].reshape(-1, 3, window, window)
    out['patch_embed.pos_proj.weight'] = weight[:, pixels:]
    out['patch_embed.n_sigma'] = nn.functional.softplus(state_dict['tokenizer._n_sigma'].float()).reshape(())
    return out


def _from_vit(state_dict: StateDict, model: nn.Module) -> StateDict:
    out = dict(state_dict)
    embed = model.patch_embed
    if embed.convention != 'patch':
        raise ValueError(
            f"a ViT's checkpoint needs convention='patch', the model was built with convention={embed.convention!r}.")

    window = embed.window
    weight = out['patch_embed.proj.weight']
    grid_weight = weight
    if weight.ndim == 4 and tuple(weight.shape[-2:]) != (window, window):
        out['patch_embed.proj.weight'] = resample_patch_embed(weight, [window, window])
    table = out.pop('pos_embed', None)
    if table is None:
        out['patch_embed.n_sigma'] = torch.ones(())
        out['patch_embed.pos_proj.weight'] = torch.zeros_like(embed.pos_proj.weight, device='cpu')
    else:
        fold_table(out, *split_table(table, out, model, grid_weight), pos_nodes=embed.pos_nodes)
    return adapt_tail(out, model)


def adapt_tail(out: StateDict, model: nn.Module) -> StateDict:
    """Complete a ViT's state dict, changed in place: layer scale of one, its norm behind the pooling, a zero head."""
    target = model.state_dict()
    for key in target:
        if key.endswith(('ls1.gamma', 'ls2.gamma')) and key not in out:
            out[key] = torch.ones(target[key].shape)
    for name in ('weight', 'bias'):
        if f'fc_norm.{name}' in target and f'norm.{name}' in out and f'fc_norm.{name}' not in out:
            out[f'fc_norm.{name}'] = out.pop(f'norm.{name}')
    if 'head.weight' in target and 'head.weight' not in out:
        _add_zero_head(out, model)
    return out


def fold_table(
        state_dict: StateDict,
        prefix: torch.Tensor,
        table: torch.Tensor,
        pos_nodes: int,
        extent: Tuple[float, float] = (1., 1.),
) -> None:
    """Fold a ViT's position table into its state dict, as position weights and into the prefix tokens.

    Args:
        state_dict: Of the ViT, without `pos_embed`; changed in place.
        prefix: Rows of the table for class token and registers, (1, prefix, D); none with `no_embed_class`.
        table: Rows for the patches, (h, w, D).
        pos_nodes: Nodes per axis of the position feature.
        extent: Part of the image's height and width that the table covers.
    """
    fold_prefix(state_dict, prefix)
    n_sigma = torch.ones(())
    state_dict['patch_embed.n_sigma'] = n_sigma
    state_dict['patch_embed.pos_proj.weight'] = fit_position_weights(
        table.cpu(), pos_nodes, patch_sigma(n_sigma, pos_nodes), extent)


def fold_prefix(state_dict: StateDict, prefix: torch.Tensor) -> None:
    """Add the rows (1, prefix, D) of a ViT's position table to its class token and registers, in place."""
    for name in ('cls_token', 'reg_token'):
        if prefix.shape[1] and name in state_dict:
            rows = state_dict[name].shape[1]
            state_dict[name] = state_dict[name] + prefix[:, :rows]
            prefix = prefix[:, rows:]


def split_table(
        table: torch.Tensor,
        state_dict: StateDict,
        model: nn.Module,
        patch_weight: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Split a position table (1, prefix + h * w, D) into its prefix rows (1, prefix, D) and (h, w, D)."""
    length = table.shape[1]
    prefix_tokens = sum(state_dict[k].shape[1] for k in ('cls_token', 'reg_token') if k in state_dict)
    tried: List[int] = []
    # With no_embed_class the table has no prefix rows; what the model says of itself comes first.
    for prefix in sorted({prefix_tokens, 0}, reverse=not model.no_embed_class):
        patches = length - prefix
        side = math.isqrt(patches)
        grids = [get_pretrained_grid_size(model, patch_weight, patches), model.patch_embed.grid_size, (side, side)]
        for grid in grids:
            if grid is not None and grid[0] * grid[1] == patches:
                return table[:, :prefix], table[0, prefix:].reshape(*grid, -1)
        tried.append(patches)
    raise ValueError(
        f"'pos_embed' of shape {tuple(table.shape)} holds {' or '.join(map(str, tried))} patches, which fit neither "
        f'the image size of the model, {model.patch_embed.img_size}, nor a square: pass the source\'s img_size=.')


def _add_zero_head(out: StateDict, model: nn.Module) -> None:
    cfg_classes = model.pretrained_cfg['num_classes']
    out['head.weight'] = torch.zeros(cfg_classes, model.num_features)
    out['head.bias'] = torch.zeros(cfg_classes)
    # With another number of classes timm drops the head again and leaves the fresh one.
    if model.num_classes == cfg_classes:
        warnings.warn(
            'this checkpoint has no classifier: the head is zero, every class equally likely. Train one (timm\'s '
            'train.py, or num_classes= for a fresh head of your own), load the authors\' fine-tuned file with '
            'pretrained_cfg_overlay=dict(file=...), or use num_classes=0 for features.',
            stacklevel=2)
