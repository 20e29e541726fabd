from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload
from dht_golden import load, make_model
from torch import nn
from torch.nn.utils import prune

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
def test_budget_of_a_built_model(tiny, images, tmp_path):
    tiny.set_budget(9)
    assert tiny.n_tokens == 9 and tiny.segment(images).counts.max() == 9
    timm.models.save_for_hf(tiny, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.n_tokens == 9 and torch.equal(again(images), tiny(images))
    tiny.set_budget(None)
    assert tiny.n_tokens == round(64 / 0.56) and tiny.segment(images).counts.max() > 20
    timm.models.save_for_hf(tiny, tmp_path, safe_serialization=True)
    assert timm.create_model(f'local-dir:{tmp_path}').patch_embed.n_tokens is None


@torch.no_grad()
def test_budget_of_one_call(tiny, images):
    other = copy.deepcopy(tiny)
    other.set_budget(9)
    features, expected = tiny.forward_features(images, n_tokens=9), other.forward_features(images)
    assert torch.equal(features.tokens, expected.tokens) and torch.equal(features.mask, expected.mask)
    assert torch.equal(tiny.segment(images, n_tokens=9).segmentation, expected.regions.segmentation)
    assert tiny.n_tokens == 20 and tiny.segment(images).counts.max() == 20  # the model keeps its own
    with pytest.raises(ValueError, match='target=0 must be a whole number'):
        tiny.segment(images, n_tokens=0)


@pytest.mark.parametrize('n_tokens', [0, -3, 2.5, float('nan')])
def test_budgets_that_are_none(tiny, n_tokens):
    with pytest.raises(ValueError, match=f'n_tokens={n_tokens} must be a whole number, at least 1'):
        tiny.set_budget(n_tokens)
    assert tiny.n_tokens == 20


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


@pytest.fixture
def whole():
    """A small model that has every kind of learned part."""
    torch.manual_seed(0)
    return timm.create_model(
        'dht_vit_pico_patch8_64', n_tokens=20, qk_norm=True, reg_tokens=1, tokenizer=dict(compute_grad=True),
        **TINY).eval()


class LowRank(nn.Module):
    """What peft puts in the place of a layer: the layer, and a learned sum of two thin ones. It has no `weight`."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        if isinstance(layer, nn.Linear):
            self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)
        else:
            self.down = nn.Conv2d(layer.in_channels, 2, layer.kernel_size, layer.stride)
            self.up = nn.Conv2d(2, layer.out_channels, 1)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def test_learned_parts_are_called_as_modules(whole, images):
    called, expected = set(), set()
    for name, module in whole.named_modules():
        if list(module.parameters(recurse=False)):
            expected.add(name)
            module.register_forward_hook(lambda module, inputs, output, name=name: called.add(name))
    with torch.no_grad():
        whole(images)
    assert called == expected and {'patch_embed.proj', 'patch_embed.tokenizer.varproj'} < called


def test_learned_parts_have_shapes_that_wrappers_expect(whole, images):
    """As peft does, around every linear layer and convolution: all of it learns."""
    before = whole(images)
    layers = [name for name, m in whole.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for name in layers:
        parent, _, attribute = name.rpartition('.')
        setattr(whole.get_submodule(parent), attribute, LowRank(whole.get_submodule(name)))
    whole.requires_grad_(False)
    for name in layers:
        whole.get_submodule(name).down.requires_grad_()
        whole.get_submodule(name).up.requires_grad_()
    after = whole(images)
    after.square().sum().backward()
    assert not torch.allclose(before, after)
    for name in layers:
        gradient = whole.get_submodule(name).up.weight.grad
        # How similar a vertex is to itself matters only where it prefers itself.
        assert gradient is not None and (gradient.any() or name.endswith('varproj')), name


@torch.no_grad()
def test_pruned_weights_count(whole, images):
    before = whole(images)
    parts = [m for m in whole.patch_embed.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for part in parts:
        prune.l1_unstructured(part, 'weight', 0.5)
    pruned = whole(images)
    assert not torch.allclose(pruned, before)
    for part in parts:
        prune.remove(part, 'weight')
    assert torch.equal(whole(images), pruned)


@pytest.mark.filterwarnings('ignore:torch.ao.quantization is deprecated', 'ignore:torch.quantize_per_tensor')
@torch.no_grad()
def test_dynamic_int8(whole, images):
    quantized = torch.ao.quantization.quantize_dynamic(whole, {nn.Linear}, dtype=torch.qint8)
    assert type(quantized.patch_embed.pos_proj) is not nn.Linear
    # Regions are found in full precision.
    assert torch.equal(quantized.segment(images).segmentation, whole.segment(images).segmentation)
    difference = (quantized(images) - whole(images)).abs().max()
    assert 0. < difference < 0.5 * whole(images).abs().max()


@torch.no_grad()
def test_offloaded_weights(whole, images, tmp_path):
    expected = whole(images)
    for offloaded in (
            cpu_offload(copy.deepcopy(whole), execution_device=torch.device('cpu')),
            disk_offload(copy.deepcopy(whole), tmp_path, execution_device=torch.device('cpu'))):
        assert offloaded.patch_embed.proj.weight.is_meta
        assert torch.equal(offloaded(images), expected)


@pytest.mark.filterwarnings('ignore:.*torch.jit.trace:FutureWarning')
@pytest.mark.parametrize('record', [
    lambda model, x: torch.jit.trace(model, x), lambda model, x: torch.export.export(model, (x,))],
    ids=['jit', 'export'])
def test_a_graph_of_it_is_refused_in_words(record, tiny, images):
    with pytest.raises(RuntimeError, match='how many regions an image has depends on its pixels'):
        record(tiny, images)


@pytest.mark.parametrize('size', [(1, 5), (1, 6), (2, 3), (1, 1)])
def test_pictures_of_a_few_pixels(tiny, size):
    images = torch.full((2, 3, *size), 0.3)
    images[1] = torch.randn(3, *size)
    together = tiny(images)
    together.sum().backward()
    for i in range(2):
        torch.testing.assert_close(together[i:i + 1], tiny(images[i:i + 1]), atol=1e-5, rtol=1e-5)
