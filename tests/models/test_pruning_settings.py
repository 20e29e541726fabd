from __future__ import annotations

import json

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

import timm_spot


def backbone(**kwargs):
    """16 patches, 4 blocks; attention is far from even, as in a trained ViT."""
    torch.manual_seed(0)
    arguments = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
    vit = VisionTransformer(**{**arguments, **kwargs}).eval()
    with torch.no_grad():
        for p in vit.parameters():
            if p.ndim > 1:
                p.copy_(1.5 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    return vit


def images(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def count_left(model):
    """Image tokens after the last block."""
    with torch.no_grad():
        return model.forward_features(images(1)).shape[1] - model.num_prefix_tokens


@torch.no_grad()
def test_another_scorer_on_the_same_backbone(tmp_path):
    vit, x = backbone(), images()
    model = timm_spot.sparsify(vit, keep_rate=0.5, stages=(1, 3), read='all')
    for scorer in ('received-attention', 'random'):
        model.set_scorer(scorer, scorer_seed=3)
        expected = timm_spot.sparsify(vit, 0.5, (1, 3), scorer, scorer_seed=3)
        assert torch.equal(model(x), expected(x))
    assert set(model.state_dict()) == set(vit.state_dict())
    with pytest.raises(ValueError, match="scorer='relevance' needs trained predictors"):
        model.set_scorer('relevance')
    with pytest.raises(ValueError, match="scorer='cls' is unknown"):
        model.set_scorer('cls')


@torch.no_grad()
def test_a_copy_at_another_keep_rate_shares_the_weights_and_leaves_the_model_alone():
    model, x = timm_spot.sparsify(backbone(), keep_rate=0.5, stages=(1, 3), read='all'), images()
    logits, names = model(x), set(model.state_dict())
    half, drawn = model.pruned(keep_rate=0.25), model.pruned(scorer='random', scorer_seed=3)
    assert [index.shape[1] for index in half.kept_tokens(x)] == [4, 1] and half.predictors is model.predictors
    assert torch.equal(drawn(x), timm_spot.sparsify(backbone(), 0.5, (1, 3), 'random', scorer_seed=3)(x))
    assert torch.equal(drawn.pruned(scorer_seed=4)(x), model.pruned(scorer='random', scorer_seed=4)(x))
    assert drawn.blocks is model.blocks and not drawn.predictors
    assert (model.keep_rate, model.scorer, set(model.state_dict())) == (0.5, 'relevance', names)
    assert torch.equal(model(x), logits) and torch.equal(model.pruned()(x), logits)
    assert torch.equal(model.pruned(scorer='relevance')(x), logits)
    with pytest.raises(ValueError, match="scorer='relevance' needs trained predictors"):
        drawn.pruned(scorer='relevance')
    with pytest.raises(ValueError, match='keep_rate=2 must be'):
        model.pruned(keep_rate=2)
    assert model.keep_rate == 0.5


def test_a_copy_saves_its_own_settings(tmp_path):
    model = timm.create_model('relevance_deit_tiny_patch16_224', depth=2, img_size=32, keep_rate=0.5)
    save_for_hf(model.pruned(0.25, 'random', 5), str(tmp_path / 'copy'), safe_serialization=True)
    save_for_hf(model, str(tmp_path / 'model'), safe_serialization=True)
    copied, own = (
        json.loads((tmp_path / name / 'config.json').read_text())['model_args'] for name in ('copy', 'model'))
    assert (copied['keep_rate'], copied['scorer'], copied['scorer_seed']) == (0.25, 'random', 5)
    assert own['keep_rate'] == 0.5 and 'scorer' not in own


def test_a_keep_rate_set_as_an_attribute_is_checked_and_used():
    model = timm_spot.sparsify(backbone(), scorer='norm')
    model.keep_rate = 0.25
    assert [index.shape[1] for index in model.kept_tokens(images())] == [4, 1, 1]
    with pytest.raises(ValueError, match='keep_rate=0 must be'):
        model.keep_rate = 0
    assert model.keep_rate == 0.25


def test_merging_is_set_beside_the_keep_rate_or_instead_of_it():
    model = timm_spot.sparsify(backbone(), scorer='merge', r=2)
    assert (model.r, model.drops, model.merges, count_left(model)) == ((2, 2, 2, 2), False, True, 8)
    model.set_merging([0, 3, 0, 1])
    assert (model.r, count_left(model)) == ((0, 3, 0, 1), 12)
    model.set_keep_rate(0.5)  # as many in front of blocks 1, 2, 3 as if they were dropped: 8, 4, 2
    assert (model.r, count_left(model)) == (None, 2)
    model.set_merging(0)
    assert not model.merges and not model.reduces
    model.set_scorer('norm')
    assert (model.r, model.drops, count_left(model)) == (None, True, 2)
    model.set_merging(1)  # 16 to 15, of which 8 stay, 7, 4, 3, 2, 1
    assert (model.drops, model.merges, count_left(model)) == (True, True, 1)


def test_similarity_takes_the_place_of_the_number_to_merge():
    model = timm_spot.sparsify(backbone(), scorer='merge', similarity=0.9)
    assert (model.similarity, model.r, model.drops, model.merges, model.rate) == (
        0.9, None, False, True, 'similarity=0.9')
    model.set_merging(2)
    assert (model.similarity, model.r, count_left(model)) == (None, (2, 2, 2, 2), 8)
    model.set_merging(similarity=-1.)
    assert (model.similarity, model.r, count_left(model)) == (-1., None, 1)
    assert model.pruned().similarity == -1. and model.pruned(keep_rate=0.5).similarity is None
    model.set_flops(0.7)
    assert model.similarity is None and model.r is not None
    model.set_merging(similarity=0.5)
    model.set_scorer('norm')
    assert (model.similarity, model.drops) == (None, True)


@pytest.mark.parametrize('keywords, error, message', [
    (dict(similarity=1.5), ValueError, 'similarity=1.5 must be from -1 to 1'),
    (dict(similarity=float('nan')), ValueError, 'similarity=nan must be'),
    (dict(similarity='0.9'), TypeError, "similarity must be a number, got '0.9'"),
    (dict(similarity=True), TypeError, 'similarity must be a number, got True'),
    (dict(similarity=0.9, r=3), ValueError, r'similarity=0.9 and r=\[3, 3, 3, 3\] both say'),
    (dict(similarity=0.9, scorer='norm'), ValueError, "similarity=0.9 needs scorer='merge': scorer='norm'"),
])
def test_wrong_similarity(keywords, error, message):
    with pytest.raises(error, match=message):
        timm_spot.sparsify(backbone(), **{'scorer': 'merge', **keywords})


@pytest.mark.parametrize('r, error, message', [
    (-1, ValueError, 'r=-1 must be 0 or more'),
    ([1, 2], ValueError, r'r=\[1, 2\] must be .* one number for each of the 4 blocks'),
    (1.5, TypeError, r'r=1\.5 must be an int'),
    ('8', TypeError, "r='8' must be an int"),
    ([1, 2, True, 0], TypeError, 'a list of ints'),
])
def test_wrong_counts_to_merge(r, error, message):
    with pytest.raises(error, match=message):
        timm_spot.sparsify(backbone(), scorer='merge', r=r)


def test_a_keep_rate_that_merging_cannot_reach():
    model = timm_spot.sparsify(backbone(), keep_rate=0.4, scorer='merge')
    with pytest.raises(ValueError, match='16 tokens cannot become 6 in 1 blocks'):
        model(images())


@torch.no_grad()
@pytest.mark.parametrize('keywords, left', [(dict(r=2), 8), (dict(r=[3, 2, 0, 1]), 10), (dict(similarity=-1.), 1)])
def test_a_model_that_merges_is_saved_and_built_again(keywords, left, tmp_path):
    small = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
    model = timm.create_model(
        'relevance_vit', scorer='merge', backbone='vit_tiny_patch16_224', **keywords, **small).eval()
    assert count_left(model) == left
    changed = model.pruned()
    changed.set_merging([1, 0, 0, 0])
    for name, saved in dict(model=model, changed=changed).items():
        save_for_hf(saved, str(tmp_path / name), safe_serialization=True)
        loaded = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).eval()
        assert (loaded.r, loaded.similarity) == (saved.r, saved.similarity)
        assert torch.equal(loaded(images()), saved(images()))
    assert model.r != changed.r


@torch.no_grad()
def test_copies_of_a_model_that_merges():
    model, x = timm_spot.sparsify(backbone(), scorer='merge', r=2), images()
    assert model.pruned().r == model.r and torch.equal(model.pruned()(x), model(x))
    assert model.pruned(keep_rate=0.5).r is None and model.pruned(scorer='norm').r is None
    assert torch.equal(model.pruned(0.5, 'norm')(x), timm_spot.sparsify(backbone(), 0.5, scorer='norm')(x))
    assert model.r == (2, 2, 2, 2)


def test_a_copy_at_another_keep_rate_draws_by_the_same_seed():
    model = timm_spot.sparsify(backbone(), 0.5, scorer='random', scorer_seed=5)
    assert model.pruned(0.25).plan.scorer_seed == 5 and model.pruned(scorer_seed=0).plan.scorer_seed == 0
