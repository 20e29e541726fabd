"""Merging of tokens that are alike: pairs by the similarity of their keys, sizes, and where each token went.

Paper: `Token Merging: Your ViT But Faster` - https://arxiv.org/abs/2210.09461

The first tokens are the prefix (class token, registers), which is never merged; the other n are the image's. A token's
size is how many of the image's it stands for.
"""
from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .attention import rank_tokens, share_counts


class Matching(NamedTuple):
    """Which tokens stay, and which are merged into them.

    Attributes:
        stay: (B, L - r), the tokens that stay, in their new order: the prefix, and behind it the image's.
        merged: (B, r), those that are merged.
        into: (B, r), the places in `stay` of those that they are merged into.
    """

    stay: torch.Tensor
    merged: torch.Tensor
    into: torch.Tensor


def merge_limit(n_tokens: int) -> int:
    """How many of n image tokens can be merged at once: half of them."""
    return n_tokens // 2


def match_tokens(
        keys: torch.Tensor,
        r: int | None,
        num_prefix_tokens: int,
        similarity: float | None = None,
) -> Matching:
    """The r image tokens that are most like another one, and which: bipartite soft matching.

    The tokens are dealt in turn to two sets, the prefix included in the turn. Each image token of the first set has its
    most similar one of the second, by the cosine of their keys' mean over heads; the r most similar pairs are merged.
    What is left of the first set comes before the second set: in its order behind a prefix; by falling similarity where
    there is none, which is the published order, and later pairs depend on it.

    Args:
        keys: (B, heads, L, d), of an attention layer.
        r: How many to merge, at most half of the image tokens, rounded down; None with `similarity`.
        num_prefix_tokens: How many of the L tokens stand before the image's.
        similarity: Least cosine, in [-1, 1], of pairs that are merged, in place of r; of one image, as images differ in
            how many they have.

    Raises:
        ValueError: A key is NaN or infinite. (Not checked while a graph is captured, nor on the meta device.) Several
            images with `similarity`.

    Example:
        >>> keys = torch.tensor([[0., 0.], [1., 0.], [4., 3.], [0., 1.], [0., 9.]])[None, None]
        >>> matching = match_tokens(keys, 1, num_prefix_tokens=1)  # first set: 2 and 4, second set: 1 and 3
        >>> [index.tolist() for index in matching]
        [[[0, 2, 1, 3]], [[4]], [[3]]]
        >>> match_tokens(keys, None, num_prefix_tokens=1, similarity=0.8).merged.tolist()  # 2 and 1 have 0.8
        [[4, 2]]
    """
    if similarity is not None and keys.shape[0] > 1:
        raise ValueError(f'{keys.shape[0]} images differ in how many pairs are alike: give them one by one, or r.')
    with torch.no_grad():
        n_prefix, length = num_prefix_tokens, keys.shape[2]
        first, second = n_prefix + n_prefix % 2, n_prefix + 1 - n_prefix % 2  # where either set begins
        metric = F.normalize(keys.float().mean(dim=1), dim=-1)
        cosine, partner = (metric[:, first::2] @ metric[:, second::2].mT).max(dim=-1)
        ranked = rank_tokens(cosine, cosine.shape[1])
        if similarity is not None:
            r = int((cosine >= similarity).sum())
        merged, left = ranked[:, :r], ranked[:, r:]
        if n_prefix:
            left = left.sort(dim=1).values
        index = torch.arange(length, device=keys.device).expand(keys.shape[0], -1)
        stay = torch.cat([index[:, :n_prefix], first + 2 * left, index[:, second::2]], dim=1)
        return Matching(stay, first + 2 * merged, n_prefix + left.shape[1] + partner.gather(1, merged))


def merge_tokens(
        x: torch.Tensor,
        sizes: torch.Tensor | None,
        matching: Matching,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, L - r, D) and their sizes (B, L - r), float32: the mean of those merged, weighted by size.

    Args:
        x: (B, L, D).
        sizes: (B, L), or None where all are 1.
        matching: See `match_tokens`.
    """
    if sizes is None:
        sizes = torch.ones_like(x[:, :, 0], dtype=torch.float32)
    stay, merged, into = matching
    stay_sizes, merged_sizes = sizes.gather(1, stay), sizes.gather(1, merged)
    new_sizes = stay_sizes.scatter_add(1, into, merged_sizes)
    y = _take(x, stay) * (stay_sizes / new_sizes)[:, :, None]
    parts = _take(x, merged) * (merged_sizes / new_sizes.gather(1, into))[:, :, None]
    y = y.flatten(0, 1).index_add(0, _flat_index(into, stay.shape[1]), parts.flatten(0, 1)).view(y.shape)
    return y.to(x.dtype), new_sizes


def size_bias(sizes: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Attention in proportion to size, as a mask (B, 1, 1, L) to be added: a token of size s counts as s equal keys.

    Args:
        sizes: (B, L).
        x: Tokens (B, L, D), whose data type the mask has.
    """
    return sizes.log()[:, None, None].to(x.dtype)


