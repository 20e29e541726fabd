from __future__ import annotations

import pytest
import torch

import timm_spot
from timm_spot.tasks.evaluation.families import family_of
from timm_spot.tasks.evaluation.request import Request
from timm_spot.tasks.evaluation.ways import ImageBatch


@pytest.fixture
def batch():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return ImageBatch(images, torch.tensor([3, 4]), torch.tensor([5, 8]), ['a.png', 'b.png'], seed=2)


def ways(model, **request):
    return {way.sampler: way for way in family_of(model).ways(model, Request(**{'budgets': (4,), **request}))}


@torch.inference_mode()
def test_a_draw_depends_on_the_seed_and_the_number_of_the_image_alone(pico, batch):
    found = ways(pico, samplers=('uniform',))['uniform']
    positions = torch.cat([
        timm_spot.sample_positions(
            'uniform', 4, (64, 64), generator=torch.Generator().manual_seed(1_000_003 * 2 + number))
        for number in (5, 8)])
    torch.testing.assert_close(found.tokens(pico, batch), pico.forward_features(batch.images, positions))
    assert found.stochastic and found.saliency == ''


@pytest.mark.parametrize('keywords', [dict(r=2), dict(similarity=0.9)])
@torch.inference_mode()
def test_merged_tokens_are_pooled_by_their_size(pico, batch, keywords):
    model = timm_spot.sparsify(pico, scorer='merge', **keywords)
    tokens = ways(model, samplers=('grid',), budgets=(16,))['grid'].tokens(model, batch)
    positions = timm_spot.sample_positions('grid', 16, (64, 64), window=8).expand(2, -1, -1)
    torch.testing.assert_close(model.forward_head(tokens), model(batch.images, positions=positions))
    pooled = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(model.head(pooled), model(batch.images, positions=positions))
    assert not torch.allclose(model.forward_head(tokens.tokens), model.forward_head(tokens))


def test_an_oracle_sees_the_labels_and_asks_no_neighbours(pico, batch):
    found = ways(pico, oracle='grid')['oracle grid']
    assert not found.has_knn and not found.stochastic
    with torch.inference_mode():
        tokens = found.tokens(pico, batch)
    result = timm_spot.optimize_positions(
        pico, batch.images, batch.labels, init='grid', n_tokens=4, record=False)
    with torch.inference_mode():
        torch.testing.assert_close(tokens, pico.forward_features(batch.images, result.positions))


def test_baselines_drop_no_more_than_they_say(pico):
    found = ways(pico, samplers=('grid',), baselines=('patch-drop',), scorers=('norm',), keep_rates=(0.5,))
    assert found['grid'].pruning.scorer == 'norm' and found['patch-drop'].pruning is None


def test_maps_are_named_where_they_are_read(pico):
    found = ways(pico, samplers=('salient', 'grid'))
    assert (found['salient'].saliency, found['grid'].saliency) == ('spectral', '')
