"""The two passes through the blocks of a ViT that prunes: image tokens are dropped (or merged), or masked for training.

Paper: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.models import checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..ops.attention import keep_top
from .attention import read_block
from .merging import Carried, drop_carried, merge_block, merge_seen
from .pruning_predictor import sample_mask
from .pruning_scorers import Judged, get_scorer


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """Where image tokens fall or are merged, and what judges them.

    Attributes:
        stages: Indices of the blocks in front of which tokens fall, rising.
        scorer: Name, see `SCORERS`.
        read: 'last' or 'all', for a scorer that leaves the choice.
        scorer_seed: Of a scorer that draws.
        r: How many tokens each block merges; None for none, and with a scorer that merges for what the keep rate asks.
        similarity: Least cosine of their keys at which every block merges tokens, in place of both.
    """

    stages: tuple[int, ...]
    scorer: str = 'relevance'
    read: str = 'last'
    scorer_seed: int = 0
    r: tuple[int, ...] | None = None
    similarity: float | None = None

    @property
    def merges_alone(self) -> bool:
        """Whether no token is judged."""
        return get_scorer(self.scorer).merges

    @property
    def merges_by_itself(self) -> bool:
        """Whether `r` or `similarity` alone, and no keep rate, say how many tokens are merged."""
        return self.merges_alone and (self.r is not None or self.similarity is not None)

    def merging_blocks(self, drops: bool) -> tuple[int, ...]:
        """Indices of the blocks that merge; `drops` says whether the keep rate is below 1."""
        if self.r is not None:
            return tuple(i for i, r in enumerate(self.r) if r)
        return tuple(range(self.stages[-1])) if self.merges_alone and drops else ()

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
        r: int | Sequence[int] | None = None,
        similarity: float | None = None,
) -> PruningPlan:
    """The plan for a ViT of `depth` blocks; by default tokens fall after a quarter, a half and three quarters of them.

    Raises:
        TypeError, ValueError: Stages that are no ints, out of order or past the depth; an unknown scorer or `read`; an
            `r` that is no int and no list of one int for each block, or negative; a `similarity` that is no number in
            [-1, 1], or beside `r` or a scorer that drops tokens.
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
    plan = PruningPlan(stages, scorer, read, scorer_seed, None if r is None else _list_merges(r, depth), similarity)
    if similarity is not None:
        _check_similarity(plan, similarity)
    return plan


def _check_similarity(plan: PruningPlan, similarity: float) -> None:
    if isinstance(similarity, bool) or not isinstance(similarity, (int, float)):
        raise TypeError(f'similarity must be a number, got {similarity!r} ({type(similarity).__name__}).')
    if not -1 <= similarity <= 1:
        raise ValueError(f'similarity={similarity} must be from -1 to 1: the least cosine of keys that are merged.')
    if plan.r is not None:
        raise ValueError(f'similarity={similarity} and r={list(plan.r)} both say how many tokens are merged: give one.')
    if not plan.merges_alone:
        raise ValueError(
            f"similarity={similarity} needs scorer='merge': scorer={plan.scorer!r} keeps a share of tokens whose count "
            'it must know.')


def _list_merges(r: int | Sequence[int], depth: int) -> tuple[int, ...]:
    listed = tuple(r) if isinstance(r, Sequence) and not isinstance(r, str) else (r,) * depth
    for n in listed:
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f'r={r!r} must be an int, the tokens merged in each block, or a list of ints.')
    if len(listed) != depth or min(listed) < 0:
        raise ValueError(f'r={r!r} must be 0 or more, and a list have one number for each of the {depth} blocks.')
    return listed


class Dropped(NamedTuple):
    """What a pass that drops and merges tokens gives.

    Attributes:
        last: Tokens after the last block, (B, prefix + count, D), before the last norm, with their sizes and sources.
        kept: For each stage, indices (B, count) of those left; among the embedded ones where none are merged.
        taken: The same as `last`, after the blocks asked for.
    """

    last: Carried
    kept: list[torch.Tensor]
    taken: list[Carried]


def drop_tokens(
        vit: VisionTransformer,
        x: Carried,
        plan: PruningPlan,
        counts: Sequence[int],
        predictors: Sequence[nn.Module] = (),
        n_blocks: int | None = None,
        take: Sequence[int] = (),
        merges: Mapping[int, int | None] | None = None,
) -> Dropped:
    """Tokens through the blocks of a ViT, those that score least dropped on the way, those most alike merged.

    Args:
        vit: Any timm VisionTransformer.
        x: Embedded tokens (B, prefix + N, D); with sources, they are followed.
        plan: Where tokens fall.
        counts: How many image tokens are left at each stage; none for a plan that merges alone.
        predictors: Of each stage, for a scorer that needs training.
        n_blocks: How many blocks to run, by default all.
        take: Indices of blocks after which the tokens are returned as well.
        merges: How many tokens blocks merge, by their index; None for those of one image that are alike.
    """
    n_prefix, merges = vit.num_prefix_tokens, merges or {}
    kept: list[torch.Tensor] = []
    taken, seen = [], []
    for i, block in enumerate(vit.blocks[:n_blocks]):
        if i in plan.stages and not plan.merges_alone:
            stage = plan.stages.index(i)
            index = keep_top(_score(plan, stage, x.tokens[:, n_prefix:], seen, predictors), counts[stage])
            x = drop_carried(x, index, n_prefix)
            kept.append(kept[-1].gather(1, index) if kept and not merges else index)
            seen = []
        read = i in plan.read_blocks
        if i in merges:
            before = x.sizes
            (tokens, sizes, sources), matching, attention = _run(
                vit, merge_block, block, x, merges[i], n_prefix, read, plan.similarity)
            x = Carried(tokens, sizes, None if x.sources is None else sources)  # an FX graph cannot see that it is None
        else:
            tokens, attention = _run_block(vit, block, x.tokens, read, bias=x.bias())
            x = x._replace(tokens=tokens)
        if read:
            seen.append(observe(plan.scorer, attention, n_prefix, vit.has_class_token))
        if i in merges:
            sums = get_scorer(plan.scorer).sums
            seen = [merge_seen(values, before, matching, n_prefix, sums) for values in seen]
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
        bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One block; with `read`, also its attention. A block neither read nor masked keeps fused attention."""
    if read or keys is not None:
        x, attention = _run(vit, read_block, block, x, keys, bias)
        return x, attention if read else None
    return (_run(vit, block, x) if bias is None else _run(vit, block, x, bias)), None


def _run(vit: VisionTransformer, call: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(call, *args) if vit.grad_checkpointing else call(*args)


# Leaves of an FX graph: what they do depends on shapes and values, or on modules that the graph does not know. (timm's
# register_notrace_function reaches only functions that the module of the model's class calls itself.)
for name in ('keep_top', 'merge_block', 'merge_seen', 'observe', 'read_block'):
    torch.fx.wrap(name)
