from __future__ import annotations

import pytest
import torch
from timm.layers import Attention, LayerNorm

from timm_spot.models.pruning_predictor import RelevancePredictor, attend, masked_softmax, sample_mask

LAYERS = {
    'plain': dict(qkv_bias=True),
    'qk_norm': dict(qk_norm=True, norm_layer=LayerNorm),
    'scale_norm': dict(scale_norm=True, norm_layer=LayerNorm),
    'gated': dict(gated=True),
    'wide heads': dict(attn_head_dim=12),
}


def layer(**kwargs):
    torch.manual_seed(0)
    attn = Attention(16, num_heads=2, **kwargs).eval()
    with torch.no_grad():
        for p in attn.parameters():
            p.copy_(torch.randn_like(p) / 2)
    return attn


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('fused', [True, False])
@torch.no_grad()
def test_output_is_that_of_the_layer_fused_or_not(kind, fused):
    attn = layer(**LAYERS[kind])
    attn.fused_attn = fused
    x = torch.randn(2, 5, 16)
    output, attention = attend(attn, x)
    torch.testing.assert_close(output, attn(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 2, 5))


@pytest.mark.parametrize('kind', LAYERS)
@torch.no_grad()
def test_a_masked_token_is_as_if_it_were_not_there(kind):
    attn = layer(**LAYERS[kind])
    x = torch.randn(1, 6, 16)
    left = torch.tensor([1., 1., 0., 1., 0., 1.])
    output, attention = attend(attn, x, left[None])
    expected, expected_attention = attend(attn, x[:, left.bool()])
    torch.testing.assert_close(output[:, left.bool()], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention[:, :, left.bool()][..., left.bool()], expected_attention)
    assert attention[..., ~left.bool()].abs().max() == 0


def test_gradient_of_a_mask_where_it_is_zero():
    scores = torch.tensor([0.3, -1., 2., 0.], dtype=torch.float64)
    keep = torch.tensor([1., 0., 1., 0.], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda k: masked_softmax(scores, k), keep.requires_grad_())
    gradient = torch.autograd.grad(masked_softmax(scores, keep)[0], keep)[0]
    assert gradient[1] < 0 and gradient[3] < 0  # either token would have taken from the first


def test_a_masked_score_far_above_the_others_does_no_harm():
    scores = torch.tensor([0., 1e4, 1.], requires_grad=True)
    keep = torch.tensor([1., 0., 1.], requires_grad=True)
    weights = masked_softmax(scores, keep)
    torch.testing.assert_close(weights, torch.tensor([1 / (1 + torch.e), 0., torch.e / (1 + torch.e)]))
    weights[0].backward()
    assert scores.grad.isfinite().all() and keep.grad.isfinite().all()


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
