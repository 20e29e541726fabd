from __future__ import annotations

import pytest
import torch
from dht_golden import MAIN, load, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label

import timm_spot
from timm_spot.ops.regions.features import region_means

EDGE_CASES = ('constant_32x32', 'two_flat_halves_32x32', 'noise_5x7', 'no_level_2x3', 'one_level_32x32')


@pytest.fixture
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


@pytest.mark.parametrize('size', [(1, 1), (1, 5), (1, 6), (6, 1), (2, 3)])
@torch.no_grad()
def test_pictures_of_a_few_pixels(size, released):
    """A flat one of five or six pixels is one region; so it is in a batch, and whatever the budget."""
    images = torch.full((2, 3, *size), 0.3)
    for target in (None, 1, 50):
        regions = released(images, target=target)
        assert regions.counts.tolist() == [1, 1] and regions.sizes.tolist() == [size[0] * size[1]] * 2
        assert regions.boxes.T.tolist() == [[0, 0, size[0] - 1, size[1] - 1]] * 2
        assert regions.levels == []
        # Its mean is replaced by the predicted colour.
        torch.testing.assert_close(regions.injected[0, 0, 0], regions.colors[0])


def test_as_few_regions_as_pixels_asked_for():
    tokenizer = timm_spot.HierarchicalTokenizer(min_avg_region=64).eval()
    with torch.no_grad():
        regions = tokenizer(torch.full((1, 3, 8, 8), 0.3))
    assert regions.counts.tolist() == [1] and regions.levels == []


@pytest.mark.filterwarnings('ignore:.*torch.jit.trace:FutureWarning')
@pytest.mark.parametrize('way', ['jit', 'export', 'fx'])
def test_a_graph_of_it_is_refused_in_words(way, released):
    images = torch.rand(1, 3, 16, 16)
    record = dict(
        jit=lambda: torch.jit.trace(released, images), export=lambda: torch.export.export(released, (images,)),
        fx=lambda: torch.fx.symbolic_trace(released))[way]
    with pytest.raises(RuntimeError, match='how many regions an image has depends on its pixels'):
        record()
    assert released(images).counts.sum() > 0  # nothing of the attempt is left behind


def test_images_without_pixels_are_refused(released):
    with pytest.raises(RuntimeError, match='images on the meta device have no pixels'):
        released(torch.rand(1, 3, 16, 16, device='meta'))


@pytest.mark.parametrize('settings, match', [
    (dict(criterion='mdl'), 'unknown'), (dict(hid_ch=0), 'hid_ch=0'), (dict(cmp=1.5), r'cmp=1.5'),
    (dict(cmp=float('nan')), 'cmp=nan'), (dict(iota=0.), 'iota=0.0 must be positive'),
    (dict(iota=float('inf')), 'iota=inf'), (dict(center=-0.1), r'center=-0.1 must lie in \[0, 1\]'),
    (dict(min_avg_region=-1), 'min_avg_region=-1'), (dict(inference_target_coeff=0), 'inference_target_coeff=0'),
    (dict(in_chans=1), 'in_chans=1'), (dict(merge='largest'), "merge='largest' is unknown"),
])
def test_wrong_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        timm_spot.HierarchicalTokenizer(**settings)


def test_wrong_target_and_weights(released):
    for name, value in (
            ('target', 0), ('target', 2.5), ('target', float('nan')), ('max_levels', -1), ('boost', float('nan')),
            ('boost', -1.)):
        with pytest.raises(ValueError, match=f'{name}={value}'):
            released(torch.rand(1, 3, 8, 8), **{name: value})
    for wrong, says in ((None, 'a NoneType'), ([torch.zeros(1)], 'a list'), ({}, 'no weights at all')):
        with pytest.raises(ValueError, match=f'state_dict holds {says}'):
            released.load_authors(wrong)
    nan = {k: v * float('nan') if v.is_floating_point() else v for k, v in released.state_dict().items()}
    with pytest.raises(ValueError, match='state_dict holds NaN or infinity in'):
        released.load_authors(nan)
    weights = {k: v for k, v in load('classifier_64x64')[0].items() if k.startswith('model.tokenizer')}
    with pytest.raises(ValueError, match='hid_ch=8'):
        released.load_authors({k.removeprefix('model.'): v for k, v in weights.items()})


def test_released_keys_with_and_without_prefix(released):
    bare = {k: v for k, v in released.state_dict().items()}
    for weights in (bare, {f'tokenizer.{k}': v for k, v in bare.items()}):
        tokenizer = timm_spot.HierarchicalTokenizer(hid_ch=8, cmp=0.01, compute_grad=True).load_authors(weights)
        assert torch.equal(tokenizer.varproj.weight, released.varproj.weight)


