from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot.ops.attention import (
    attention_statistics,
    check_keep_rate,
    class_attention,
    gather_tokens,
    keep_counts,
    keep_shares,
    keep_top,
    random_scores,
    received_attention,
    share_counts,
)


def random_attention(batch, heads, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, heads, length, length, generator=generator)).softmax(dim=-1)


def statistics_by_hand(A, prefix):
    """One token, head and number at a time, as the definition reads."""
    B, heads, L, _ = A.shape
    n = L - prefix
    out = torch.zeros(B, n, 5, heads)
    for b in range(B):
        for h in range(heads):
            for i in range(prefix, L):
                received = [A[b, h, j, i].item() * L for j in range(prefix, L)]
                given_ = [A[b, h, i, j].item() * L for j in range(prefix, L)]
                mean_received, mean_given = sum(received) / n, sum(given_) / n
                out[b, i - prefix, :, h] = torch.tensor([
                    A[b, h, 0, i].item() * L,
                    A[b, h, i, 0].item() * L,
                    mean_received,
                    sum((a - mean_received) ** 2 for a in received) / n,
                    sum((a - mean_given) ** 2 for a in given_) / n,
                ])
    return out.flatten(2)


@pytest.mark.parametrize('prefix, length', [(1, 7), (3, 9), (1, 2)])
def test_statistics_are_those_written_out_by_hand(prefix, length):
    A = random_attention(2, 3, length)
    torch.testing.assert_close(attention_statistics(A, prefix), statistics_by_hand(A, prefix), rtol=1e-4, atol=1e-5)


def test_even_attention_is_one_everywhere_at_any_count():
    for length in (5, 197):
        statistics = attention_statistics(torch.full((1, 2, length, length), 1 / length), 1)
        expected = torch.tensor([1., 1., 1., 1., 1., 1., 0., 0., 0., 0.]).expand(1, length - 1, 10)
        torch.testing.assert_close(statistics, expected, atol=1e-4, rtol=0)


def test_without_class_token_the_mean_query_and_key_take_its_place():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 6, 8, generator=generator).unbind(0)  # one register, five image tokens
    A = (q @ k.mT).softmax(dim=-1)
    to_token = (q[:, :, 1:].mean(dim=2, keepdim=True) @ k.mT).softmax(dim=-1)[0, :, 0, 1:]
    shares = (q @ k[:, :, 1:].mean(dim=2, keepdim=True).mT).exp()[..., 0] / (q @ k.mT).exp().sum(dim=-1)
    statistics = attention_statistics(A, 1, class_token=False)[0]
    torch.testing.assert_close(statistics[:, :2], 6 * to_token.T)
    torch.testing.assert_close(statistics[:, 2:4], 6 * shares[0, :, 1:].T)
    torch.testing.assert_close(class_attention(A, 1, class_token=False)[0], to_token.mean(dim=0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2), st.integers(2, 9), st.integers(1, 3), st.booleans(), st.integers(0, 10 ** 6))
def test_masked_statistics_are_those_of_the_smaller_matrix(prefix, n, heads, class_token, seed):
    class_token = class_token and prefix > 0
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(1, heads, prefix + n, prefix + n, generator=generator)
    keep = (torch.rand(1, n, generator=generator) < 0.6).float()
    keep[0, seed % n] = 1.
    left = torch.cat([torch.ones(prefix), keep[0]]).bool()
    masked = scores.masked_fill(~left, -torch.inf).softmax(dim=-1)
    actual = attention_statistics(masked, prefix, class_token, keep)[:, keep[0].bool()]
    expected = attention_statistics(scores[:, :, left][:, :, :, left].softmax(dim=-1), prefix, class_token)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_statistics_stay_in_float32_under_autocast():
    A = random_attention(1, 2, 9)
    with torch.autocast('cpu', torch.bfloat16):
        statistics = attention_statistics(A, 1)
    assert statistics.dtype == torch.float32
    torch.testing.assert_close(statistics, attention_statistics(A, 1))


def test_single_statistics_are_those_of_the_whole():
    A = random_attention(2, 3, 8)
    statistics = attention_statistics(A, 2).unflatten(2, (5, 3)).mean(dim=3) / 8
    torch.testing.assert_close(class_attention(A, 2), statistics[:, :, 0])
    torch.testing.assert_close(received_attention(A, 2), statistics[:, :, 2])


def test_counts():
    assert keep_counts(196, 0.7, 3) == [137, 96, 67]
    assert keep_counts(64, 0.5, 3) == [32, 16, 8]
    assert keep_counts(196, 1, 3) == [196, 196, 196]
    assert keep_counts(3, 0.1, 2) == [1, 1]


