from __future__ import annotations

import pytest
import torch
from dht_golden import MAIN, load, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label

import timm_spot

EDGE_CASES = ('constant_32x32', 'two_flat_halves_32x32', 'noise_5x7', 'no_level_2x3', 'one_level_32x32')


@pytest.fixture(scope='module')
def released():
    return make_tokenizer('released_64x64')


@pytest.mark.parametrize('name', MAIN)
@torch.no_grad()
def test_golden(name):
    tensors, config = load(name)
    tokenizer = make_tokenizer(name)
    if 'pixel_features' in tensors:
        features = tokenizer.conv(tensors['image']).permute(0, 2, 3, 1)
        torch.testing.assert_close(features, tensors['pixel_features'], atol=3e-5, rtol=0)
    # The budget of released_96x128 is the default one.
    regions = tokenizer(tensors['image'], target=None if name == 'released_96x128' else config['target'])
    assert torch.equal(regions.segmentation, tensors['tokens/seg'].long())
    assert torch.equal(regions.boxes, tensors['tokens/box'].long())
    torch.testing.assert_close(regions.injected, tensors['tokens/injected'], atol=2e-5, rtol=0)
    if 'tokens/gradient_map' in tensors:
        torch.testing.assert_close(regions.gradient, tensors['tokens/gradient_map'], atol=1e-6, rtol=0)
    first = 0
    for i, pieces in enumerate(regions.pieces):
        assert torch.equal(pieces - pieces.min(), tensors[f'img{i}/before_merge/seg'].long())
        colors = tensors[f'img{i}/after_merge/colour']
        assert regions.counts[i] == len(colors)
        torch.testing.assert_close(regions.colors[first:first + len(colors)], colors, atol=3e-5, rtol=0)
        first += len(colors)
    if 'boost' in config:
        boosted = tokenizer(tensors['image'], target=config['target'], boost=config['boost']).segmentation
        for i, segmentation in enumerate(boosted):
            assert torch.equal(
                segmentation - segmentation.min(), tensors[f'img{i}/after_merge_boost/seg'].long())


@pytest.mark.parametrize('name', EDGE_CASES)
@torch.no_grad()
def test_golden_edge_cases(name, released):
    tensors = {k.removeprefix(f'{name}/'): v for k, v in load('edge_cases')[0].items() if k.startswith(name)}
    features = released.conv(tensors['image']).permute(0, 2, 3, 1)
    torch.testing.assert_close(features, tensors['pixel_features'], atol=3e-5, rtol=0)
    regions = released(
        tensors['image'], target=int(tensors['target']), max_levels=1 if name.startswith('one_level') else None)
    assert torch.equal(regions.pieces[0], tensors['before_merge/seg'].long())
    assert torch.equal(regions.segmentation[0], tensors['after_merge/seg'].long())
    assert torch.equal(regions.boxes, tensors['after_merge/box'].long())
    torch.testing.assert_close(regions.injected, tensors['after_merge/injected'], atol=2e-5, rtol=0)
    torch.testing.assert_close(regions.colors, tensors['after_merge/colour'], atol=3e-5, rtol=0)


