"""The passes of a ViT that drops image tokens in front of some of its blocks, and the one that masks them for training.

Paper: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488

What attention says about a token is computed in `timm_spot.ops`, the predictor is in `relevance.py`, the models are in
`sparsify.py`.
"""
from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from timm.layers import Attention
from timm.models import checkpoint
from timm.models.vision_transformer import Block
from torch import nn

from ..ops.attention import (
    STATISTICS,
    attention_statistics,
    check_keep_rate,
    class_attention,
    gather_tokens,
    keep_counts,
    keep_top,
    random_scores,
    received_attention,
)
from ._features import Intermediates, format_intermediates
from ._timm import feature_take_indices, update_model_args
from .pruning_predictor import SCORERS, RelevancePredictor, attend, sample_mask

_PRUNING_FIELDS = ('keep_rate', 'stages', 'scorer', 'read', 'scorer_seed')


class MaskedOutput(NamedTuple):
    """What a masked forward gives: `logits` (B, classes), `tokens` (B, prefix + N, D), `masks` (B, stages, N)."""

    logits: torch.Tensor
    tokens: torch.Tensor
    masks: torch.Tensor


class TokenPruning:
    """What a ViT needs to drop image tokens in front of some of its blocks; a mixin, before the ViT's own class.

    In front of the block of stage s (counted from 1) the keep_rate ** s * N most relevant of the N image tokens stay,
    by exact count; of equally relevant ones the first. Prefix tokens always stay. In eval mode, and with a scorer that
    is not trained, the tokens that fall are gone, so that later blocks are smaller; in train mode `forward` masks them
    instead (`forward_masked`), so that the predictors get gradients.

    Args:
        *args: Of the ViT.
        keep_rate: Share of the tokens that each stage keeps, in (0, 1]; at 1 the model is the ViT.
        stages: Indices of the blocks in front of which tokens fall; by default a quarter, a half and three quarters of
            the depth (3, 6, 9 of 12).
        scorer: 'relevance' (a trained predictor at each stage); 'cls-attention' or 'received-attention' of the block
            before; 'norm' of the embedding; 'random'.
        read: Whose attention the predictors see: that of the 'last' block before the stage, or of 'all' since the
            previous one. A block that is read leaves fused attention.
        scorer_seed: Of the scorer 'random', which draws once for each count of tokens.
        **kwargs: Of the ViT.

    Raises:
        ValueError: keep_rate outside (0, 1]; stages out of order or past the depth; an unknown scorer; blocks that are
            not timm's `Block` with its `Attention`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pruning = pop_pruning(kwargs)
        super().__init__(*args, **kwargs)
        self._init_pruning(**pruning)

    def _init_pruning(
            self,
            keep_rate: float = 0.7,
            stages: Optional[Sequence[int]] = None,
            scorer: str = 'relevance',
            read: str = 'last',
            scorer_seed: int = 0,
    ) -> None:
        """What the constructor adds to a ViT; on its own, on one that is built already."""
        check_keep_rate(keep_rate)
        depth = len(self.blocks)
        self.stages = _check_stages(stages, depth)
        for name, value, known in (('scorer', scorer, SCORERS), ('read', read, ('all', 'last'))):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown, use one of {', '.join(known)}.")
        for i, block in enumerate(self.blocks):
            if type(block) is not Block or type(block.attn) is not Attention:
                kind = type(block).__name__ if type(block) is not Block else type(block.attn).__name__
                raise ValueError(
                    f"block {i} is, or attends by, a {kind}: tokens can be dropped where blocks are timm's Block with "
                    'its Attention.')
        self.keep_rate = keep_rate
        self.scorer = scorer
        self.scorer_seed = scorer_seed
        before = [range(begin, end) for begin, end in zip((0, *self.stages), self.stages)]
        if scorer in ('random', 'norm'):
            self.read_blocks: Tuple[int, ...] = ()
        elif scorer == 'relevance' and read == 'all':
            self.read_blocks = tuple(i for blocks in before for i in blocks)
        else:
            self.read_blocks = tuple(stage - 1 for stage in self.stages)
        weight = self.blocks[0].attn.qkv.weight
        self.predictors = nn.ModuleList([
            RelevancePredictor(
                self.embed_dim,
                STATISTICS * sum(self.blocks[i].attn.num_heads for i in blocks if i in self.read_blocks),
                device=weight.device,
                dtype=weight.dtype,
            ) for blocks in before] if scorer == 'relevance' else [])

    def set_keep_rate(self, keep_rate: float) -> None:
        """Change the share of the tokens that each stage keeps, in (0, 1]; a saved model keeps the change."""
        check_keep_rate(keep_rate)
        self.keep_rate = keep_rate
        update_model_args(self, keep_rate=keep_rate)

    def set_scorer(self, scorer: str, scorer_seed: int = 0) -> None:
        """Judge tokens by a scorer that needs no training; predictors are dropped. A saved model keeps the change.

        Raises:
            ValueError: An unknown scorer, or 'relevance', whose predictors would be fresh.
        """
        if scorer == 'relevance':
            raise ValueError("scorer='relevance' needs trained predictors: load a model that has them.")
        self._init_pruning(self.keep_rate, self.stages, scorer, scorer_seed=scorer_seed)
        update_model_args(self, scorer=scorer, scorer_seed=scorer_seed)

    def _forward_gathered(
            self,
            x: torch.Tensor,
            n_blocks: Optional[int] = None,
            take: Sequence[int] = (),
    ) -> Tuple[torch.Tensor, List[torch.Tensor], List[torch.Tensor]]:
        """Embedded tokens through the first `n_blocks`, dropping tokens on the way.

        Returns:
            Tokens; indices (B, count) of those left at each stage, among the embedded ones; tokens after blocks `take`.
        """
        n_prefix = self.num_prefix_tokens
        counts = keep_counts(x.shape[1] - n_prefix, self.keep_rate, len(self.stages))
        kept: List[torch.Tensor] = []
        taken, seen = [], []
        for i, block in enumerate(self.blocks[:n_blocks]):
            if i in self.stages:
                stage = self.stages.index(i)
                index = keep_top(self._score(stage, x[:, n_prefix:], seen), counts[stage])
                x = gather_tokens(x, index, n_prefix)
                kept.append(kept[-1].gather(1, index) if kept else index)
                seen = []
            x, attention = self._run_block(block, x, read=i in self.read_blocks)
            if attention is not None:
                seen.append(self._observe(attention))
            if i in take:
                taken.append(x)
        return x, kept, taken

    def _forward_masked(
            self,
            x: torch.Tensor,
            keep_rate: float,
            masks: Optional[torch.Tensor] = None,
    ) -> MaskedOutput:
        """`_forward_gathered` up to the logits, but with the tokens that fall masked as keys in all later blocks."""
        n_prefix = self.num_prefix_tokens
        keep = torch.ones_like(x[:, n_prefix:, 0], dtype=torch.float32)
        prefix = torch.ones_like(x[:, :n_prefix, 0], dtype=torch.float32)
        keys: Optional[torch.Tensor] = None
        drawn, seen = [], []
        for i, block in enumerate(self.blocks):
            if i in self.stages:
                stage = self.stages.index(i)
                if masks is None:
                    keep = sample_mask(self._score(stage, x[:, n_prefix:], seen, keep.detach()), keep, keep_rate)
                else:
                    keep = masks[:, stage].float()
                drawn.append(keep)
                keys = torch.cat([prefix, keep], dim=1)
                seen = []
            x, attention = self._run_block(block, x, read=masks is None and i in self.read_blocks, keys=keys)
            if attention is not None:
                seen.append(self._observe(attention, keep.detach()))
        x = self.norm(x)
        return MaskedOutput(self._masked_head(x, prefix, keep), x, torch.stack(drawn, dim=1))

    def _run_block(
            self,
            block: nn.Module,
            x: torch.Tensor,
            read: bool = False,
            keys: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """One block; with `read`, also its attention. A block neither read nor masked keeps fused attention."""
        if not read and keys is None:
            return (checkpoint(block, x) if self.grad_checkpointing else block(x)), None
        x, attention = (
            checkpoint(_attending_block, block, x, keys) if self.grad_checkpointing
            else _attending_block(block, x, keys))
        return x, attention if read else None

    def _observe(self, attention: torch.Tensor, keep: Optional[torch.Tensor] = None) -> torch.Tensor:
        """What the scorer wants to know of a block's attention."""
        if self.scorer == 'relevance':
            return attention_statistics(attention, self.num_prefix_tokens, self.has_class_token, keep)
        if self.scorer == 'cls-attention':
            return class_attention(attention, self.num_prefix_tokens, self.has_class_token)
        return received_attention(attention, self.num_prefix_tokens)

    def _score(
            self,
            stage: int,
            x: torch.Tensor,
            seen: List[torch.Tensor],
            keep: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Score (B, n) of image tokens (B, n, D), from what was observed since the previous stage."""
        if self.scorer == 'relevance':
            return self.predictors[stage](x, torch.cat(seen, dim=-1), keep).float()
        if self.scorer == 'random':
            return random_scores(x.shape[1], self.scorer_seed).to(x.device).expand(x.shape[0], -1)
        if self.scorer == 'norm':
            return x.float().norm(dim=-1)
        return seen[-1].float()

    def _masked_head(self, x: torch.Tensor, prefix: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Logits from all tokens, those masked not pooled."""
        if self.attn_pool is not None or self.global_pool not in ('token', 'avg'):
            raise ValueError(
                f"global_pool={self.global_pool!r} cannot be masked, so the predictors cannot be trained: use 'token' "
                "or 'avg'.")
        if self.global_pool == 'token':
            x = x[:, 0]
        else:
            weights = torch.cat([prefix if self.pool_include_prefix else torch.zeros_like(prefix), keep], dim=1)
            weights = weights / weights.sum(dim=1, keepdim=True)
            x = (weights[:, None].to(x.dtype) @ x).squeeze(1)
        return self.head(self.head_drop(self.fc_norm(x)))

    def _masks(self) -> bool:
        """Whether `forward` masks tokens instead of dropping them."""
        return self.training and self.scorer == 'relevance' and self.keep_rate < 1

    def kept_tokens(self, x: torch.Tensor, **placement: torch.Tensor) -> List[torch.Tensor]:
        """Which image tokens are left after each stage in eval mode.

        Args:
            x: Images (B, C, H, W).
            **placement: `positions`, for a subpixel ViT.

        Returns:
            For each stage indices (B, count), ascending, into the N tokens of the image.
        """
        return self._forward_gathered(self._embed(x, **placement))[1]

    def forward_masked(
            self,
            x: torch.Tensor,
            keep_rate: Optional[float] = None,
            masks: Optional[torch.Tensor] = None,
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
        if masks is None and (self.scorer != 'relevance' or keep_rate == 1):
            raise ValueError(
                f"masks are drawn for scorer='relevance' and a keep_rate below 1, not for scorer={self.scorer!r} and "
                f'keep_rate={keep_rate}.')
        return self._forward_masked(self._embed(x, **placement), keep_rate, masks)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
            **placement: torch.Tensor,
    ) -> Intermediates:
        """Features after chosen blocks, with timm's arguments and results: 'NLC' of the tokens left there.

        Raises:
            ValueError: Maps ('NCHW') are asked for and the keep rate is below 1.
        """
        if self.keep_rate == 1:
            return super().forward_intermediates(
                x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict,
                attn_mask, is_causal, **placement)
        check_no_mask(attn_mask, is_causal)
        if output_fmt != 'NLC':
            raise ValueError(
                f"output_fmt={output_fmt!r}: the tokens left at keep_rate={self.keep_rate} form no feature map. Use "
                "output_fmt='NLC', or set_keep_rate(1).")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, _, taken = self._forward_gathered(
            self._embed(x, **placement), max_index + 1 if stop_early else None, take_indices)
        taken = [self.norm(y) for y in taken] if norm else taken
        last = None if intermediates_only else self.norm(x)
        return format_intermediates(taken, last, self.num_prefix_tokens, return_prefix_tokens, output_dict)


def check_no_mask(attn_mask: Optional[torch.Tensor], is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError(
            'attn_mask and is_causal speak of all tokens, and some are dropped on the way: set_keep_rate(1) first.')


def _attending_block(
        block: Block,
        x: torch.Tensor,
        keys: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    y, attention = attend(block.attn, block.norm1(x), keys)
    x = x + block.drop_path1(block.ls1(y))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), attention


def pop_pruning(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Take the keywords of `TokenPruning` out of a model's."""
    return {name: kwargs.pop(name) for name in _PRUNING_FIELDS if name in kwargs}


def _check_stages(stages: Optional[Sequence[int]], depth: int) -> Tuple[int, ...]:
    if stages is None:
        stages = sorted({max(1, quarters * depth // 4) for quarters in (1, 2, 3)})
    stages = tuple(stages)
    for stage in stages:
        if isinstance(stage, bool) or not isinstance(stage, int):
            raise TypeError(f'stages={stages} must be ints, indices of blocks.')
    if not stages or list(stages) != sorted(set(stages)) or not 1 <= stages[0] <= stages[-1] < depth:
        raise ValueError(
            f'stages={stages} must be one or more indices of blocks in rising order, from 1 (attention is read before) '
            f'to {depth - 1} (the model has {depth} blocks).')
    return stages


# Leaves of an FX graph: what they do depends on shapes and values. (timm's register_notrace_function reaches only
# functions that the module of the model's class calls itself.)
for name in ('attention_statistics', 'gather_tokens', 'keep_counts', 'keep_top', 'random_scores'):
    torch.fx.wrap(name)
