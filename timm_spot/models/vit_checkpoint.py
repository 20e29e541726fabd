"""What every filter of a timm ViT's checkpoint needs: its position table taken apart, its tail adapted."""
from __future__ import annotations

import math
import warnings

import torch
from torch import nn

from ._timm import get_pretrained_grid_size

StateDict = dict[str, torch.Tensor]
NO_POSITIONS = (
    "this checkpoint has no positions, neither 'pos_embed' as a ViT nor 'patch_embed.pos_proj.weight': they would be "
    'zero. A ViT that really has none can be built, filled and given to timm_spot.retrofit.')


def split_table(
        table: torch.Tensor,
        state_dict: StateDict,
        model: nn.Module,
        patch_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a position table (1, prefix + h * w, D) into its prefix rows (1, prefix, D) and (h, w, D)."""
    length = table.shape[1]
    prefix_tokens = sum(state_dict[k].shape[1] for k in ('cls_token', 'reg_token') if k in state_dict)
    tried: list[int] = []
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


def fold_prefix(state_dict: StateDict, prefix: torch.Tensor) -> None:
    """Add the rows (1, prefix, D) of a ViT's position table to its class token and registers, in place."""
    for name in ('cls_token', 'reg_token'):
        if prefix.shape[1] and name in state_dict:
            rows = state_dict[name].shape[1]
            state_dict[name] = state_dict[name] + prefix[:, :rows]
            prefix = prefix[:, rows:]


def adapt_tail(out: StateDict, model: nn.Module) -> StateDict:
    """Complete a ViT's state dict, changed in place: layer scale of one, its norm behind the pooling, a zero head."""
    target = model.state_dict()
    scales = [key for key in target if key.endswith(('ls1.gamma', 'ls2.gamma'))]
    if not any(key in out for key in scales):  # some of them, and the others are lost
        out.update({key: torch.ones(target[key].shape) for key in scales})
    for name in ('weight', 'bias'):
        if f'fc_norm.{name}' in target and f'norm.{name}' in out and f'fc_norm.{name}' not in out:
            out[f'fc_norm.{name}'] = out.pop(f'norm.{name}')
    if 'head.weight' in target and 'head.weight' not in out:
        _add_zero_head(out, model)
    return out


def _add_zero_head(out: StateDict, model: nn.Module) -> None:
    cfg_classes = model.pretrained_cfg['num_classes']
    out['head.weight'] = torch.zeros(max(cfg_classes, 0), model.num_features)
    out['head.bias'] = torch.zeros(max(cfg_classes, 0))
    # With another number of classes timm drops the head again and leaves the fresh one.
    if model.num_classes == cfg_classes:
        warnings.warn(
            'this checkpoint has no classifier: the head is zero, every class equally likely. Train one (timm\'s '
            'train.py, or num_classes= for a fresh head of your own), load the authors\' fine-tuned file with '
            'pretrained_cfg_overlay=dict(file=...), or use num_classes=0 for features.',
            stacklevel=2)
