"""What judges the tokens of a ViT that drops some: the scorers, by name.

Paper: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488

A scorer of one's own is one more entry of `SCORERS`.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..ops.attention import attention_statistics, class_attention, random_scores, received_attention


class Judged(NamedTuple):
    """What a scorer is asked to judge at a stage.

    Attributes:
        tokens: Image tokens (B, n, D) in front of the stage's block.
        seen: What `Scorer.observe` made of the blocks read since the previous stage.
        keep: (B, n) of ones and zeros: tokens masked at an earlier stage, in training; None where they are gone.
        predictor: The stage's, of a scorer that needs training.
        seed: The model's `scorer_seed`.
    """

    tokens: torch.Tensor
    seen: list[torch.Tensor]
    keep: torch.Tensor | None = None
    predictor: nn.Module | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A way to judge tokens.

    Attributes:
        reads: Whose attention it sees: '' nobody's, 'last' that of the block before the stage, 'chosen' what the
            model's `read` says.
        observe: What it wants to know of the attention of a block that it reads: from attention (B, heads, L, L), the
            count of prefix tokens, whether the first of them is a class token, and the mask (B, n) of image tokens or
            None, see `timm_spot.ops.attention_statistics`.
        score: Scores (B, n) of the tokens `Judged`: those with the largest stay.
        needs_training: Whether the model has a `RelevancePredictor` for each stage.
        draws: Whether its scores are drawn, by the model's `scorer_seed`.
        sums: Whether what it saw of tokens that are merged since adds up; else it is averaged as they are.
        merges: Whether no token is judged, and tokens become fewer by merging alone.
    """

    reads: str
    observe: Callable[[torch.Tensor, int, bool, torch.Tensor | None], torch.Tensor] | None
    score: Callable[[Judged], torch.Tensor] | None
    needs_training: bool = False
    draws: bool = False
    sums: bool = False
    merges: bool = False


def _predict(judged: Judged) -> torch.Tensor:
    return judged.predictor(judged.tokens, torch.cat(judged.seen, dim=-1), judged.keep).float()


def _draw(judged: Judged) -> torch.Tensor:
    scores = random_scores(judged.tokens.shape[1], judged.seed)
    return scores.to(judged.tokens.device).expand(judged.tokens.shape[0], -1)


def _measure_norm(judged: Judged) -> torch.Tensor:
    return judged.tokens.float().norm(dim=-1)


def _take_seen(judged: Judged) -> torch.Tensor:
    return judged.seen[-1].float()


SCORERS: dict[str, Scorer] = {
    'relevance': Scorer('chosen', attention_statistics, _predict, needs_training=True),
    'random': Scorer('', None, _draw, draws=True),
    'norm': Scorer('', None, _measure_norm),
    'cls-attention': Scorer('last', class_attention, _take_seen, sums=True),
    'received-attention': Scorer('last', received_attention, _take_seen, sums=True),
    'merge': Scorer('', None, None, merges=True),
}


def get_scorer(name: str) -> Scorer:
    """A scorer by name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in SCORERS:
        raise ValueError(f"scorer={name!r} is unknown, use one of {', '.join(SCORERS)}.")
    return SCORERS[name]


torch.fx.wrap('random_scores')  # a leaf of an FX graph, where counts are not known