def follow_merge(sources: torch.Tensor, matching: Matching, num_prefix_tokens: int) -> torch.Tensor:
    """Where the image's first tokens are after a matching.

    Args:
        sources: (B, N) int64: for each of the first N image tokens the index of the image token that holds it, -1 where
            it was dropped.
        matching: See `match_tokens`.
        num_prefix_tokens: Not counted by `sources`, but by `matching`.
    """
    stay, merged, into = matching
    places = torch.arange(stay.shape[1], device=stay.device).expand(stay.shape[0], -1)
    moved = torch.cat([stay, merged], dim=1)
    moved = torch.empty_like(moved).scatter(1, moved, torch.cat([places, into], dim=1))
    return _follow(sources, moved[:, num_prefix_tokens:] - num_prefix_tokens)


def follow_drop(sources: torch.Tensor, kept: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """Where the image's first tokens are after all of `n_tokens` but those of index `kept` (B, count) were dropped.

    `sources` and the result as for `follow_merge`.
    """
    moved = torch.full((kept.shape[0], n_tokens), -1, device=kept.device)
    places = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape[0], -1)
    return _follow(sources, moved.scatter(1, kept, places))


def fill_sources(sources: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Sources without dropped tokens: each is where the nearest of the image's first tokens is that was not dropped.

    Args:
        sources: (B, N) int64, -1 where a token was dropped; of each image one at least was not.
        positions: (N, 2) or (B, N, 2) of the image's first tokens, in units that are the same along both axes.
    """
    distances = (positions[..., :, None, :] - positions[..., None, :, :]).square().sum(dim=-1)  # (B or none, N, N)
    nearest = distances.masked_fill((sources < 0)[:, None], torch.inf).argmin(dim=2)
    return sources.gather(1, nearest)


def unmerge_tokens(x: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, D), one for each of the image's first: of image tokens (B, n, D) that which holds it.

    Args:
        x: Image tokens, without prefix.
        sources: (B, N) int64, none below 0, see `fill_sources`.
    """
    return _take(x, sources)


def _follow(sources: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    return torch.where(sources < 0, -1, moved.gather(1, sources.clamp(min=0)))


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens (B, count, D) of x (B, L, D): rows taken whole, many times faster on a CPU than by `gather`."""
    return x.flatten(0, 1).index_select(0, _flat_index(index, x.shape[1])).view(*index.shape, x.shape[2])


def _flat_index(index: torch.Tensor, length: int) -> torch.Tensor:
    return (index + length * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()


def share_merges(n_tokens: int, n_blocks: int, stages: Sequence[int], shares: Sequence[tuple[int, int]]) -> list[int]:
    """How many tokens each block merges so that as many are left in front of each stage as where tokens are dropped.

    They are spread evenly over the blocks since the previous stage; none are merged from the last stage on.

    Args:
        n_tokens: Image tokens.
        n_blocks: Blocks of the model.
        stages: Indices of blocks, rising.
        shares: Of the tokens at each stage, see `keep_shares`.

    Raises:
        ValueError: A block would have to merge more than half of its tokens.

    Example:
        >>> share_merges(196, 12, (3, 6, 9), ((7, 10), (49, 100), (343, 1000)))
        [20, 20, 19, 14, 14, 13, 10, 10, 9, 0, 0, 0]
    """
    merges: list[int] = []
    left = operator.index(n_tokens)  # while torch.compile traces, sizes are symbols: a program for each count
    for stage, count in zip(stages, share_counts(left, shares)):
        r = spread(left - count, stage - len(merges))
        for i, n in enumerate(r):
            if n > merge_limit(left - sum(r[:i])):
                raise ValueError(
                    f'{left} tokens cannot become {count} in {len(r)} blocks, each of which merges half of its tokens '
                    'at most: take a higher keep_rate, or later stages.')
        merges += r
        left = count
    return merges + [0] * (n_blocks - len(merges))


def plan_counts(
        n_tokens: int,
        n_blocks: int,
        stages: Sequence[int],
        shares: Sequence[tuple[int, int]],
        r: Sequence[int] | None = None,
        merges_alone: bool = False,
) -> tuple[list[int], list[int]]:
    """Image tokens left at each stage, and merged by each block, where tokens are dropped, merged or both.

    A stage keeps the same share of those left in front of it as it would without merging. A block merges half of its
    tokens at most.

    Args:
        n_tokens: Image tokens.
        n_blocks: Blocks of the model.
        stages: Indices of the blocks in front of which tokens are dropped, rising.
        shares: Of the tokens at each stage, see `keep_shares`.
        r: How many each block is to merge; None for none, or with `merges_alone` what `share_merges` says.
        merges_alone: Whether none are dropped.

    Example:
        >>> plan_counts(16, 4, (1, 3), ((1, 2), (1, 4)), r=(0, 2, 5, 0))
        ([8, 2], [0, 2, 3, 0])
    """
    left = operator.index(n_tokens)
    if merges_alone and r is None:
        return [], share_merges(left, n_blocks, stages, shares)
    targets = [left, *share_counts(left, shares)]
    counts: list[int] = []
    merges = []
    for i in range(n_blocks):
        if i in stages and not merges_alone:
            before, target = targets[len(counts):len(counts) + 2]
            left = max(1, (2 * left * target + before) // (2 * before))
            counts.append(left)
        merges.append(min(r[i], merge_limit(left)) if r is not None else 0)
        left -= merges[-1]
    return counts, merges


def spread(total: int, parts: int) -> list[int]:
    """Whole numbers that sum to `total`, as equal as can be, the larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]