def test_a_half_is_rounded_up_where_floating_point_would_fall_below_it():
    # 0.7 * 0.7 * 50 is 24.5, in floating point 24.499999999999996.
    assert keep_counts(50, 0.7, 2)[1] == 25
    assert math.floor(0.7 ** 2 * 50 + 0.5) == 24


@given(st.integers(1, 10 ** 4), st.integers(1, 100), st.integers(1, 5))
def test_counts_are_the_nearest_whole_numbers(n, percent, stages):
    counts = keep_counts(n, percent / 100, stages)
    for stage, count in enumerate(counts, start=1):
        exact = n * Fraction(percent, 100) ** stage
        assert count == 1 if exact < Fraction(1, 2) else -Fraction(1, 2) < count - exact <= Fraction(1, 2)
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize('keep_rate', [0, -0.1, 1.01, math.nan, math.inf])
def test_keep_rates_that_are_refused(keep_rate):
    with pytest.raises(ValueError, match=r'keep_rate=.* must be greater than 0 and at most 1'):
        check_keep_rate(keep_rate)


def test_a_keep_rate_is_a_number():
    with pytest.raises(TypeError, match=r"keep_rate must be a number, got '0\.7'"):
        check_keep_rate('0.7')
    with pytest.raises(TypeError, match='got True'):
        check_keep_rate(True)


def test_the_largest_are_kept_in_order_and_of_equal_ones_the_first():
    scores = torch.tensor([[0., 3., 1., 3., 1., 1.], [5., 5., 5., 5., 5., 5.]])
    assert keep_top(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_nan_is_refused_and_its_image_named(value):
    scores = torch.zeros(3, 4)
    scores[2, 1] = value
    with pytest.raises(ValueError, match='tokens of image 2 is NaN or infinite'):
        keep_top(scores, 2)


def test_gathering_leaves_the_prefix():
    x = torch.arange(2 * 6 * 2).view(2, 6, 2)
    index = torch.tensor([[0, 3], [1, 2]])
    assert torch.equal(gather_tokens(x, index, 2)[0], x[0, [0, 1, 2, 5]])
    assert torch.equal(gather_tokens(x, index, 2)[1], x[1, [0, 1, 3, 4]])
    assert torch.equal(gather_tokens(x, index, 0)[0], x[0, [0, 3]])


def test_random_scores_are_drawn_once():
    torch.manual_seed(0)
    first = random_scores(10, seed=3)
    assert torch.equal(random_scores(10, seed=3), first)
    assert not torch.equal(random_scores(10, seed=4), first)
    assert len(first.unique()) == 10


def test_random_scores_are_those_of_earlier_versions():
    numbers = random.Random(3)
    torch.testing.assert_close(random_scores(3, seed=3), torch.tensor([numbers.random() for _ in range(3)]))
    torch.testing.assert_close(random_scores(2, seed=0), torch.tensor([0.84442185, 0.75795440]))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_random_scores_do_not_follow_the_default_dtype(dtype):
    expected = random_scores(50, seed=1)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        scores = random_scores(50, seed=1)
    finally:
        torch.set_default_dtype(default)
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)


def test_random_scores_do_not_follow_the_default_device():
    with torch.device('meta'):
        assert random_scores(5, seed=1).device.type == 'cpu'
    random_scores(5, seed=1).zero_()  # whoever changes what he was given changes nobody else's
    assert random_scores(5, seed=1).min() > 0


def test_shares_are_exact():
    assert keep_shares(0.7, 3) == ((7, 10), (49, 100), (343, 1000))
    assert keep_shares(1, 2) == ((1, 1), (1, 1)) == keep_shares(1., 2)
    assert share_counts(50, ((49, 100),)) == [25]
    assert share_counts(3, ((1, 2), (1, 6), (1, 7))) == [2, 1, 1]
    # numerators beyond 64 bits
    assert keep_counts(10 ** 4, 0.6180339887498949, 4) == [6180, 3820, 2361, 1459]


@pytest.mark.parametrize('class_token', [True, False])
def test_masked_single_statistics_are_those_of_the_smaller_matrix(class_token):
    scores = 2 * torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    left = torch.tensor([1., 1., 1., 0., 1., 0., 1., 1.]).bool()
    keep = left[None, 2:].float()
    masked = scores.masked_fill(~left, -torch.inf).softmax(dim=-1)
    smaller = scores[:, :, left][..., left].softmax(dim=-1)
    for statistic in (class_attention, received_attention):
        torch.testing.assert_close(
            statistic(masked, 2, class_token, keep)[:, keep[0].bool()], statistic(smaller, 2, class_token))
