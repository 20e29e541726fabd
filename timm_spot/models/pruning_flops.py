"""Multiply-adds of a ViT that drops or merges tokens, and the schedule that has a given share of the dense model's.

Counted are the matrix products, those of attention included, as torch's FlopCounterMode counts them.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

from timm.models import VisionTransformer
from torch import nn

from ..ops.attention import keep_shares
from ..ops.merging import merge_limit, plan_counts, spread
from .pruning_passes import PruningPlan

_RATES = 1000  # keep rates are found to this part


def count_multiply_adds(
        vit: VisionTransformer,
        n_tokens: int,
        plan: PruningPlan,
        keep_rate: float,
        predictors: Sequence[nn.Module] = (),
) -> int:
    """Multiply-adds of one image.

    Args:
        vit: With timm's `Block`s.
        n_tokens: Image tokens that are embedded.
        plan: What is dropped and merged.
        keep_rate: Share of the tokens that each stage keeps.
        predictors: Of each stage.
    """
    shares = keep_shares(keep_rate, len(plan.stages))
    counts, merges = plan_counts(n_tokens, len(vit.blocks), plan.stages, shares, plan.r, plan.merges_alone)
    drops = keep_rate < 1 and not plan.merges_alone
    left, prefix = n_tokens, vit.num_prefix_tokens
    total = n_tokens * _weights(vit.patch_embed)
    for i, block in enumerate(vit.blocks):
        if drops and i in plan.stages:
            stage = plan.stages.index(i)
            if len(predictors):
                total += left * _weights(predictors[stage])
            left = counts[stage]
        heads, width = block.attn.num_heads, block.attn.num_heads * block.attn.head_dim
        length = prefix + left
        total += length * _weights(block.attn) + 2 * length * length * width
        if drops and len(predictors) and i in plan.read_blocks:
            total += 4 * heads * length * length  # means and variances along rows and columns
        if merges[i]:
            total += (left // 2) * ((left + 1) // 2) * block.attn.head_dim
            left -= merges[i]
        total += (prefix + left) * _weights(block.mlp)
    pool = vit.attn_pool
    if hasattr(pool, 'kv'):
        length = left + prefix * vit.pool_include_prefix
        total += length * (_weights(pool.kv) + 2 * pool.latent_len * pool.num_heads * pool.head_dim)
        total += pool.latent_len * (_weights(pool) - _weights(pool.kv))
    return total + _weights(vit.head)


def _weights(module: nn.Module) -> int:
    """Weights of the matrices that each token meets."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def find_keep_rate(cost: Callable[[float], int], limit: float) -> float | None:
    """The largest keep rate, to a thousandth, whose cost is at most `limit`; None where there is none."""
    found = _largest(_RATES - 1, lambda i: cost((i + 1) / _RATES) <= limit)
    return None if found is None else (found + 1) / _RATES


def find_merges(cost: Callable[[tuple[int, ...]], int], limit: float, n_tokens: int, n_blocks: int) -> list[int] | None:
    """The smallest numbers to merge, as equal over the blocks as can be, whose cost is at most `limit`; None for none.

    Where a block has not twice as many tokens left, it merges half of them.
    """
    most = merge_limit(n_tokens) * n_blocks
    found = _largest(most, lambda i: cost(tuple(spread(i, n_blocks))) > limit)
    total = 0 if found is None else found + 1
    return spread(total, n_blocks) if total <= most else None


def _largest(last: int, fits: Callable[[int], bool]) -> int | None:
    """The largest of 0..last that fits, where all below one that fits do too; None where 0 does not."""
    low, high = -1, last
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return None if low < 0 else low
