"""Tokens on their way through a ViT that makes them fewer: blocks that merge, sizes, and where each token went.

Paper: `Token Merging: Your ViT But Faster` - https://arxiv.org/abs/2210.09461
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.models import VisionTransformer
from torch import nn

from ..ops.attention import gather_tokens
from ..ops.merging import (
    Matching,
    fill_sources,
    follow_drop,
    follow_merge,
    match_tokens,
    merge_tokens,
    size_bias,
    unmerge_tokens,
)
from .attention import read_block, tap_attention, tap_keys


class Carried(NamedTuple):
    """Tokens on their way.

    Attributes:
        tokens: (B, prefix + n, D).
        sizes: (B, prefix + n), float32, of how many of the image's first tokens each is the mean; None where of one.
        sources: (B, N) int64, for each of the image's first N tokens the index of that which holds it, -1 where it was
            dropped; None where nobody asks.
    """

    tokens: torch.Tensor
    sizes: torch.Tensor | None = None
    sources: torch.Tensor | None = None

    def bias(self) -> torch.Tensor | None:
        """Mask (B, 1, 1, L) by which attention is in proportion to size; None where all sizes are 1."""
        return None if self.sizes is None else size_bias(self.sizes, self.tokens)


def drop_carried(x: Carried, kept: torch.Tensor, num_prefix_tokens: int) -> Carried:
    """The prefix and the image tokens of index `kept` (B, count)."""
    sizes, sources = x.sizes, x.sources
    if sources is not None:
        sources = follow_drop(sources, kept, x.tokens.shape[1] - num_prefix_tokens)
    if sizes is not None:
        sizes = gather_tokens(sizes[:, :, None], kept, num_prefix_tokens).squeeze(2)
    return Carried(gather_tokens(x.tokens, kept, num_prefix_tokens), sizes, sources)


def merge_block(
        block: nn.Module,
        x: Carried,
        r: int | None,
        num_prefix_tokens: int,
        read: bool = False,
        similarity: float | None = None,
) -> tuple[Carried, Matching | None, torch.Tensor | None]:
    """One of timm's `Block`, which merges tokens between its attention and its MLP.

    Args:
        block: Of timm's class, with its `Attention`, which stays fused.
        x: Before it.
        r: How many tokens are merged, at most half of the image's; None for those of one image that are alike.
        num_prefix_tokens: They are never merged.
        read: Whether the attention is wanted.
        similarity: Least cosine of keys that are alike, see `match_tokens`.

    Returns:
        What is behind the block, what was merged (None for nothing), and with `read` its attention (B, heads, L, L), of
        the L tokens before it.
    """
    if r == 0 or x.tokens.shape[1] - num_prefix_tokens < 2:
        return _keep_all(block, x, read)
    layer, taps = tap_attention(block.attn) if read else (block.attn, [])
    layer, keys = tap_keys(layer)
    y, sizes, sources = x
    y = y + block.drop_path1(block.ls1(layer(block.norm1(y), attn_mask=x.bias())))
    matching: Matching | None = match_tokens(keys.keys, r, num_prefix_tokens, similarity)
    if matching.merged.shape[1]:
        y, sizes = merge_tokens(y, sizes, matching)
        sources = None if sources is None else follow_merge(sources, matching, num_prefix_tokens)
    else:  # none are alike: all stay in their order
        matching = None
    y = y + block.drop_path2(block.ls2(block.mlp(block.norm2(y))))
    return Carried(y, sizes, sources), matching, taps[0].matrix if read else None


def join_carried(images: Sequence[Carried]) -> Carried:
    """Several images as one batch: in one that has fewer tokens the last is repeated, with a size of 0."""
    length = max(x.tokens.shape[1] for x in images)
    tokens = torch.cat([
        F.pad(x.tokens.mT, (0, length - x.tokens.shape[1]), mode='replicate').mT for x in images])
    sizes = [
        F.pad(torch.ones_like(x.tokens[:, :, 0], dtype=torch.float32) if x.sizes is None else x.sizes,
              (0, length - x.tokens.shape[1])) for x in images]
    sources = [x.sources for x in images if x.sources is not None]
    return Carried(tokens, torch.cat(sizes), torch.cat(sources) if sources else None)


def restore_tokens(x: Carried, num_prefix_tokens: int, positions: torch.Tensor | None) -> Carried:
    """Prefix and all of the image's first tokens, (B, prefix + N, D): each as that which holds it.

    Args:
        x: With sources.
        num_prefix_tokens: They stay as they are.
        positions: (N, 2) or (B, N, 2): a token that was dropped is as its nearest; None where none was.
    """
    sources = x.sources if positions is None else fill_sources(x.sources, positions)
    prefix, tokens = x.tokens[:, :num_prefix_tokens], x.tokens[:, num_prefix_tokens:]
    return x._replace(tokens=torch.cat([prefix, unmerge_tokens(tokens, sources)], dim=1))


def merge_seen(
        seen: torch.Tensor,
        sizes: torch.Tensor | None,
        matching: Matching | None,
        num_prefix_tokens: int,
        sums: bool,
) -> torch.Tensor:
    """What was seen of image tokens, (B, n) or (B, n, features), of those left after a matching.

    Args:
        seen: Of each image token before it.
        sizes: Then, see `Carried`.
        matching: What was merged, None for nothing.
        num_prefix_tokens: Not counted by `seen`.
        sums: Whether it adds up, as attention does that tokens receive; else it is averaged as the tokens are.
    """
    if matching is None:
        return seen
    values = seen if seen.ndim == 3 else seen[:, :, None]
    values, counts = merge_tokens(F.pad(values, (0, 0, num_prefix_tokens, 0)), None if sums else sizes, matching)
    values = (values * counts[:, :, None] if sums else values)[:, num_prefix_tokens:]
    return values if seen.ndim == 3 else values.squeeze(2)


def pool_weighted(vit: VisionTransformer, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What a ViT pools of tokens (B, prefix + n, D), (B, D), where each counts as much as its weight says.

    Args:
        vit: The model.
        x: After its last norm.
        weights: (B, prefix + n); those of prefix tokens that are not pooled do not count.

    Raises:
        ValueError: Its pooling has no weights.
    """
    n_prefix = vit.num_prefix_tokens
    if isinstance(vit.attn_pool, AttentionPoolLatent):
        if not vit.pool_include_prefix:
            x, weights = x[:, n_prefix:], weights[:, n_prefix:]
        return vit.attn_pool(x, attn_mask=size_bias(weights, x))
    if vit.attn_pool is not None:
        raise ValueError(f'{type(vit.attn_pool).__name__} pools tokens of one size only, and merged ones differ.')
    if vit.global_pool not in ('avg', 'avgmax'):  # by a class token or the largest
        return vit.pool(x)
    prefix = weights.new_full((weights.shape[0], n_prefix), float(vit.pool_include_prefix))
    weights = torch.cat([prefix, weights[:, n_prefix:]], dim=1)
    weights = weights / weights.sum(dim=1, keepdim=True)
    mean = (weights[:, None].to(x.dtype) @ x).squeeze(1)
    return mean if vit.global_pool == 'avg' else 0.5 * (vit.pool(x, 'max') + mean)


def _keep_all(block: nn.Module, x: Carried, read: bool) -> tuple[Carried, None, torch.Tensor | None]:
    if read:
        y, attention = read_block(block, x.tokens, attn_mask=x.bias())
    else:
        y, attention = block(x.tokens, attn_mask=x.bias()), None
    return x._replace(tokens=y), None, attention


# Leaves of an FX graph: what they do depends on shapes.
for name in ('follow_drop', 'gather_tokens', 'size_bias'):
    torch.fx.wrap(name)
