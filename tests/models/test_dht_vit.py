from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from dht_golden import load, make_model

from timm_spot.models.dht_vit import paint_tokens

TINY = dict(embed_dim=32, depth=2, num_heads=4)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return timm.create_model('dht_vit_pico_patch8_64', n_tokens=20, **TINY).eval()


@pytest.fixture
def images():
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[1] = 0.2  # fewer regions than the others
    images[1, :, 8:, 16:] = 1.
    return images


def golden_classifier():
    tensors, config = load('classifier_64x64')
    return tensors, make_model(tensors, config, prefix='model.', depth=2, num_heads=4)


@torch.no_grad()
def test_golden_classifier():
    tensors, model = golden_classifier()
    features, taken = model.forward_intermediates(tensors['image'], output_fmt='NLC', return_prefix_tokens=True)
    assert torch.equal(features.regions.segmentation, tensors['seg'].long())
    mask = features.mask[:, :, None]
    for name, actual in (
            ('normed', features.tokens), *(
                (f'stage{i + 1}', torch.cat([prefix, tokens], dim=1)) for i, (tokens, prefix) in enumerate(taken))):
        torch.testing.assert_close(actual * mask, tensors[name], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(tensors['image']), tensors['logits'], atol=1e-4, rtol=0)


def test_golden_gradients():
    tensors, model = golden_classifier()
    loss = F.cross_entropy(model.double()(tensors['image'].double()), tensors['loss_labels'].long())
    loss.backward()
    assert loss.item() == pytest.approx(tensors['loss'].item(), abs=1e-6)
    gradients = {
        name.replace('patch_embed.tokenizer', 'tokenizer').replace('patch_embed.mix', 'extractor._mix')
        .replace('patch_embed.pixel_token', 'extractor.pixel_mask_token').replace('gamma', 'lambda_')
        .replace('cls_token', 'embedder.cls_token'): p.grad for name, p in model.named_parameters()}
    expected = {k.removeprefix('grad.'): v for k, v in tensors.items() if k.startswith('grad.')}
    for name, value in expected.items():
        error = (gradients[name].reshape(value.shape) - value).abs().max()
        assert error <= 1e-3 * value.abs().max() + 1e-12, name


def test_finite_differences_through_the_classifier():
    """Of the pixel features' parameters, in float64: the partition stays as it is for a step so small."""
    torch.manual_seed(0)
    model = timm.create_model('dht_vit_pico_patch8_64', n_tokens=12, **TINY).eval().double()
    image, label = torch.randn(1, 3, 12, 13, dtype=torch.float64), torch.tensor([3])

    def loss():
        return F.cross_entropy(model(image), label)

    loss().backward()
    conv = model.patch_embed.tokenizer.conv
    for parameter in (conv.ds[0].weight, conv.ds[1].bias, conv.cv[0].weight, conv.cv[3].weight, conv.cv[4].weight):
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 3)):
            values = []
            for step in (1e-6, -1e-6):
                flat[i] += step
                with torch.no_grad():
                    values.append(loss().item())
                flat[i] -= step
            assert gradient[i].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize('pool', ['token', 'avg', 'max', 'avgmax', 'map'])
@torch.no_grad()
def test_logits_do_not_depend_on_the_batch(pool, images):
    torch.manual_seed(0)
    model = timm.create_model('dht_vit_pico_patch8_64', n_tokens=20, global_pool=pool, **TINY).eval()
    together = model(images)
    assert len(set(model.segment(images).counts.tolist())) > 1
    for i in range(3):
        torch.testing.assert_close(together[i:i + 1], model(images[i:i + 1]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pooling_without_a_mask_is_refused(images):
    model = timm.create_model('dht_vit_pico_patch8_64', n_tokens=20, global_pool='avg', **TINY).eval()
    features = model.forward_features(images)
    with pytest.raises(ValueError, match='pass mask='):
        model.forward_head(features.tokens)
    torch.testing.assert_close(model.forward_head(features.tokens, mask=features.mask), model(images))


def test_paint_by_hand():
    segmentation = torch.tensor([
        [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2]], [[3, 3, 3, 3], [3, 3, 3, 3], [4, 4, 4, 4]]])
    tokens = torch.tensor([[[1.], [2.], [3.]], [[4.], [5.], [0.]]])
    counts = torch.tensor([3, 2])
    assert paint_tokens(tokens, segmentation, counts, 1)[:, 0].tolist() == [
        [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 3, 3]], [[4, 4, 4, 4], [4, 4, 4, 4], [5, 5, 5, 5]]]
    assert paint_tokens(tokens, segmentation, counts, 2)[:, 0].tolist() == [[[1, 2]], [[4, 4]]]
    assert paint_tokens(tokens, segmentation, counts, 9).shape == (2, 1, 1, 1)


