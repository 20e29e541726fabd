from __future__ import annotations

import pytest
import torch

from timm_spot.models.pruning_predictor import RelevancePredictor, sample_mask


def predictor():
    torch.manual_seed(0)
    return RelevancePredictor(16, 10)


def test_relevance_follows_its_token_and_sees_the_others():
    torch.manual_seed(1)
    x, statistics = torch.randn(2, 6, 16), torch.rand(2, 6, 10)
    relevance = predictor()(x, statistics)
    order = torch.randperm(6)
    torch.testing.assert_close(predictor()(x[:, order], statistics[:, order]), relevance[:, order])
    x[0, 5, 0] += 1
    changed = predictor()(x, statistics)
    assert (changed[0, :5] - relevance[0, :5]).abs().min() > 0
    assert torch.equal(changed[1], relevance[1])


def test_tokens_that_fell_do_not_count_in_the_mean():
    torch.manual_seed(1)
    x, statistics = torch.randn(1, 6, 16), torch.rand(1, 6, 10)
    keep = torch.tensor([[1., 0., 1., 1., 0., 1.]])
    left = keep[0].bool()
    torch.testing.assert_close(
        predictor()(x, statistics, keep)[:, left], predictor()(x[:, left], statistics[:, left]))


@pytest.mark.parametrize('keep_rate', [0.3, 0.8])
def test_fresh_relevance_is_kept_at_the_rate(keep_rate):
    torch.manual_seed(0)
    mask = sample_mask(torch.zeros(20, 1000), torch.ones(20, 1000), keep_rate)
    assert abs(mask.mean().item() - keep_rate) < 5 * (keep_rate * (1 - keep_rate) / 20000) ** 0.5 + 1e-3
    assert set(mask.round(decimals=5).unique().tolist()) == {0., 1.}


def test_what_fell_stays_down_and_the_most_relevant_stays_up():
    torch.manual_seed(0)
    relevance = torch.full((100, 4), -30.)
    relevance[:, 0], relevance[:, 2] = 30., -20.
    keep = torch.tensor([0., 1., 1., 1.]).expand(100, -1)
    mask = sample_mask(relevance, keep, 0.5)
    assert mask.tolist() == [[0., 0., 1., 0.]] * 100


def test_masks_have_gradients():
    relevance = torch.zeros(2, 50, requires_grad=True)
    sample_mask(relevance, torch.ones(2, 50), 0.5).sum().backward()
    assert (relevance.grad > 0).float().mean() > 0.9
