from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot.ops.attention import keep_counts, keep_shares
from timm_spot.ops.merging import (
    Matching,
    fill_sources,
    follow_drop,
    follow_merge,
    match_tokens,
    merge_tokens,
    plan_counts,
    share_merges,
    size_bias,
    spread,
    unmerge_tokens,
)


def keys_at(*degrees):
    """Keys (1, 1, L, 2) in these directions, of different lengths."""
    angles = torch.tensor(degrees, dtype=torch.float32).deg2rad()
    lengths = torch.arange(1., 1 + len(degrees))
    return (torch.stack([angles.cos(), angles.sin()], dim=1) * lengths[:, None])[None, None]


def matched(keys, r, n_prefix):
    return [index[0].tolist() for index in match_tokens(keys, r, n_prefix)]


def test_the_most_similar_pairs_are_merged_lengths_and_prefix_aside():
    # Even tokens of the whole look for odd ones: 2 (at 40) finds 1 (at 44), 4 (90) finds 5 (91), 6 (10) finds 3 (0).
    keys = keys_at(44, 44, 40, 0, 90, 91, 10)
    assert matched(keys, 1, 1) == [[0, 2, 6, 1, 3, 5], [4], [5]]
    assert matched(keys, 2, 1) == [[0, 6, 1, 3, 5], [4, 2], [4, 2]]
    assert matched(keys, 3, 1) == [[0, 1, 3, 5], [4, 2, 6], [3, 1, 2]]


def test_pairs_as_alike_as_asked_are_merged():
    keys = keys_at(44, 44, 40, 0, 90, 91, 10)  # 4 and 5 are 1 degree apart, 2 and 1 four, 6 and 3 ten

    def merged(degrees, keys=keys, n_prefix=1):
        matching = match_tokens(keys, None, n_prefix, torch.tensor(degrees).deg2rad().cos().item())
        return [index[0].tolist() for index in matching]

    assert merged(5.) == matched(keys, 2, 1) and merged(11.) == matched(keys, 3, 1)
    assert merged(0.5)[1] == []
    assert merged(90., keys_at(0, 9, 50, 55, 90), 0) == [[1, 3], [2, 0, 4], [1, 0, 1]]  # more than half of five
    with pytest.raises(ValueError, match='2 images differ in how many pairs are alike'):
        match_tokens(torch.ones(2, 1, 5, 2), None, 1, 0.9)


def test_two_prefix_tokens_are_no_partners():
    # The second of the prefix would be the best partner of token 2.
    assert matched(keys_at(0, 40, 40, 0, 90, 70), 1, 2) == [[0, 1, 2, 3, 5], [4], [4]]


def test_without_a_prefix_what_is_left_comes_by_falling_similarity():
    assert matched(keys_at(0, 9, 50, 55, 90, 120), 1, 0) == [[0, 4, 1, 3, 5], [2], [3]]


def test_of_equally_similar_pairs_the_first_are_merged():
    assert matched(torch.ones(1, 2, 7, 3), 2, 1) == [[0, 6, 1, 3, 5], [2, 4], [2, 2]]


def test_keys_are_averaged_over_heads():
    keys = keys_at(0, 0, 30, 60, 90)
    turned = torch.cat([keys, 3 * keys], dim=1)
    assert matched(turned, 1, 1) == matched(keys, 1, 1)


def test_nan_in_keys_is_refused():
    keys = torch.rand(3, 1, 5, 2)
    keys[2, 0, 3] = torch.nan
    with pytest.raises(ValueError, match='tokens of image 2 is NaN or infinite'):
        match_tokens(keys, 1, 1)


def test_merged_tokens_are_means_of_all_that_they_stand_for():
    x = torch.tensor([[9., 1., 2., 4., 8.]])[:, :, None]
    # 2 and 4 into 1
    matching = Matching(torch.tensor([[0, 1, 3]]), torch.tensor([[2, 4]]), torch.tensor([[1, 1]]))
    y, sizes = merge_tokens(x, None, matching)
    torch.testing.assert_close(y[0, :, 0], torch.tensor([9., 11 / 3, 4.]))
    assert sizes.tolist() == [[1., 3., 1.]] and sizes.dtype == torch.float32
    y, sizes = merge_tokens(y, sizes, Matching(torch.tensor([[0, 1]]), torch.tensor([[2]]), torch.tensor([[1]])))
    torch.testing.assert_close(y[0, :, 0], torch.tensor([9., 15 / 4]))
    assert sizes.tolist() == [[1., 4.]]


def test_sizes_of_more_than_a_few_hundred_are_exact_in_bfloat16():
    x, sizes = torch.ones(1, 2, 1, dtype=torch.bfloat16), torch.tensor([[256., 1.]])
    y, sizes = merge_tokens(x, sizes, Matching(torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[0]])))
    assert sizes.item() == 257 and y.dtype == torch.bfloat16


