"""A ViT that drops or merges image tokens on the way, and masks them for training: what its classes share.

Papers: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488; `Token Merging: Your ViT But Faster` - https://arxiv.org/abs/2210.09461

Their settings are in `pruning_settings.py`, the passes through the blocks in `pruning_passes.py`, what judges tokens in
`pruning_scorers.py`, blocks that merge in `merging.py`, the models in `pruning_vit.py` and `pruning_zoo.py`.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops.attention import check_keep_rate
from ..ops.merging import plan_counts
from ._features import Intermediates, format_intermediates, tokens_to_map
from ._timm import feature_take_indices
from .merging import Carried, join_carried, pool_weighted, restore_tokens
from .pruning_passes import Dropped, drop_tokens, mask_tokens
from .pruning_settings import PruningSettings, pop_pruning


class MaskedOutput(NamedTuple):
    """What a masked forward gives: `logits` (B, classes), `tokens` (B, prefix + N, D), `masks` (B, stages, N)."""

    logits: torch.Tensor
    tokens: torch.Tensor
    masks: torch.Tensor


class TokenPruning(PruningSettings):
    """What a ViT needs to drop image tokens in front of some of its blocks; a mixin, before the ViT's own class.

    In front of the block of stage s (counted from 1) the keep_rate ** s * N best of the N image tokens stay, by exact
    count; of equally good ones the first. Prefix tokens always stay. In eval mode, and with a scorer that needs no
    training, the tokens that fall are gone, so that later blocks are smaller; in train mode a model with predictors
    masks them instead (`forward_masked`), so that these get gradients, and merges none.

    Merging needs no training: between attention and MLP of a block the r image tokens most like another one are joined
    to it, as their mean; attention and mean pooling count a token as often as it stands for tokens. The scorer 'merge'
    drops none: with `r` each block merges as many, with `similarity` all pairs whose keys are so much alike; without
    both as many are left in front of each stage as by any other scorer. With another scorer and `r`, tokens are dropped
    and merged.

    Args:
        *args: Of the ViT.
        keep_rate: Share of the tokens that each stage keeps, in (0, 1]; at 1 the model is the ViT.
        stages: Indices of the blocks in front of which tokens fall; by default a quarter, a half and three quarters of
            the depth (3, 6, 9 of 12).
        scorer: What judges tokens: 'relevance' (a trained predictor at each stage); 'cls-attention' or
            'received-attention' of the block before; 'norm' of the embedding; 'random'. See `SCORERS`. With 'merge'
            none are dropped.
        read: Whose attention the predictors see: that of the 'last' block before the stage, or of 'all' since the
            previous one. A block that is read leaves fused attention.
        scorer_seed: Of the scorer 'random', which draws once for each count of tokens.
        r: How many tokens each block merges, or a list of one number for each block; half of the tokens at most are
            merged in one.
        similarity: Least cosine of keys, in [-1, 1], at which every block merges a token with the one most like it;
            images then differ in count and pass the blocks one by one. With the scorer 'merge', in place of `r`.
        **kwargs: Of the ViT.

    Raises:
        ValueError: keep_rate outside (0, 1]; stages out of order or past the depth; an unknown scorer; an `r` that does
            not fit the blocks; a `similarity` outside [-1, 1], or beside `r` or another scorer; blocks that are not
            timm's `Block` with its `Attention`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pruning = pop_pruning(kwargs)
        super().__init__(*args, **kwargs)
        self.init_pruning(**pruning)

    def _drop(
            self,
            x: torch.Tensor,
            n_blocks: int | None = None,
            take: Sequence[int] = (),
            track: bool = False,
    ) -> Dropped:
        if self.similarity is None:
            return self._drop_batch(x, n_blocks, take, track)
        check_eager(x, self.similarity)
        images = [self._drop_batch(one, n_blocks, take, track) for one in x.split(1)]
        taken = [join_carried(tokens) for tokens in zip(*(image.taken for image in images))]
        return Dropped(join_carried([image.last for image in images]), [], taken)

    def _drop_batch(self, x: torch.Tensor, n_blocks: int | None, take: Sequence[int], track: bool) -> Dropped:
        n, plan, depth = x.shape[1] - self.num_prefix_tokens, self.plan, len(self.blocks)
        counts: list[int] = []
        merging: dict[int, int | None] = dict.fromkeys(range(depth))
        if self.similarity is None:
            counts, merges = plan_counts(n, depth, plan.stages, self._shares, plan.r, plan.merges_alone)
            merging = {i: merges[i] for i in plan.merging_blocks(self._below_1) if i < depth}
        carried = Carried(x, sources=torch.arange(n, device=x.device).expand(x.shape[0], -1) if track else None)
        return drop_tokens(self, carried, plan, counts, self.predictors, n_blocks, take, merging)

    def kept_tokens(self, x: torch.Tensor, **placement: torch.Tensor) -> list[torch.Tensor]:
        """Which image tokens are left after each stage in eval mode.

        Args:
            x: Images (B, C, H, W).
            **placement: `positions`, for a subpixel ViT.

        Returns:
            For each stage indices (B, count), ascending, into the N tokens of the image.

        Raises:
            ValueError: Tokens are merged, so that none of those left is one of the image's.
        """
        if self.merges:
            raise ValueError('tokens are merged, so that those left are none of the first: see token_sources.')
        return self._drop(self._embed(x, **placement)).kept

    def token_sources(self, x: torch.Tensor, **placement: torch.Tensor) -> torch.Tensor:
        """Where each image token is at the end, in eval mode.

        Args:
            x: Images (B, C, H, W).
            **placement: `positions`, for a subpixel ViT.

        Returns:
            (B, N) int64: for each of the image's N tokens the index, among the image tokens left after the last block
            (the prefix does not count), of that which holds it; -1 where it was dropped.

        Example:
            >>> import timm_spot, torch
            >>> model = timm_spot.sparsify('vit_tiny_patch16_224', depth=2, scorer='merge', r=8).eval()
            >>> sources = model.token_sources(torch.rand(1, 3, 224, 224))
            >>> sources.shape, sources.unique().numel()
            (torch.Size([1, 196]), 180)
        """
        return self._drop(self._embed(x, **placement), track=True).last.sources

    def forward_dropped(self, x: torch.Tensor) -> torch.Tensor:
        """Embedded tokens to those left after the last block, normalised, (B, prefix + count, D)."""
        return self.join_predictors(self.norm(self._drop(x).last.tokens))

    def forward_sized(self, x: torch.Tensor, **placement: torch.Tensor) -> Carried:
        """Images (B, C, H, W) to what `forward_head` takes where tokens are merged: those left, normalised, with sizes.

        Args:
            x: Images (B, C, H, W).
            **placement: `positions`, for a subpixel ViT.
        """
        last = self._drop(self._embed(x, **placement)).last
        return last._replace(tokens=self.join_predictors(self.norm(last.tokens)))

    def forward_head(self, x: torch.Tensor | Carried, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, prefix + count, D) to logits (B, num_classes); with `pre_logits` what the classifier is given.

        Tokens that `forward_sized` gave are pooled in proportion to their size.
        """
        if not isinstance(x, Carried):
            return super().forward_head(x, pre_logits)
        if x.sizes is None:
            return super().forward_head(x.tokens, pre_logits)
        return self._weighted_head(x.tokens, x.sizes, pre_logits)

    def forward_masked(
            self,
            x: torch.Tensor,
            keep_rate: float | None = None,
            masks: torch.Tensor | None = None,
            **placement: torch.Tensor,
    ) -> MaskedOutput:
        """Forward for training: tokens that fall are masked, not dropped, and the masks are drawn at random.

        A token that fell is no key any more and is not pooled, so that logits are those of the forward that drops the
        same tokens. Masks are differentiable (straight-through), their expectation is that of the model's keep rate
        while the predictors are fresh.

        Args:
            x: Images (B, C, H, W).
            keep_rate: Instead of the model's.
            masks: (B, stages, N) of ones and zeros instead of drawn ones.
            **placement: `positions`, for a subpixel ViT.

        Raises:
            ValueError: No masks are given and there are no predictors, or the keep rate is 1; pooling that cannot be
                masked.
        """
        keep_rate = self.keep_rate if keep_rate is None else keep_rate
        check_keep_rate(keep_rate)
        if masks is None and (not self.predictors or keep_rate == 1):
            raise ValueError(
                f"masks are drawn for scorer='relevance' and a keep_rate below 1, not for scorer={self.scorer!r} and "
                f'keep_rate={keep_rate}.')
        x, masks = mask_tokens(self, self._embed(x, **placement), self.plan, keep_rate, self.predictors, masks)
        x = self.norm(x)
        if self.attn_pool is not None or self.global_pool not in ('token', 'avg'):
            raise ValueError(
                f"global_pool={self.global_pool!r} cannot be masked, so the predictors cannot be trained: use 'token' "
                "or 'avg'.")
        keep = masks[:, -1]
        keep = torch.cat([keep.new_ones((keep.shape[0], self.num_prefix_tokens)), keep], dim=1)
        return MaskedOutput(self._weighted_head(x, keep), x, masks)

    def _weighted_head(self, x: torch.Tensor, weights: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of tokens (B, prefix + n, D), each pooled as much as its weight, of (B, prefix + n), says."""
        x = self.head_drop(self.fc_norm(pool_weighted(self, x, weights)))
        return x if pre_logits else self.head(x)

    def join_predictors(self, x: torch.Tensor) -> torch.Tensor:
        """The same tensor, with predictors that had no part in it joined to its graph, for a gradient of zero.

        At keep rate 1 no token is judged, otherwise only masks have a gradient, and DistributedDataParallel waits for
        one of every parameter.
        """
        if self.training:
            for p in self.predictors.parameters():
                x = x + p.flatten()[:0].sum().to(x.dtype)
        return x

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
            unmerge: bool = False,
            **placement: torch.Tensor,
    ) -> Intermediates:
        """Features after chosen blocks, with timm's arguments and results.

        Maps ('NCHW') show each of the image's tokens: one that was merged as that which holds it, one that was dropped
        as the nearest of those that were not. 'NLC' gives the tokens left, with `unmerge` all N tokens in the same way.
        The final features, beside the intermediates, are always those of the tokens left.

        Raises:
            ValueError: Maps are asked for and the tokens are placed on no lattice.
        """
        if not self.reduces:
            return super().forward_intermediates(
                x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict,
                attn_mask, is_causal, **placement)
        check_no_mask(attn_mask, is_causal)
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NLC'.")
        restore = unmerge or output_fmt == 'NCHW'
        to_map = partial(tokens_to_map, size=self.token_map_size(x, **placement)) if output_fmt == 'NCHW' else None
        positions, placement = self.place_tokens(x, **placement) if restore else (None, placement)
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        dropped = self._drop(
            self._embed(x, **placement), max_index + 1 if stop_early else None, take_indices, track=restore)
        taken = dropped.taken
        if restore:
            taken = [restore_tokens(y, self.num_prefix_tokens, positions if self.drops else None) for y in taken]
        tokens = [self.join_predictors(self.norm(y.tokens) if norm else y.tokens) for y in taken]
        last = None if intermediates_only else self.norm(dropped.last.tokens)
        return format_intermediates(
            tokens, last, self.num_prefix_tokens, return_prefix_tokens, output_dict, to_map)


def features_for_head(model: nn.Module, images: torch.Tensor, **placement: torch.Tensor) -> torch.Tensor | Carried:
    """What `model.forward_head` takes to give the model's logits: where tokens are merged, with their sizes."""
    merges = isinstance(model, TokenPruning) and model.merges
    return (model.forward_sized if merges else model.forward_features)(images, **placement)


def check_no_mask(attn_mask: torch.Tensor | None, is_causal: bool) -> None:
    """Raise ValueError for a mask of all tokens, where some are dropped or merged."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            'attn_mask and is_causal speak of all tokens, and some are dropped or merged on the way: set_keep_rate(1) '
            'first.')


def check_eager(x: torch.Tensor, similarity: float) -> None:
    """Raise ValueError where no values are known by which tokens could be counted: in a graph, on the meta device."""
    if isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta:
        raise ValueError(
            f'similarity={similarity}: how many tokens are merged depends on the image, which no graph (export, ONNX, '
            'fullgraph=True) can hold: set_merging(r) first.')


torch.fx.wrap('plan_counts')  # a leaf of an FX graph, where counts are not known
