"""One filter for three kinds of checkpoint: native, the authors' release, any timm VisionTransformer."""
from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import torch
from timm.layers import resample_patch_embed
from torch import nn

from ..ops.position_feature import fit_position_weights
from .subpixel_embed import patch_sigma
from .vit_checkpoint import NO_POSITIONS, StateDict, adapt_tail, fold_prefix, split_table

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


def is_authors(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a checkpoint that the authors released, which needs convention='spot'."""
    return 'embedder.emb.weight' in keys


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module, fresh: Sequence[str] = ()) -> StateDict:
    """Turn any known checkpoint into one of `model`'s keys; the model stays as it is.

    Recognised by their keys: native ones (unchanged), the authors' (`embedder.emb.weight`), and those of any timm
    VisionTransformer, whose position table becomes position weights in closed form.

    Args:
        state_dict: The checkpoint, or a dict that holds it as 'model'.
        model: The subpixel ViT to fill.
        fresh: Prefixes of what the model keeps as it is where the checkpoint has nothing of it.

    Raises:
        ValueError: The checkpoint has none of these forms, or one that does not suit the model.
    """
    state_dict = state_dict.get('model', state_dict)
    return keep_fresh(_to_native(state_dict, model), model, fresh)


def keep_fresh(state_dict: StateDict, model: nn.Module, fresh: Sequence[str]) -> StateDict:
    """Fill a state dict up with the model's own tensors under any of the prefixes `fresh` that it has nothing of."""
    fresh = (*fresh, 'patch_embed.size_proj.')  # they start at 0
    missing = tuple(prefix for prefix in fresh if not any(key.startswith(prefix) for key in state_dict))
    own = {key: value for key, value in model.state_dict().items() if key.startswith(missing)}
    return {**state_dict, **own} if own else state_dict


def _to_native(state_dict: StateDict, model: nn.Module) -> StateDict:
    if 'patch_embed.pos_proj.weight' in state_dict:
        return state_dict
    if is_authors(state_dict):
        return _from_authors(state_dict, model)
    own = [key for key in state_dict if key.startswith(('patch_embed.n_sigma', 'placer.'))]
    if own:
        raise ValueError(
            f"this checkpoint has {', '.join(own[:3])} and so is one of timm_spot's, but it lacks "
            "'patch_embed.pos_proj.weight', the position weights: they would be zero.")
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
        raise ValueError(
            f"the authors' checkpoint with windows of {window} px needs convention='spot', the model was built "
            f"with convention={embed.convention!r} and pos_nodes={embed.pos_nodes}.")

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
        raise ValueError(NO_POSITIONS)
    fold_table(out, *split_table(table, out, model, grid_weight), pos_nodes=embed.pos_nodes)
    return adapt_tail(out, model)


def fold_table(
        state_dict: StateDict,
        prefix: torch.Tensor,
        table: torch.Tensor,
        pos_nodes: int,
        extent: tuple[float, float] = (1., 1.),
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
