from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import timm_spot
from timm_spot.models.pruning_flops import count_multiply_adds, find_keep_rate, find_merges
from timm_spot.tasks.evaluation.flops import count_flops

MODELS = {
    'deit_small_patch16_224': dict(),
    'vit_base_patch16_siglip_224': dict(),
    'vit_small_patch14_reg4_dinov2': dict(img_size=224),
    'vit_tiny_patch16_224': dict(class_token=False, global_pool='avg', qk_norm=True),
}


def on_meta(name):
    with torch.device('meta'):
        return timm.create_model(name, **MODELS[name]).eval().requires_grad_(False)


def measured(model):
    return count_flops(model, torch.empty(1, 3, 224, 224, device='meta')) / 2


@pytest.mark.parametrize('name', MODELS)
def test_shares_are_those_that_torch_counts(name):
    vit = on_meta(name)
    dense = measured(vit)
    for scorer, r in (('merge', None), ('received-attention', None), ('relevance', None), ('cls-attention', 3)):
        model = timm_spot.sparsify(vit, scorer=scorer, r=r)
        for share in (0.8, 0.5):
            model.set_flops(share)
            assert share - 0.01 < measured(model) / dense < share + 1e-3
        assert r is None or model.r == (3,) * 12


def test_multiply_adds_are_counted_in_full():
    vit = on_meta('deit_small_patch16_224')
    model = timm_spot.sparsify(vit, 0.7, scorer='norm', r=[5] * 6 + [0] * 6)
    assert count_multiply_adds(model, 196, model.plan, 0.7) == measured(model)
    assert count_multiply_adds(model, 196, timm_spot.sparsify(vit, scorer='norm').plan, 1.) == measured(vit)


def test_a_share_of_1_is_the_dense_model_and_one_too_small_is_refused():
    vit = on_meta('vit_tiny_patch16_224')
    for scorer in ('merge', 'norm'):
        model = timm_spot.sparsify(vit, scorer=scorer)
        model.set_flops(1)
        assert not model.reduces and (model.keep_rate == 1 or scorer == 'merge')
        for share in (0, 1.1, float('nan')):
            with pytest.raises(ValueError, match='must be greater than 0 and at most 1'):
                model.set_flops(share)
        with pytest.raises(ValueError, match=rf"share=0\.05: scorer='{scorer}' cannot have so few multiply-adds"):
            model.set_flops(0.05)


def test_a_schedule_that_was_found_is_saved(tmp_path):
    small = dict(img_size=64, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
    for scorer in ('merge', 'norm'):
        model = timm.create_model('relevance_vit', backbone='vit_tiny_patch16_224', scorer=scorer, **small)
        model.set_flops(0.7)
        timm.models.save_for_hf(model, tmp_path / scorer)
        loaded = timm.create_model(f'local-dir:{tmp_path / scorer}', pretrained=True)
        assert (loaded.r, loaded.keep_rate) == (model.r, model.keep_rate)


def test_the_nominal_size_and_budget_count(pico):
    model = timm_spot.sparsify(pico, scorer='merge')
    shares = []
    for n in (64, 25):
        model.set_placement(n_tokens=n)
        model.set_flops(0.6)
        shares.append(count_multiply_adds(model, n, model.plan, 1.))
        dense = count_multiply_adds(model, n, timm_spot.sparsify(pico, scorer='norm').plan, 1.)
        assert 0.5 < shares[-1] / dense <= 0.6
    assert shares[1] < shares[0]


@given(st.integers(1, 1000))
def test_the_largest_keep_rate_within_a_limit(limit):
    assert find_keep_rate(lambda rate: round(1000 * rate), limit) == limit / 1000
    assert find_keep_rate(lambda rate: round(1000 * rate) + 1000, limit) is None


def test_the_fewest_merges_within_a_limit():
    assert find_merges(lambda r: 100 - sum(r), 97, 8, 2) == [2, 1]
    assert find_merges(lambda r: 100 - sum(r), 92, 8, 2) == [4, 4]
    assert find_merges(lambda r: 100 - sum(r), 100, 8, 2) == [0, 0]
    assert find_merges(lambda r: 100 - sum(r), 91, 8, 2) is None