@torch.no_grad()
def test_maps(tiny, images):
    maps = tiny.forward_intermediates(images, indices=[0, 1], intermediates_only=True, stride=1)
    tokens = tiny.forward_intermediates(images, indices=[0, 1], intermediates_only=True, output_fmt='NLC')
    regions = tiny.segment(images)
    assert [m.shape for m in maps] == [(3, 32, 32, 32)] * 2
    start = regions.segmentation[2].min()
    torch.testing.assert_close(maps[1][2, :, 5, 7], tokens[1][2, regions.segmentation[2, 5, 7] - start])
    model = timm.create_model('dht_vit_pico_patch8_64', features_only=True, out_indices=(0, 1), **TINY).eval()
    assert [f.shape for f in model(images)] == [(3, 32, 4, 4)] * 2


def test_prune_intermediate_layers(tiny, images):
    """What timm's own test of it asks for, which takes features for one tensor."""
    with torch.no_grad():
        logits = tiny(images)
        (maps,), (tokens,) = (
            tiny.forward_intermediates(images, indices=[0], intermediates_only=True, output_fmt=fmt)
            for fmt in ('NCHW', 'NLC'))
        whole = copy.deepcopy(tiny)
        whole.prune_intermediate_layers([1], prune_head=False)
        assert torch.equal(whole(images), logits)
        pruned = copy.deepcopy(tiny)
        assert pruned.prune_intermediate_layers([0], prune_norm=True) == [0] and len(pruned.blocks) == 1
        assert torch.equal(pruned.forward_intermediates(images, indices=[0], intermediates_only=True)[0], maps)
        features = pruned.forward_features(images)
        assert torch.equal(features.tokens[:, 1:], tokens)  # without the norm they end at the tap
        assert torch.equal(pruned(images), features.tokens)  # nothing pools them
    pruned.train()
    pruned.forward_features(images).tokens.sum().backward()
    assert [name for name, p in pruned.named_parameters() if p.grad is None] == []


def test_checkpointing_gives_the_same_gradients(tiny, images):
    other = copy.deepcopy(tiny)
    other.set_grad_checkpointing()
    for model in (tiny, other):
        model(images).square().sum().backward()
    for a, b in zip(tiny.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_drop_path_is_the_same_in_every_block():
    model = timm.create_model('dht_vit_pico_patch8_64', drop_path_rate=0.2, **TINY)
    assert [b.drop_path1.drop_prob for b in model.blocks] == [0.2, 0.2]


@torch.no_grad()
def test_budget_of_a_built_model(tiny, images):
    tiny.set_budget(9)
    assert tiny.n_tokens == 9 and tiny.segment(images).counts.max() == 9


@torch.no_grad()
def test_registers_and_no_class_token(images):
    for kwargs in (dict(reg_tokens=2), dict(class_token=False, global_pool='avg')):
        model = timm.create_model('dht_vit_pico_patch8_64', n_tokens=20, **TINY, **kwargs).eval()
        assert model(images).shape == (3, 10)


@pytest.mark.parametrize('kwargs, match', [
    (dict(pos_embed='learn'), 'pos_embed'), (dict(patch_drop_rate=0.5), 'n_tokens'), (dict(in_chans=1), 'in_chans=1'),
    (dict(tokenizer=dict(criterion='mdl')), 'unknown')])
def test_wrong_settings(kwargs, match):
    with pytest.raises(ValueError, match=match):
        timm.create_model('dht_vit_pico_patch8_64', **TINY, **kwargs)