@pytest.fixture
def ward(released):
    weights = released.state_dict()
    tokenizer = timm_spot.HierarchicalTokenizer(hid_ch=8, cmp=0.01, compute_grad=True, merge='ward')
    return tokenizer.load_authors(weights).eval()


@pytest.mark.parametrize('target', [1, 2, 30, 400, 2000, 24 * 33])
@torch.no_grad()
def test_ward_gives_the_budget_exactly_whatever_the_batch(target, ward):
    images = torch.randn(3, 3, 24, 33, generator=torch.Generator().manual_seed(0))
    images[1] = 0.3  # one flat image among noise
    together = ward(images, target=target)
    assert together.counts.tolist() == [min(target, 24 * 33)] * 3
    for i in range(3):
        alone, ids = ward(images[i:i + 1], target=target), together.segmentation[i]
        assert torch.equal(ids - ids.min(), alone.segmentation[0])
        assert all(label(ids == k)[1] == 1 for k in ids.unique()[:50])


@torch.no_grad()
def test_ward_keeps_what_matters(ward, released):
    """On a picture of an object and specks: the error that is left is smaller, and no token is a speck."""
    image = load('released_96x128')[0]['image']
    error, specks = {}, {}
    for name, tokenizer in (('ward', ward), ('keepers', released)):
        regions = tokenizer(image, target=100, strict=True)
        means = region_means(image, regions.segmentation, regions.sizes)
        error[name] = (image[0].flatten(1) - means[:, regions.segmentation.flatten()]).square().mean().item()
        specks[name] = (regions.sizes <= 4).float().mean().item()
    assert error['ward'] < 0.8 * error['keepers']
    assert specks['ward'] <= 0.01


def test_ward_lets_gradients_through(ward):
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ward.train()(images, target=12).injected.square().sum().backward()
    learned = [*ward.conv.parameters(), *ward.linear.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learned)


def test_weights_tell_the_rule_that_they_were_made_with(ward, released):
    """Those of earlier versions and of the authors tell none: they were made with keepers."""
    settings = dict(hid_ch=8, cmp=0.01, compute_grad=True)
    assert timm_spot.HierarchicalTokenizer().merge == 'keepers'
    assert set(ward.state_dict()) - set(released.state_dict()) == {'by_ward'}
    for made in (ward, released):
        for merge in (None, 'ward', 'keepers'):
            tokenizer = timm_spot.HierarchicalTokenizer(merge=merge, **settings)
            tokenizer.load_state_dict(made.state_dict())
            assert tokenizer.merge == (merge or made.merge)
            again = timm_spot.HierarchicalTokenizer(**settings)
            again.load_state_dict(tokenizer.state_dict())
            assert again.merge == tokenizer.merge


@pytest.mark.filterwarnings('ignore:.*torch.jit.script')  # torch's own, as forward mode begins
@pytest.mark.parametrize('transform', [
    lambda f, x: torch.func.grad(lambda x: f(x).sum())(x), lambda f, x: torch.func.vmap(f)(x[None]),
    lambda f, x: torch.func.jvp(f, (x,), (x,)), lambda f, x: torch.func.jacrev(f)(x),
    lambda f, x: torch.func.functionalize(f)(x)], ids=['grad', 'vmap', 'jvp', 'jacrev', 'functionalize'])
def test_transforms_of_torch_func_are_refused_in_words(transform, released):
    """They hide the pixels: torch's own errors were of tensors without storage."""
    with pytest.raises(RuntimeError, match=r'torch\.func .* Take gradients by torch\.autograd\.grad'):
        transform(lambda x: released(x).injected, torch.rand(1, 3, 16, 16))


@pytest.mark.filterwarnings('ignore:.*torch.jit.script')
def test_forward_mode_is_refused_in_words(released):
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match='forward mode'):
        released(torch.autograd.forward_ad.make_dual(torch.rand(1, 3, 16, 16), torch.ones(1, 3, 16, 16)))


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')  # of torch.jit
def test_one_graph_is_refused_in_words(released):
    images = torch.rand(1, 3, 16, 16)
    for capture in (
            lambda: torch.jit.script(torch.nn.Sequential(released)),
            lambda: torch.export.export(released, (images,), strict=True),
            lambda: torch.compile(released, fullgraph=True, backend='eager')(images)):
        with pytest.raises(Exception, match='how many regions an image has depends on its pixels'):
            capture()
        torch.compiler.reset()
