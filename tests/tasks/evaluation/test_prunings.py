from __future__ import annotations

import pytest
import timm
import torch

import timm_spot
from timm_spot.models.pruning_flops import count_multiply_adds
from timm_spot.tasks.evaluation.prunings import KEEP_RATES, check_prunings, list_prunings


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return timm.create_model(
        'vit_tiny_patch16_224', img_size=64, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5).eval()


def described(found):
    return [(pruning.scorer, pruning.keep_rate) for pruning in found]


def test_a_model_that_drops_tokens_has_its_own_way_and_a_dense_one_has_none(dense):
    sparse = timm_spot.sparsify(dense, 0.6, scorer='norm')
    assert described(list_prunings(sparse, [], [])) == [('norm', 0.6)]
    assert described(list_prunings(sparse, [], [1., 0.5])) == [('norm', 1.), ('norm', 0.5)]
    assert list_prunings(dense, [], []) == [] == list_prunings(dense, [], [0.5])


def test_a_model_that_merges_has_its_own_numbers_or_a_keep_rate(dense):
    merging = timm_spot.sparsify(dense, scorer='merge', r=3)
    own, = list_prunings(merging, [], [])
    assert (own.scorer, own.keep_rate, own.r, own.model_at(0).r) == ('merge', None, '3', (3, 3, 3, 3))
    merging.set_merging([3, 0, 1, 1])
    assert own.r == '3 0 1 1'
    merging.set_merging(similarity=0.9)
    own, = list_prunings(merging, [], [])
    assert (own.keep_rate, own.r, own.similarity, own.model_at(0).similarity) == (None, '', 0.9, 0.9)
    found = list_prunings(merging, ['merge', 'norm'], [0.7])
    assert described(found) == [('merge', 0.7), ('norm', 0.7)] and [p.r for p in found] == ['', '']
    assert [p.model_at(0).reduces for p in found] == [True, True]
    both, = list_prunings(timm_spot.sparsify(dense, 0.6, scorer='norm', r=2), [], [])
    assert (both.scorer, both.keep_rate, both.r) == ('norm', 0.6, '2')
    assert described(list_prunings(dense, ['merge'], [0.5])) == [('merge', 0.5)]


def test_shares_of_the_multiply_adds_have_a_rate_of_their_own(dense):
    found = list_prunings(dense, ['merge', 'norm'], [0.9], [0.7])
    assert [(p.scorer, p.keep_rate, p.share) for p in found[::2]] == [('merge', 0.9, None), ('norm', 0.9, None)]
    merged, dropped = found[1::2]
    assert (merged.keep_rate, merged.share, dropped.share, dropped.r) == (None, 0.7, 0.7, '')
    assert merged.r == '10 10 10 9' and 0 < dropped.keep_rate < 0.9
    for pruning in (merged, dropped):
        model = pruning.model_at(0)
        cost = count_multiply_adds(model, 64, model.plan, model.keep_rate)
        assert 0.6 < cost / count_multiply_adds(dense_of(model), 64, dense_of(model).plan, 1.) <= 0.7


def dense_of(model):
    return model.pruned(1., 'norm')


def test_each_scorer_at_each_keep_rate_but_those_without_their_predictors(dense):
    scorers, rates = ['relevance', 'random'], [1., 0.5]
    trained = timm_spot.sparsify(dense, stages=(1, 3))
    found = list_prunings(trained, scorers, rates)
    assert described(found) == [('relevance', 1.), ('relevance', 0.5), ('random', 1.), ('random', 0.5)]
    assert [p.stochastic for p in found] == [False, False, True, True]
    assert {p.model for p in found} == {trained}
    assert (found[3].scorer, found[3].keep_rate, found[3].model.stages) == ('random', 0.5, (1, 3))
    assert described(list_prunings(dense, scorers, rates)) == [('random', 1.), ('random', 0.5)]
    assert described(list_prunings(dense, ['norm'], [])) == [('norm', rate) for rate in KEEP_RATES]


@torch.inference_mode()
def test_the_model_of_a_row_shares_the_weights_and_changes_nothing(dense):
    x = torch.randn(2, 3, 64, 64)
    trained = timm_spot.sparsify(dense, keep_rate=0.7)
    before, logits = set(trained.state_dict()), trained(x)
    random, relevance = (list_prunings(trained, [scorer], [0.5])[0] for scorer in ('random', 'relevance'))
    models = [random.model_at(seed) for seed in (0, 1, 0)]
    assert torch.equal(models[0](x), models[2](x)) and not torch.equal(models[0](x), models[1](x))
    assert torch.equal(models[0](x), timm_spot.sparsify(dense, 0.5, scorer='random', scorer_seed=0)(x))
    assert relevance.model_at(3).predictors is trained.predictors
    assert models[0].blocks is trained.blocks
    assert (trained.scorer, trained.keep_rate, set(trained.state_dict())) == ('relevance', 0.7, before)
    assert torch.equal(trained(x), logits)


def test_what_no_model_can_use_is_refused(dense):
    models = dict(dense=dense)
    for scorers, rates, message in (
        (['norm', 'cls'], [], "scorers=norm,cls has the unknown 'cls'"),
        (['relevance'], [], "'relevance' needs trained predictors, and dense has none"),
        (['norm'], [0.], 'keep_rate=0.0 must be greater than 0'),
        ([], [0.5], 'keep_rates=0.5 need scorers'),
    ):
        with pytest.raises(ValueError, match=message):
            check_prunings(models, scorers, rates)
    with pytest.raises(ValueError, match=r'flops=0\.6 need scorers'):
        check_prunings(models, [], [], [0.6])
    with pytest.raises(ValueError, match=r'flops=1\.5 must be greater than 0'):
        check_prunings(models, ['norm'], [], [1.5])
    check_prunings(dict(dense=dense, sparse=timm_spot.sparsify(dense)), ['relevance'], [0.5])
