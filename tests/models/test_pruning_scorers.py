from __future__ import annotations

import pytest
import timm
import torch

import timm_spot
from timm_spot.models.pruning_scorers import SCORERS, Judged, Scorer, get_scorer
from timm_spot.ops.attention import attention_statistics


def judged(**changes):
    tokens = torch.tensor([[[3., 4.], [0., 1.], [6., 8.]]])
    seen = [torch.tensor([[1., 2., 3.]]), torch.tensor([[6., 5., 4.]])]
    return Judged(**{**dict(tokens=tokens, seen=seen), **changes})


def test_scores_by_hand():
    assert SCORERS['norm'].score(judged()).tolist() == [[5., 1., 10.]]
    for name in ('cls-attention', 'received-attention'):
        assert SCORERS[name].score(judged()).tolist() == [[6., 5., 4.]]  # of the block just before
    drawn = SCORERS['random'].score(judged(tokens=torch.zeros(2, 3, 2), seed=3))
    assert drawn.shape == (2, 3) and torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn[0], torch.tensor([0.23796463, 0.54422922, 0.36995517]))
    assert not torch.equal(SCORERS['random'].score(judged(seed=4))[0], drawn[0])


def test_relevance_is_what_the_predictor_makes_of_all_that_was_seen():
    asked = []

    def predictor(*args):
        asked.append(args)
        return torch.zeros(1, 3, dtype=torch.float16)

    given = judged(seen=[torch.zeros(1, 3, 2), torch.ones(1, 3, 2)], keep=torch.ones(1, 3), predictor=predictor)
    assert SCORERS['relevance'].score(given).dtype == torch.float32
    (tokens, statistics, keep), = asked
    assert torch.equal(tokens, given.tokens) and keep is given.keep
    assert statistics[0, 0].tolist() == [0., 0., 1., 1.]


def test_what_is_observed_by_hand():
    # One head, the class token and two image tokens.
    attention = torch.tensor([[[[0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.4, 0.1, 0.5]]]])
    torch.testing.assert_close(SCORERS['cls-attention'].observe(attention, 1, True, None), torch.tensor([[0.6, 0.3]]))
    torch.testing.assert_close(
        SCORERS['received-attention'].observe(attention, 1, True, None), torch.tensor([[0.2, 0.5]]))
    keep = torch.tensor([[1., 0.]])
    assert torch.equal(
        SCORERS['relevance'].observe(attention, 1, True, keep), attention_statistics(attention, 1, True, keep))


def test_what_each_reads():
    assert [name for name, s in SCORERS.items() if s.merges] == ['merge']
    assert {name: (s.reads, s.needs_training, s.draws) for name, s in SCORERS.items() if not s.merges} == {
        'relevance': ('chosen', True, False), 'random': ('', False, True), 'norm': ('', False, False),
        'cls-attention': ('last', False, False), 'received-attention': ('last', False, False)}
    with pytest.raises(ValueError, match="scorer='cls' is unknown, use one of relevance, random, norm"):
        get_scorer('cls')


@torch.no_grad()
def test_a_scorer_of_ones_own_is_one_entry(monkeypatch):
    """Keeps the tokens that attend to themselves the least."""
    def observe(attention, num_prefix_tokens, class_token, keep):
        return attention.diagonal(dim1=2, dim2=3).mean(dim=1)[:, num_prefix_tokens:]

    monkeypatch.setitem(SCORERS, 'self', Scorer('last', observe, lambda judged: -judged.seen[-1]))
    torch.manual_seed(0)
    vit = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=4).eval()
    model = timm_spot.sparsify(vit, 0.5, stages=(1, 2), scorer='self')
    x = torch.randn(2, 3, 64, 64)
    assert [index.shape for index in model.kept_tokens(x)] == [(2, 8), (2, 4)]
    assert model.plan.read_blocks == (0, 1) and not model.predictors
    assert not torch.equal(model(x), timm_spot.sparsify(vit, 0.5, stages=(1, 2), scorer='norm')(x))
