"""What attention says about a token, and which tokens to keep.

Paper: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488

Attention A (B, heads, L, L) is read as A[query, key]: a row sums to one. The first tokens are the prefix (class token,
registers), the other n are the image's.
"""
from __future__ import annotations

import operator
import random
from collections.abc import Sequence
from contextlib import nullcontext
from fractions import Fraction

import torch

STATISTICS = 5  # for each head, see `attention_statistics`


def attention_statistics(
        attention: torch.Tensor,
        num_prefix_tokens: int,
        class_token: bool = True,
        keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Five numbers for each image token i and head, from one layer's attention.

    In this order: attention of the class token to i; of i to the class token; mean and variance, over the image
    tokens, of the attention that i receives; variance, over the image tokens, of the attention that i gives. (The mean
    of what it gives is fixed by the row summing to one.) Without a class token the first is the attention of the mean
    query of the image tokens, the second that of i to their mean key.

    All are in units of even attention, 1 / L (variances: of its square), so that their size does not depend on the
    count of tokens.

    Args:
        attention: (B, heads, L, L), after the softmax.
        num_prefix_tokens: How many of the L tokens stand before the image's.
        class_token: Whether the first of them is a class token.
        keep: (B, n) of ones and zeros: tokens masked out of `attention` as keys, and left out here as queries; L is
            then the count of tokens left. The result is that of the smaller matrix without them, at the tokens left.

    Returns:
        (B, n, 5 * heads), float32, statistic by statistic.
    """
    # Matrix products with a vector of weights read the matrix once, many times faster than reductions along its axes;
    # autocast, which the meta device does not know, would round what they sum.
    with nullcontext() if attention.is_meta else torch.autocast(attention.device.type, enabled=False):
        attention = attention.float()
        weights, length = _token_weights(attention, num_prefix_tokens, keep)  # B 1 1 L, B 1 1
        squares = attention.square()
        received = (weights @ attention).squeeze(2) * length
        received_variance = (weights @ squares).squeeze(2) * length.square() - received.square()
        given = (attention @ weights.mT).squeeze(3) * length
        given_variance = (squares @ weights.mT).squeeze(3) * length.square() - given.square()
        to_token, from_token = _summary_attention(attention, num_prefix_tokens, class_token, weights)
        statistics = torch.stack([
            to_token * length,
            from_token * length,
            received,
            received_variance.clamp(min=0.),
            given_variance.clamp(min=0.),
        ], dim=1)  # B 5 heads L
    return statistics.flatten(1, 2)[:, :, num_prefix_tokens:].transpose(1, 2)


def class_attention(
        attention: torch.Tensor,
        num_prefix_tokens: int,
        class_token: bool = True,
        keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention (B, n) of the class token to each image token, averaged over heads.

    Without a class token that of the mean query. Arguments as for `attention_statistics`.
    """
    if class_token:
        return attention[:, :, 0, num_prefix_tokens:].mean(dim=1)
    weights, _ = _token_weights(attention, num_prefix_tokens, keep)
    return _summary_attention(attention, num_prefix_tokens, False, weights)[0].mean(dim=1)[:, num_prefix_tokens:]


def received_attention(
        attention: torch.Tensor,
        num_prefix_tokens: int,
        class_token: bool = True,
        keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean attention (B, n) that each image token receives from the image tokens, averaged over heads.

    Arguments as for `attention_statistics`; it is the same with a class token and without.
    """
    weights, _ = _token_weights(attention, num_prefix_tokens, keep)
    return (weights.to(attention.dtype) @ attention).squeeze(2).mean(dim=1)[:, num_prefix_tokens:]


def _token_weights(
        attention: torch.Tensor,
        num_prefix_tokens: int,
        keep: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (B or 1, 1, 1, L) that average over the image tokens left, and the count (B or 1, 1, 1) of all left."""
    n = attention.shape[-1] - num_prefix_tokens
    if keep is None:
        keep = attention.new_ones((1, n), dtype=torch.float32)
    count = keep.float().sum(dim=1, keepdim=True)
    weights = torch.cat([keep.new_zeros((keep.shape[0], num_prefix_tokens)), keep], dim=1).float() / count
    return weights[:, None, None], (count + num_prefix_tokens)[:, :, None]


def _summary_attention(
        attention: torch.Tensor,
        num_prefix_tokens: int,
        class_token: bool,
        weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the class token (or the mean query) attends to, and what attends to it (to the mean key), (B, heads, L)."""
    if class_token:
        return attention[:, :, 0], attention[:, :, :, 0]
    # Up to a constant the logarithm of attention is the scalar product of query and key: its mean over queries is that
    # of the mean query, its mean over keys that of the mean key.
    logs = attention.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    return (weights @ logs).squeeze(2).softmax(dim=-1), (logs @ weights.mT).squeeze(3).exp()


def check_keep_rate(keep_rate: float) -> None:
    """Raise ValueError unless `keep_rate` is in (0, 1]."""
    if isinstance(keep_rate, bool) or not isinstance(keep_rate, (int, float)):
        raise TypeError(f'keep_rate must be a number, got {keep_rate!r} ({type(keep_rate).__name__}).')
    if not 0 < keep_rate <= 1:  # NaN is refused too
        raise ValueError(f'keep_rate={keep_rate} must be greater than 0 and at most 1.')


def keep_shares(keep_rate: float, n_stages: int) -> tuple[tuple[int, int], ...]:
    """Share of the tokens left at each stage, keep_rate ** s, as numerator and denominator.

    Exact: `keep_rate` counts as the decimal number that it prints as.

    Example:
        >>> keep_shares(0.7, 2)
        ((7, 10), (49, 100))
    """
    check_keep_rate(keep_rate)
    rate = Fraction(str(keep_rate))
    return tuple((rate ** (s + 1)).as_integer_ratio() for s in range(n_stages))


def share_counts(n_tokens: int, shares: Sequence[tuple[int, int]]) -> list[int]:
    """Image tokens left of `n_tokens` at each of `keep_shares`: rounded half up, at least one."""
    n_tokens = operator.index(n_tokens)  # while torch.compile traces, sizes are symbols: a program for each count
    return [max(1, (2 * n_tokens * share + whole) // (2 * whole)) for share, whole in shares]


def keep_counts(n_tokens: int, keep_rate: float, n_stages: int) -> list[int]:
    """Image tokens left at each stage: keep_rate ** s of `n_tokens`, rounded half up, at least one.

    Example:
        >>> keep_counts(196, 0.7, 3)
        [137, 96, 67]
    """
    return share_counts(n_tokens, keep_shares(keep_rate, n_stages))


def keep_top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices (B, count), ascending, of the largest of scores (B, N); of equal ones the first are taken.

    Raises:
        ValueError: As `rank_tokens`.
    """
    return rank_tokens(scores, count).sort(dim=1).values


def rank_tokens(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices (B, count) of the largest of scores (B, N), the largest first; of equal ones the first comes first.

    Raises:
        ValueError: A score is NaN or infinite. (Not checked while a graph is captured, nor on the meta device.)
    """
    if not (scores.is_meta or torch.compiler.is_compiling()) and not scores.isfinite().all():
        image = scores.isfinite().all(dim=1).logical_not().nonzero()[0].item()
        raise ValueError(
            f'the score of tokens of image {image} is NaN or infinite, because its attention is: look for NaN in '
            'that image and in the weights.')
    if torch.onnx.is_in_onnx_export():  # has no stable sort, but a TopK that takes the first of equal ones
        return scores.topk(count, dim=1).indices
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def gather_tokens(x: torch.Tensor, index: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Prefix and chosen image tokens, (B, prefix + count, D), of tokens (B, prefix + n, D) and indices (B, count)."""
    prefix = torch.arange(num_prefix_tokens, device=index.device).expand(index.shape[0], -1)
    index = torch.cat([prefix, index + num_prefix_tokens], dim=1)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def random_scores(n_tokens: int, seed: int) -> torch.Tensor:
    """Scores (n_tokens,), float32 on the CPU, the same at every call: all images of a batch lose the same tokens."""
    # Whatever the default dtype and device are just now: a compiled program keeps what is drawn here.
    return torch.tensor(_draw_numbers(operator.index(n_tokens), seed), dtype=torch.float32, device='cpu')


# Numbers, no tensor: `torch.compile` takes a constant tensor for one of changing shape when it meets the next.
@torch.compiler.assume_constant_result
def _draw_numbers(count: int, seed: int) -> list[float]:
    numbers = random.Random(seed)  # a generator of torch's cannot be exported
    return [numbers.random() for _ in range(count)]