def test_attention_counts_a_token_as_often_as_its_size():
    scores = torch.randn(2, 3, 4, 5)
    sizes = torch.tensor([[1., 2., 1., 3., 1.], [1., 1., 1., 1., 4.]])
    weighted = (scores + size_bias(sizes, scores)).softmax(dim=-1)
    for b in range(2):
        repeated = scores[b].repeat_interleave(sizes[b].long(), dim=-1).softmax(dim=-1)
        owner = torch.arange(5).repeat_interleave(sizes[b].long())
        torch.testing.assert_close(weighted[b], torch.zeros(3, 4, 5).index_add(2, owner, repeated))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(4, 12), st.integers(0, 2**16), st.data())
def test_each_token_is_where_its_source_says(n_prefix, n, seed, data):
    """Merged twice, then some dropped: a token left is the mean of those whose sources say so."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n_prefix + n, 3, generator=generator)
    first, y, sizes = x[:, n_prefix:], x, None
    sources = torch.arange(n).expand(2, n)
    for _ in range(2):
        left = y.shape[1] - n_prefix
        matching = match_tokens(y[:, None], data.draw(st.integers(0, left // 2)), n_prefix)
        y, sizes = merge_tokens(y, sizes, matching)
        sources = follow_merge(sources, matching, n_prefix)
    left = y.shape[1] - n_prefix
    kept = torch.randperm(left, generator=generator)[:data.draw(st.integers(1, left))].sort().values.expand(2, -1)
    sources = follow_drop(sources, kept, left)
    assert torch.equal(y[:, :n_prefix], x[:, :n_prefix])
    for b in range(2):
        for place, token in enumerate(kept[b].tolist()):
            own = sources[b] == place
            assert own.sum() == sizes[b, n_prefix + token]
            torch.testing.assert_close(y[b, n_prefix + token], first[b, own].mean(dim=0))
        assert (sources[b] >= 0).sum() == sizes[b, n_prefix + kept[b]].sum()


def test_dropped_tokens_are_where_the_nearest_is():
    positions = torch.tensor([[0., 0.], [0., 2.], [3., 0.], [3., 2.]])
    sources = torch.tensor([[-1, 0, 1, -1], [2, -1, -1, -1], [0, 1, 2, 3]])
    assert fill_sources(sources, positions).tolist() == [[0, 0, 1, 1], [2, 2, 2, 2], [0, 1, 2, 3]]
    own = torch.stack([positions, positions * torch.tensor([0.1, 1.]), positions])  # now 2 is near 0
    assert fill_sources(sources, own)[0].tolist() == [0, 0, 1, 1]
    assert fill_sources(sources[[2, 0, 2]], own)[1].tolist() == [1, 0, 1, 0]


def test_every_token_is_as_that_which_holds_it():
    x = torch.tensor([[[1.], [2.]], [[3.], [4.]]])
    assert unmerge_tokens(x, torch.tensor([[0, 1, 0], [1, 1, 0]])).squeeze(2).tolist() == [[1, 2, 1], [4, 4, 3]]


def test_merging_is_differentiable():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    matching = match_tokens(torch.randn(2, 1, 5, 4), 2, 1)
    assert torch.autograd.gradcheck(lambda x: merge_tokens(x, None, matching)[0], (x,))


@pytest.mark.parametrize('n, blocks, stages, keep_rate', [(196, 12, (3, 6, 9), 0.7), (49, 5, (1, 2, 4), 0.6)])
def test_merges_at_a_keep_rate_leave_as_many_as_dropping(n, blocks, stages, keep_rate):
    shares = keep_shares(keep_rate, len(stages))
    counts, merges = plan_counts(n, blocks, stages, shares, merges_alone=True)
    assert counts == [] and merges == share_merges(n, blocks, stages, shares)
    assert [n - sum(merges[:stage]) for stage in stages] == keep_counts(n, keep_rate, len(stages))
    assert len(merges) == blocks and not any(merges[stages[-1]:])
    assert plan_counts(n, blocks, stages, shares) == (keep_counts(n, keep_rate, len(stages)), [0] * blocks)


def test_a_block_merges_half_at_most():
    shares = keep_shares(1., 1)
    assert plan_counts(9, 4, (1,), shares, (3, 8, 8, 8), merges_alone=True)[1] == [3, 3, 1, 1]
    assert plan_counts(1, 2, (1,), shares, (3, 3), merges_alone=True)[1] == [0, 0]
    with pytest.raises(ValueError, match='9 tokens cannot become 4 in 1 blocks'):
        share_merges(9, 4, (1,), keep_shares(0.4, 1))
    with pytest.raises(ValueError, match='9 tokens cannot become 2 in 2 blocks'):  # 4, then 3 of the 5 that are left
        share_merges(9, 4, (2,), keep_shares(0.2, 1))


@given(st.integers(0, 400), st.integers(1, 40))
def test_spreading_is_even_and_complete(total, parts):
    numbers = spread(total, parts)
    assert len(numbers) == parts and sum(numbers) == total
    assert numbers == sorted(numbers, reverse=True) and numbers[0] - numbers[-1] <= 1
