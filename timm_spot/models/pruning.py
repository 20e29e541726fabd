"""A ViT that drops image tokens in front of some of its blocks, and masks them for training: what its classes share.

Paper: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488

The passes through the blocks are in `pruning_passes.py`, what judges tokens in `pruning_scorers.py`, the models in
`pruning_vit.py` and `pruning_zoo.py`.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn

from ..ops.attention import STATISTICS, check_keep_rate, keep_shares, share_counts
from ._features import Intermediates, format_intermediates
from ._shallow import shallow_copy
from ._timm import feature_take_indices, update_model_args
from .pruning_passes import Dropped, drop_tokens, make_plan, mask_tokens
from .pruning_predictor import RelevancePredictor
from .pruning_scorers import get_scorer

PRUNING_FIELDS = ('keep_rate', 'stages', 'scorer', 'read', 'scorer_seed')

Model = TypeVar('Model', bound='TokenPruning')


class MaskedOutput(NamedTuple):
    """What a masked forward gives: `logits` (B, classes), `tokens` (B, prefix + N, D), `masks` (B, stages, N)."""

    logits: torch.Tensor
    tokens: torch.Tensor
    masks: torch.Tensor


class TokenPruning:
    """What a ViT needs to drop image tokens in front of some of its blocks; a mixin, before the ViT's own class.

    In front of the block of stage s (counted from 1) the keep_rate ** s * N best of the N image tokens stay, by exact
    count; of equally good ones the first. Prefix tokens always stay. In eval mode, and with a scorer that needs no
    training, the tokens that fall are gone, so that later blocks are smaller; in train mode `forward` masks them
    instead (`forward_masked`), so that the predictors get gradients.

    Args:
        *args: Of the ViT.
        keep_rate: Share of the tokens that each stage keeps, in (0, 1]; at 1 the model is the ViT.
        stages: Indices of the blocks in front of which tokens fall; by default a quarter, a half and three quarters of
            the depth (3, 6, 9 of 12).
        scorer: What judges tokens: 'relevance' (a trained predictor at each stage); 'cls-attention' or
            'received-attention' of the block before; 'norm' of the embedding; 'random'. See `SCORERS`.
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
        self.init_pruning(**pruning)

    def init_pruning(
            self,
            keep_rate: float = 0.7,
            stages: Sequence[int] | None = None,
            scorer: str = 'relevance',
            read: str = 'last',
            scorer_seed: int = 0,
    ) -> None:
        """What the constructor adds to a ViT; on its own, on one that is built already."""
        check_keep_rate(keep_rate)
        plan = make_plan(len(self.blocks), stages, scorer, read, scorer_seed)
        for i, block in enumerate(self.blocks):
            if type(block) is not Block or type(block.attn) is not Attention:
                kind = type(block).__name__ if type(block) is not Block else type(block.attn).__name__
                raise ValueError(
                    f"block {i} is, or attends by, a {kind}: tokens can be dropped where blocks are timm's Block with "
                    'its Attention.')
        self.plan = plan
        self.keep_rate = keep_rate
        self.predictors = nn.ModuleList()
        if get_scorer(scorer).needs_training:
            weight = self.blocks[0].attn.qkv.weight
            for blocks in plan.read_before:
                num_statistics = STATISTICS * sum(self.blocks[i].attn.num_heads for i in blocks)
                self.predictors.append(RelevancePredictor(
                    self.embed_dim, num_statistics, device=weight.device, dtype=weight.dtype))

    @property
    def keep_rate(self) -> float:
        """Share of the tokens that each stage keeps."""
        return self._keep_rate

    @keep_rate.setter
    def keep_rate(self, keep_rate: float) -> None:
        # Whole numbers: `torch.compile` takes a float that has changed for a symbol.
        self._shares = keep_shares(keep_rate, len(self.plan.stages))
        self._keep_rate = keep_rate

    @property
    def stages(self) -> tuple[int, ...]:
        """Indices of the blocks in front of which tokens fall."""
        return self.plan.stages

    @property
    def scorer(self) -> str:
        """Name of what judges tokens."""
        return self.plan.scorer

    @property
    def drops(self) -> bool:
        """Whether any token falls: the keep rate is below 1."""
        return self._shares[0] != (1, 1)

    @property
    def masks(self) -> bool:
        """Whether `forward` masks tokens instead of dropping them."""
        return self.training and self.drops and len(self.predictors) > 0

    def set_keep_rate(self, keep_rate: float) -> None:
        """Change the share of the tokens that each stage keeps, in (0, 1]; a saved model keeps the change."""
        self.keep_rate = keep_rate
        update_model_args(self, keep_rate=keep_rate)

    def set_scorer(self, scorer: str, scorer_seed: int = 0) -> None:
        """Judge tokens by a scorer that needs no training; predictors are dropped. A saved model keeps the change.

        Raises:
            ValueError: An unknown scorer, or 'relevance', whose predictors would be fresh.
        """
        if get_scorer(scorer).needs_training:
            raise ValueError(f'scorer={scorer!r} needs trained predictors: load a model that has them.')
        self.init_pruning(self.keep_rate, self.stages, scorer, scorer_seed=scorer_seed)
        update_model_args(self, scorer=scorer, scorer_seed=scorer_seed)

    def pruned(
            self: Model,
            keep_rate: float | None = None,
            scorer: str | None = None,
            scorer_seed: int | None = None,
    ) -> Model:
        """This model at another keep rate, or by another scorer: a shallow copy that shares its weights.

        Args:
            keep_rate: In (0, 1]; None is the model's.
            scorer: One that needs no training, or the model's, which None is too.
            scorer_seed: Of the scorer 'random'; None is the model's.

        Raises:
            ValueError: As `set_keep_rate` and `set_scorer`.

        Example:
            >>> import timm_spot, torch
            >>> model = timm_spot.sparsify('vit_tiny_patch16_224', depth=2).eval()
            >>> [index.shape[1] for index in model.pruned(0.5, 'norm').kept_tokens(torch.rand(1, 3, 224, 224))]
            [98]
            >>> model.keep_rate, model.scorer
            (0.7, 'relevance')
        """
        model = shallow_copy(self)
        scorer_seed = self.plan.scorer_seed if scorer_seed is None else scorer_seed
        if scorer not in (None, self.scorer):
            model.set_scorer(scorer, scorer_seed)
        elif scorer_seed != self.plan.scorer_seed:
            model.plan = dataclasses.replace(self.plan, scorer_seed=scorer_seed)
            update_model_args(model, scorer_seed=scorer_seed)
        if keep_rate is not None:
            model.set_keep_rate(keep_rate)
        return model

    def _drop(self, x: torch.Tensor, n_blocks: int | None = None, take: Sequence[int] = ()) -> Dropped:
        counts = share_counts(x.shape[1] - self.num_prefix_tokens, self._shares)
        return drop_tokens(self, x, self.plan, counts, self.predictors, n_blocks, take)

    def kept_tokens(self, x: torch.Tensor, **placement: torch.Tensor) -> list[torch.Tensor]:
        """Which image tokens are left after each stage in eval mode.

        Args:
            x: Images (B, C, H, W).
            **placement: `positions`, for a subpixel ViT.

        Returns:
            For each stage indices (B, count), ascending, into the N tokens of the image.
        """
        return self._drop(self._embed(x, **placement)).kept

    def forward_dropped(self, x: torch.Tensor) -> torch.Tensor:
        """Embedded tokens to those left after the last block, normalised, (B, prefix + count, D)."""
        return self.norm(self._drop(x).tokens)

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
        return MaskedOutput(self._masked_head(x, masks[:, -1]), x, masks)

    def _masked_head(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Logits from all tokens, those masked not pooled."""
        if self.attn_pool is not None or self.global_pool not in ('token', 'avg'):
            raise ValueError(
                f"global_pool={self.global_pool!r} cannot be masked, so the predictors cannot be trained: use 'token' "
                "or 'avg'.")
        if self.global_pool == 'token':
            x = x[:, 0]
        else:
            prefix = keep.new_full((keep.shape[0], self.num_prefix_tokens), float(self.pool_include_prefix))
            weights = torch.cat([prefix, keep], dim=1)
            weights = weights / weights.sum(dim=1, keepdim=True)
            x = (weights[:, None].to(x.dtype) @ x).squeeze(1)
        return self.head(self.head_drop(self.fc_norm(x)))

    def join_predictors(self, logits: torch.Tensor) -> torch.Tensor:
        """The same logits, with predictors that had no part in them joined to their graph, for a gradient of zero.

        At keep rate 1 no token is judged, and DistributedDataParallel waits for a gradient of every parameter.
        """
        if self.training:
            for p in self.predictors.parameters():
                logits = logits + p.flatten()[:0].sum().to(logits.dtype)
        return logits

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
            **placement: torch.Tensor,
    ) -> Intermediates:
        """Features after chosen blocks, with timm's arguments and results: 'NLC' of the tokens left there.

        Raises:
            ValueError: Maps ('NCHW') are asked for and the keep rate is below 1.
        """
        if not self.drops:
            return super().forward_intermediates(
                x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict,
                attn_mask, is_causal, **placement)
        check_no_mask(attn_mask, is_causal)
        if output_fmt != 'NLC':
            raise ValueError(
                f"output_fmt={output_fmt!r}: the tokens left at keep_rate={self.keep_rate} form no feature map. Use "
                "output_fmt='NLC', or set_keep_rate(1).")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, _, taken = self._drop(self._embed(x, **placement), max_index + 1 if stop_early else None, take_indices)
        taken = [self.norm(y) for y in taken] if norm else taken
        last = None if intermediates_only else self.norm(x)
        return format_intermediates(taken, last, self.num_prefix_tokens, return_prefix_tokens, output_dict)


def check_no_mask(attn_mask: torch.Tensor | None, is_causal: bool) -> None:
    """Raise ValueError for a mask of all tokens, where some are dropped."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            'attn_mask and is_causal speak of all tokens, and some are dropped on the way: set_keep_rate(1) first.')


def pop_pruning(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the keywords of `TokenPruning` out of a model's."""
    return {name: kwargs.pop(name) for name in PRUNING_FIELDS if name in kwargs}


torch.fx.wrap('share_counts')  # a leaf of an FX graph, where counts are not known
