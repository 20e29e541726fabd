"""The settings of a ViT that drops or merges tokens: how they are set, changed, saved, and varied in copies.

Papers: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488; `Token Merging: Your ViT But Faster` - https://arxiv.org/abs/2210.09461
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn

from ..ops.attention import STATISTICS, check_keep_rate, keep_shares
from ._shallow import shallow_copy
from ._timm import update_model_args
from .pruning_flops import count_multiply_adds, find_keep_rate, find_merges
from .pruning_passes import make_plan
from .pruning_predictor import RelevancePredictor
from .pruning_scorers import get_scorer

PRUNING_FIELDS = ('keep_rate', 'stages', 'scorer', 'read', 'scorer_seed', 'r', 'similarity')

Model = TypeVar('Model', bound='PruningSettings')


class PruningSettings:
    """The settings of `TokenPruning`, which says what they mean; a mixin of any ViT."""

    def init_pruning(
            self,
            keep_rate: float = 0.7,
            stages: Sequence[int] | None = None,
            scorer: str = 'relevance',
            read: str = 'last',
            scorer_seed: int = 0,
            r: int | Sequence[int] | None = None,
            similarity: float | None = None,
    ) -> None:
        """What the constructor adds to a ViT; on its own, on one that is built already."""
        check_keep_rate(keep_rate)
        plan = make_plan(len(self.blocks), stages, scorer, read, scorer_seed, r, similarity)
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
    def r(self) -> tuple[int, ...] | None:
        """How many tokens each block merges; None for none, with the scorer 'merge' for what the keep rate asks."""
        return self.plan.r

    @property
    def similarity(self) -> float | None:
        """Least cosine of the keys of tokens that are merged; None where their number is set."""
        return self.plan.similarity

    @property
    def drops(self) -> bool:
        """Whether any token is dropped: the keep rate is below 1."""
        return not self.plan.merges_alone and self._below_1

    @property
    def merges(self) -> bool:
        """Whether any token is merged."""
        return self.similarity is not None or len(self.plan.merging_blocks(self._below_1)) > 0

    @property
    def reduces(self) -> bool:
        """Whether tokens become fewer on the way."""
        return self.drops or self.merges

    @property
    def rate(self) -> str:
        """What says how many tokens are left, in words."""
        if self.similarity is not None:
            return f'similarity={self.similarity}'
        keep_rate, r = f'keep_rate={self.keep_rate}', f'r={self.r and list(self.r)}'
        return keep_rate if self.r is None else r if self.plan.merges_alone else f'{keep_rate} and {r}'

    @property
    def masks(self) -> bool:
        """Whether `forward` masks tokens instead of dropping them."""
        return self.training and self.drops and len(self.predictors) > 0

    @property
    def _below_1(self) -> bool:
        return self._shares[0] != (1, 1)

    def set_keep_rate(self, keep_rate: float) -> None:
        """Change the share of the tokens that each stage keeps, in (0, 1]; a saved model keeps the change.

        With the scorer 'merge' it takes the place of `r` and of `similarity`.
        """
        self.keep_rate = keep_rate
        update_model_args(self, keep_rate=keep_rate)
        if self.plan.merges_by_itself:
            self.set_merging(None)

    def set_merging(self, r: int | Sequence[int] | None = None, similarity: float | None = None) -> None:
        """Change how many tokens each block merges, or which, see `TokenPruning`; a saved model keeps the change."""
        plan = self.plan
        self.plan = make_plan(len(self.blocks), plan.stages, plan.scorer, plan.read, plan.scorer_seed, r, similarity)
        update_model_args(self, r=r if r is None or isinstance(r, int) else list(r), similarity=similarity)

    def set_flops(self, share: float) -> None:
        """Have at most this share of the dense model's multiply-adds, at the nominal image size.

        A saved model keeps the change.

        With the scorer 'merge' it sets `r`, as many in each block as nearly as can be; with another the keep rate,
        beside the `r` that there is.

        Args:
            share: In (0, 1].

        Raises:
            ValueError: A share outside (0, 1], or that no schedule reaches.

        Example:
            >>> import timm_spot
            >>> model = timm_spot.sparsify('deit_tiny_patch16_224', scorer='merge')
            >>> model.set_flops(0.6)
            >>> model.r
            (13, 13, 13, 13, 12, 12, 12, 12, 12, 12, 12, 12)
        """
        if not 0 < share <= 1:
            raise ValueError(f'share={share} must be greater than 0 and at most 1.')
        n = self.n_tokens if hasattr(self, 'n_tokens') else self.patch_embed.num_patches
        count = partial(count_multiply_adds, self, n)
        limit = share * count(dataclasses.replace(self.plan, r=(0,) * len(self.blocks)), 1.)
        if self.plan.merges_alone:
            r = find_merges(lambda r: count(dataclasses.replace(self.plan, r=r), 1.), limit, n, len(self.blocks))
            if r is not None:
                return self.set_merging(r)
        else:
            keep_rate = find_keep_rate(lambda rate: count(self.plan, rate, self.predictors), limit)
            if keep_rate is not None:
                return self.set_keep_rate(keep_rate)
        raise ValueError(
            f'share={share}: scorer={self.scorer!r} cannot have so few multiply-adds at {n} tokens and '
            f'stages={self.stages}.')

    def set_scorer(self, scorer: str, scorer_seed: int = 0) -> None:
        """Judge tokens by a scorer that needs no training; predictors, `r` and `similarity` go.

        A saved model keeps the change.

        Raises:
            ValueError: An unknown scorer, or 'relevance', whose predictors would be fresh.
        """
        if get_scorer(scorer).needs_training:
            raise ValueError(f'scorer={scorer!r} needs trained predictors: load a model that has them.')
        self.init_pruning(self.keep_rate, self.stages, scorer, scorer_seed=scorer_seed)
        update_model_args(self, scorer=scorer, scorer_seed=scorer_seed, r=None, similarity=None)

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


def pop_pruning(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the keywords of `TokenPruning` out of a model's."""
    return {name: kwargs.pop(name) for name in PRUNING_FIELDS if name in kwargs}