def test_golden_gradients():
    tensors, config = load('released_64x64')
    tokenizer = make_tokenizer('released_64x64').double()
    images = tensors['image'].double().requires_grad_()
    loss = (tokenizer(images, target=config['target']).injected * tensors['loss/weight']).sum()
    loss.backward()
    assert loss.item() == pytest.approx(tensors['loss/value'].item(), rel=1e-6)
    gradients = {f'tokenizer.{name}': p.grad for name, p in tokenizer.named_parameters()}
    gradients['image'] = images.grad
    expected = {k.removeprefix('loss/grad/'): v for k, v in tensors.items() if k.startswith('loss/grad/')}
    for name, value in expected.items():
        assert (gradients[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    # What the specification says carries none: the bend of the gradient map, which only a histogram reads.
    assert [k for k, v in gradients.items() if v is None] == ['tokenizer.gradact.lmbda']


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 21), st.integers(1, 21), st.integers(0, 2 ** 30))
def test_any_size_alone_and_in_a_batch(height, width, seed):
    tokenizer = make_tokenizer('released_64x64')
    images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(seed))
    images[1] = 0.3
    with torch.no_grad():
        together = tokenizer(images, target=9, strict=True)
        features = tokenizer.conv(images)
        assert all(torch.equal(features[i:i + 1], tokenizer.conv(images[i:i + 1])) for i in range(3))
        alone = [tokenizer(image[None], target=9, strict=True) for image in images]
    assert together.counts.tolist() == [r.counts.item() for r in alone]
    for i, regions in enumerate(alone):
        segmentation = together.segmentation[i]
        assert torch.equal(segmentation - segmentation.min(), regions.segmentation[0])
        assert regions.counts.item() == min(9, len(regions.pieces.unique()))
        ids = regions.segmentation[0]
        assert ids.flatten().unique().tolist() == list(range(regions.counts.item()))
        first = [(ids.flatten() == k).nonzero()[0].item() for k in range(regions.counts.item())]
        assert first == sorted(first)
        assert all(label(regions.segmentation[0] == k)[1] == 1 for k in range(regions.counts.item()))
        torch.testing.assert_close(regions.injected, together.injected[i:i + 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_side_that_is_no_multiple_of_four(released):
    """Pixel features are those of the image padded by replication, inside its true area."""
    image = load('released_50x67')[0]['image']
    padded = torch.nn.functional.pad(image, (0, 1, 0, 2), mode='replicate')
    # Convolutions of another shape, in float32 and of values about 1.
    torch.testing.assert_close(released.conv(image), released.conv(padded)[..., :50, :67], atol=1e-5, rtol=0)


@torch.no_grad()
def test_checkerboard_and_strips(released):
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    for image in (board.float()[None, None].expand(1, 3, -1, -1), torch.randn(1, 3, 1, 37), torch.randn(1, 3, 37, 1)):
        regions = released(image, target=6, strict=True)
        assert regions.counts.item() <= 6 and regions.injected.isfinite().all()


@torch.no_grad()
def test_levels_nest(released):
    regions = released(load('released_64x64')[0]['image'], target=72)
    counts = [len(level.unique()) for level in regions.levels]
    assert counts == [1223 + 1170, 336 + 300, 104 + 80, 39 + 29, 25 + 16, 22 + 11]
    for fine, coarse in zip(regions.levels, regions.levels[1:]):
        assert len(torch.stack([fine.flatten(), coarse.flatten()]).unique(dim=1).T) == len(fine.unique())


def test_training_draws_and_eval_does_not():
    torch.manual_seed(0)
    tokenizer = timm_spot.HierarchicalTokenizer()
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        draws = [
            tokenizer(images, generator=torch.Generator().manual_seed(seed)).segmentation for seed in (0, 0, 1)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
        tokenizer.eval()
        assert torch.equal(tokenizer(images).segmentation, tokenizer(images).segmentation)


@torch.no_grad()
def test_autocast_and_half_precision_change_nothing(released):
    image = load('released_64x64')[0]['image'][:1]
    expected = released(image).injected
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(released(image).injected, expected)
    half = make_tokenizer('released_64x64').half()
    assert torch.equal(half(image).injected, expected)


@pytest.mark.parametrize('images, error, match', [
    (torch.rand(3, 8, 8), ValueError, r'shape \(B, 3, H, W\).*got \(3, 8, 8\)'),
    (torch.rand(1, 1, 8, 8), ValueError, 'repeat a grey channel'),
    (torch.zeros(0, 3, 8, 8), ValueError, 'at least one image'),
    (torch.zeros(1, 3, 8, 8, dtype=torch.int32), TypeError, 'floating point.*int32'),
    ('picture.png', TypeError, 'got str'),
])
def test_wrong_images(images, error, match, released):
    with pytest.raises(error, match=match):
        released(images)


@pytest.mark.parametrize('settings, match', [
    (dict(criterion='mdl'), 'unknown'), (dict(hid_ch=0), 'hid_ch=0'), (dict(cmp=1.5), r'cmp=1.5'),
    (dict(in_chans=1), 'in_chans=1'),
])
def test_wrong_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        timm_spot.HierarchicalTokenizer(**settings)


def test_wrong_target_and_weights(released):
    with pytest.raises(ValueError, match='target=0'):
        released(torch.rand(1, 3, 8, 8), target=0)
    weights = {k: v for k, v in load('classifier_64x64')[0].items() if k.startswith('model.tokenizer')}
    with pytest.raises(ValueError, match='hid_ch=8'):
        released.load_authors({k.removeprefix('model.'): v for k, v in weights.items()})


def test_released_keys_with_and_without_prefix(released):
    bare = {k: v for k, v in released.state_dict().items()}
    for weights in (bare, {f'tokenizer.{k}': v for k, v in bare.items()}):
        tokenizer = timm_spot.HierarchicalTokenizer(hid_ch=8, cmp=0.01, compute_grad=True).load_authors(weights)
        assert torch.equal(tokenizer.varproj.weight, released.varproj.weight)


def test_gradient_activation_at_and_off_zero():
    activation = make_tokenizer('released_64x64').gradact
    with torch.no_grad():
        activation.lmbda.copy_(torch.tensor([2., -2.]).view(2, 1, 1))
    x = torch.tensor([0., 0.5, -1.]).expand(1, 2, 1, 3)
    out = activation(x)
    torch.testing.assert_close(out[0, 0, 0], torch.asinh(2 * x[0, 0, 0]) / torch.asinh(torch.tensor(2.)))
    torch.testing.assert_close(out[0, 1, 0], torch.sinh(x[0, 0, 0] * torch.asinh(torch.tensor(-2.))) / -2.)
