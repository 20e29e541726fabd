"""The two passes through the blocks of a ViT that prunes: image tokens are dropped on the way, or masked for training.

Paper: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.models import checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..ops.attention import gather_tokens, keep_top
from .attention import read_block
from .pruning_predictor import sample_mask
from .pruning_scorers import Judged, get_scorer


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """Where image tokens fall, and what judges them.

    Attributes:
        stages: Indices of the blocks in front of which tokens fall, rising.
        scorer: Name, see `SCORERS`.
        read: 'last' or 'all', for a scorer that leaves the choice.
        scorer_seed: Of a scorer that draws.
    """

    stages: tuple[int, ...]
    scorer: str = 'relevance'
    read: str = 'last'
    scorer_seed: int = 0

    @property
    def read_before(self) -> list[tuple[int, ...]]:
        """For each stage the blocks since the previous one whose attention is read."""
        reads = get_scorer(self.scorer).reads
        if not reads:
            return [() for _ in self.stages]
        if reads == 'last' or self.read == 'last':
            return [(stage - 1,) for stage in self.stages]
        return [tuple(range(begin, end)) for begin, end in zip((0, *self.stages), self.stages)]

    @property
    def read_blocks(self) -> tuple[int, ...]:
        """All blocks whose attention is read."""
        return tuple(i for blocks in self.read_before for i in blocks)


def make_plan(
        depth: int,
        stages: Sequence[int] | None = None,
        scorer: str = 'relevance',
        read: str = 'last',
        scorer_seed: int = 0,
) -> PruningPlan:
    """The plan for a ViT of `depth` blocks; by default tokens fall after a quarter, a half and three quarters of them.

    Raises:
        TypeError, ValueError: Stages that are no ints, out of order or past the depth; an unknown scorer or `read`.
    """
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
    get_scorer(scorer)
    if read not in ('all', 'last'):
        raise ValueError(f'read={read!r} is unknown, use one of all, last.')
    return PruningPlan(stages, scorer, read, scorer_seed)


class Dropped(NamedTuple):
    """What a pass that drops tokens gives.

    Attributes:
        tokens: (B, prefix + count, D), before the last norm.
        kept: For each stage, indices (B, count) of those left, among the embedded ones.
        taken: Tokens after the blocks asked for.
    """

    tokens: torch.Tensor
    kept: list[torch.Tensor]
    taken: list[torch.Tensor]


def drop_tokens(
        vit: VisionTransformer,
        x: torch.Tensor,
        plan: PruningPlan,
        counts: Sequence[int],
        predictors: Sequence[nn.Module] = (),
        n_blocks: int | None = None,
        take: Sequence[int] = (),
) -> Dropped:
    """Tokens through the blocks of a ViT, those that score least dropped on the way.

    Args:
        vit: Any timm VisionTransformer.
        x: Embedded tokens (B, prefix + N, D).
        plan: Where tokens fall.
        counts: How many image tokens are left at each stage.
        predictors: Of each stage, for a scorer that needs training.
        n_blocks: How many blocks to run, by default all.
        take: Indices of blocks after which the tokens are returned as well.
    """
    n_prefix, read_blocks = vit.num_prefix_tokens, plan.read_blocks
    kept: list[torch.Tensor] = []
    taken, seen = [], []
    for i, block in enumerate(vit.blocks[:n_blocks]):
        if i in plan.stages:
            stage = plan.stages.index(i)
            index = keep_top(_score(plan, stage, x[:, n_prefix:], seen, predictors), counts[stage])
            x = gather_tokens(x, index, n_prefix)
            kept.append(kept[-1].gather(1, index) if kept else index)
            seen = []
        x, attention = _run_block(vit, block, x, read=i in read_blocks)
        if attention is not None:
            seen.append(observe(plan.scorer, attention, n_prefix, vit.has_class_token))
        if i in take:
            taken.append(x)
    return Dropped(x, kept, taken)


def mask_tokens(
        vit: VisionTransformer,
        x: torch.Tensor,
        plan: PruningPlan,
        keep_rate: float,
        predictors: Sequence[nn.Module] = (),
        masks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `drop_tokens`, but the tokens that fall are masked as keys in all later blocks, so that gradients reach them.

    Args:
        vit: Any timm VisionTransformer.
        x: Embedded tokens (B, prefix + N, D).
        plan: Where tokens fall.
        keep_rate: At which masks are drawn.
        predictors: Of each stage.
        masks: (B, stages, N) of ones and zeros, instead of drawn ones.

    Returns:
        Tokens (B, prefix + N, D), before the last norm, and masks (B, stages, N).
    """
    n_prefix, read_blocks = vit.num_prefix_tokens, plan.read_blocks
    keep = torch.ones_like(x[:, n_prefix:, 0], dtype=torch.float32)
    prefix = torch.ones_like(x[:, :n_prefix, 0], dtype=torch.float32)
    keys: torch.Tensor | None = None
    drawn, seen = [], []
    for i, block in enumerate(vit.blocks):
        if i in plan.stages:
            stage = plan.stages.index(i)
            if masks is None:
                scores = _score(plan, stage, x[:, n_prefix:], seen, predictors, keep.detach())
                keep = sample_mask(scores, keep, keep_rate)
            else:
                keep = masks[:, stage].float()
            drawn.append(keep)
            keys = torch.cat([prefix, keep], dim=1)
            seen = []
        x, attention = _run_block(vit, block, x, read=masks is None and i in read_blocks, keys=keys)
        if attention is not None:
            seen.append(observe(plan.scorer, attention, n_prefix, vit.has_class_token, keep.detach()))
    return x, torch.stack(drawn, dim=1)


def observe(
        scorer: str,
        attention: torch.Tensor,
        num_prefix_tokens: int,
        class_token: bool,
        keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a scorer wants to know of a block's attention, see `Scorer.observe`."""
    return get_scorer(scorer).observe(attention, num_prefix_tokens, class_token, keep)


def _score(
        plan: PruningPlan,
        stage: int,
        x: torch.Tensor,
        seen: list[torch.Tensor],
        predictors: Sequence[nn.Module],
        keep: torch.Tensor | None = None,
) -> torch.Tensor:
    predictor = predictors[stage] if len(predictors) else None
    return get_scorer(plan.scorer).score(Judged(x, seen, keep, predictor, plan.scorer_seed))


def _run_block(
        vit: VisionTransformer,
        block: nn.Module,
        x: torch.Tensor,
        read: bool = False,
        keys: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One block; with `read`, also its attention. A block neither read nor masked keeps fused attention."""
    if not read and keys is None:
        return (checkpoint(block, x) if vit.grad_checkpointing else block(x)), None
    x, attention = checkpoint(read_block, block, x, keys) if vit.grad_checkpointing else read_block(block, x, keys)
    return x, attention if read else None


# Leaves of an FX graph: what they do depends on shapes and values, or on modules that the graph does not know. (timm's
# register_notrace_function reaches only functions that the module of the model's class calls itself.)
for name in ('gather_tokens', 'keep_top', 'observe', 'read_block'):
    torch.fx.wrap(name)
