"""Tokens with a size, through whole models: what `coverage=` and placements with spacings promise."""
from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import create_feature_extractor

import timm_spot
from timm_spot.ops.placements import sample_placement

PICO = 'spot_vit_pico_patch8_64'


def create(name=PICO, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


def sized(batch, n, generator=None):
    """A placement (B, N, 4) with windows of all sizes."""
    positions = torch.rand(batch, n, 2, generator=generator)
    return torch.cat([positions, 0.5 + 5 * torch.rand(batch, n, 2, generator=generator)], dim=-1)


@settings(max_examples=15, deadline=None)
@given(sampler=st.sampled_from(['isotropic', 'center', 'sobol', 'coarse+center', 'coarse+uniform', 'grid']),
       n=st.integers(1, 20), batch=st.integers(2, 5), H=st.integers(40, 90), W=st.integers(40, 90),
       coverage=st.sampled_from([0., 0.5, 1.]))
def test_logits_do_not_depend_on_the_batch_at_any_coverage(sampler, n, batch, H, W, coverage):
    model = create(sampler=sampler, n_tokens=n, coverage=coverage)
    images = torch.randn(batch, 3, H, W)
    with torch.inference_mode():
        together = model(images)
        assert model.forward_features(images).shape == (batch, 1 + n, 64)
        for i in range(batch):
            torch.testing.assert_close(model(images[i:i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_logits_do_not_depend_on_the_sizes_of_neighbours():
    model, images, placement = create(coverage=1.), torch.randn(4, 3, 64, 64), sized(4, 6)
    together = model(images, placement)
    for i in range(4):
        torch.testing.assert_close(model(images[i:i + 1], placement[i:i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_without_coverage_everything_is_as_before():
    model, told = create(n_tokens=9), create(n_tokens=9, coverage=0.)
    assert 'patch_embed.size_proj.weight' not in model.state_dict() and model.patch_embed.size_proj is None
    images = torch.randn(2, 3, 64, 64)
    assert model.place(images).shape == (2, 9, 2)
    told.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(told(images), model(images))
    # A placement with spacing 1 is that of single pixels, trained size columns or not.
    torch.nn.init.normal_(told.patch_embed.size_proj.weight)
    # Given as well: the position features of a placement that all images share are products of another shape.
    ones, single = F.pad(model.place(images), (0, 2), value=1.), model(images, model.place(images))
    assert torch.equal(model(images, ones), single) and torch.equal(told(images, ones), single)
    assert torch.equal(model(images, ones[..., :3]), single)
    torch.testing.assert_close(single, model(images), rtol=1e-4, atol=1e-5)


def test_one_spacing_or_one_for_each_axis():
    model, images, placement = create(coverage=1.), torch.randn(2, 3, 64, 64), sized(2, 5)
    placement[..., 3] = placement[..., 2]
    assert torch.equal(model(images, placement[..., :3]), model(images, placement))
    torch.testing.assert_close(model(images, placement[0])[0], model(images, placement)[0], rtol=1e-4, atol=1e-5)


def test_a_retrofitted_vit_at_coverage_1_sees_the_small_picture():
    """At half the size the copy is exact: a ViT of 32 px with the same weights, its table at the patches' places."""
    torch.manual_seed(0)
    vit = timm.create_model(
        'vit_tiny_patch16_224', img_size=32, patch_size=8, depth=2, embed_dim=64, num_heads=2, num_classes=10).eval()
    model = timm_spot.retrofit(vit, n_tokens=16, coverage=1.).eval()
    large = torch.randn(3, 3, 64, 64)
    small = F.avg_pool2d(large, 2)
    torch.testing.assert_close(model(large), vit(small), rtol=1e-4, atol=1e-4)
    assert model.place(large)[0, 0].tolist() == [0.125, 0.125, 2., 2.]


def test_settings_are_changed_saved_and_restored(tmp_path):
    model = create(n_tokens=9, coverage=(0., 1.), eval_coverage=0.5, sampler='coarse+center', n_coarse=4)
    assert model.place(torch.zeros(1, 3, 64, 64)).shape == (1, 9, 4)
    assert model.placer.train_prior.coverage == (0., 1.) and model.placer.coverage() == 0.5
    torch.nn.init.normal_(model.patch_embed.size_proj.weight)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.place(images), model.place(images)) and torch.equal(again(images), model(images))
    assert again.placer.train_prior == model.placer.train_prior
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, coverage=1.).eval()
    assert other.placer.coverage() == 1. and other.placer.train_prior.coverage == 1.
    model.set_placement(coverage=0., sampler='isotropic')
    assert model.placer.coverage() == 0. and model.place(images).shape == (2, 9, 2)
    model.set_placement(coverage=None)
    assert model.placer.coverage() == 0.
    assert copy.deepcopy(other).placer.coverage() == 1.


@pytest.mark.parametrize('keywords, told', [
    ({}, False),
    (dict(coverage=0.), True),
    (dict(eval_coverage=0.5), True),
    (dict(sampler='coarse+center'), True),
    (dict(eval_sampler='coarse+center'), True),
    (dict(sampler='coarse+center', size_embed=False), False),
    (dict(size_embed=True), True),
])
def test_tokens_are_told_their_size_where_the_settings_give_them_one(keywords, told):
    assert (create(**keywords).patch_embed.size_proj is not None) == told


@pytest.mark.parametrize('keywords, changes', [
    (dict(coverage=1.), dict(coverage=None)),
    (dict(coverage=1.), dict(n_tokens=4)),
    (dict(sampler='coarse+center'), dict(sampler='isotropic')),
    ({}, dict(coverage=0.5, sampler='coarse+center', n_coarse=2)),
    ({}, dict(eval_coverage=1.)),
])
def test_a_model_whose_sizes_were_changed_is_saved_with_its_weights(tmp_path, keywords, changes):
    model = create(n_tokens=9, **keywords)
    if keywords:
        torch.nn.init.normal_(model.patch_embed.size_proj.weight)
    model.set_placement(**changes)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert set(again.state_dict()) == set(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.place(images), model.place(images)) and torch.equal(again(images), model(images))


def test_a_retrofitted_model_is_saved_with_its_sizes(tmp_path):
    settings = dict(n_tokens=9, sampler='coarse+center', n_coarse=4, coverage=(0., 1.), eval_coverage=0.5)
    model = timm_spot.retrofit('vit_tiny_patch16_224', img_size=64, embed_dim=32, depth=1, num_heads=2, **settings)
    torch.nn.init.normal_(model.eval().patch_embed.size_proj.weight)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert again.placer.train_prior == model.placer.train_prior and torch.equal(again(images), model(images))


def test_copies_and_pickles_are_whole():
    model, images = create(n_tokens=9, sampler='center', coverage=0.7), torch.randn(2, 3, 64, 64)
    torch.nn.init.normal_(model.patch_embed.size_proj.weight)
    expected = model(images)  # with a placement that is kept
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other.place(images), model.place(images)) and torch.equal(other(images), expected)
    changed = copy.deepcopy(model)
    changed.set_placement(coverage=0.2)
    assert not torch.equal(changed.place(images), model.place(images)) and torch.equal(model(images), expected)


def test_weights_with_size_columns_are_loaded_whatever_the_coverage(tmp_path):
    model = create(n_tokens=9, coverage=1.)
    torch.nn.init.normal_(model.patch_embed.size_proj.weight)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    source = dict(**SMALL, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth')))
    plain = timm.create_model(PICO, n_tokens=9, **source).eval()
    images = torch.randn(2, 3, 64, 64)
    assert plain.place(images).shape == (2, 9, 2)
    placement = model.place(images)
    assert torch.equal(plain(images, placement), model(images, placement))
    with pytest.raises(ValueError, match=r'no patch_embed\.size_proj\.weight; .* size_embed=True asks for'):
        timm.create_model(PICO, n_tokens=9, size_embed=False, **source)


def test_weights_without_size_columns_lack_nothing_else(tmp_path):
    weights = create().state_dict()
    del weights['blocks.1.norm1.weight']
    torch.save(weights, tmp_path / 'weights.pth')
    source = dict(**SMALL, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth')))
    with pytest.raises(ValueError, match=r'it lacks blocks\.1\.norm1\.weight\. Give'):
        timm.create_model(PICO, coverage=1., **source)


def test_weights_without_size_columns_load_where_there_are_some(tmp_path):
    plain = create(n_tokens=9)
    timm.models.save_for_hf(plain, tmp_path, safe_serialization=True)
    told = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, coverage=1.).eval()
    assert not told.patch_embed.size_proj.weight.any()
    assert torch.equal(told.blocks[0].attn.qkv.weight, plain.blocks[0].attn.qkv.weight)
    untold = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, coverage=1., size_embed=False).eval()
    assert untold.patch_embed.size_proj is None
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(told(images), untold(images))


def test_size_columns_are_trained():
    model = create(coverage=1., n_tokens=9).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert model.patch_embed.size_proj.weight.grad.abs().sum() > 0
    only = create(coverage=1., train_only='position')
    trained = [name for name, p in only.named_parameters() if p.requires_grad]
    assert trained == ['patch_embed.pos_proj.weight', 'patch_embed.size_proj.weight']


def test_size_columns_start_at_zero_after_every_initialisation():
    model = create(coverage=1.)
    assert not model.patch_embed.size_proj.weight.any()
    with torch.device('meta'):
        empty = create(coverage=1.)
    empty = empty.to_empty(device='cpu')
    empty.init_weights()
    assert not empty.patch_embed.size_proj.weight.any()


def test_positions_and_sizes_have_derivatives_through_the_model():
    torch.manual_seed(0)
    model = create(coverage=1., depth=1).double()
    torch.nn.init.normal_(model.patch_embed.size_proj.weight, std=0.1)
    y, x = torch.meshgrid(*[torch.linspace(0, 2, 64, dtype=torch.float64)] * 2, indexing='ij')
    images = torch.stack([torch.sin(y + x), torch.cos(y), x])[None]
    placement = torch.tensor([[[0.4, 0.5, 1.6, 2.7], [0.6, 0.4, 3.1, 1.2]]], dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(model(images, placement).square().sum(), placement)
    for i in range(8):
        change = torch.zeros(8, dtype=torch.float64)
        change[i] = 0.005 if i % 4 < 2 else 0.02
        change = change.view_as(placement)
        with torch.no_grad():
            ahead, behind = (model(images, placement + sign * change).square().sum() for sign in (1, -1))
        difference = (ahead - behind) / (2 * change.sum())
        assert gradient.flatten()[i] == pytest.approx(difference.item(), abs=0.1 * gradient.abs().max().item())


def test_uint8_images():
    model = timm.create_model(PICO, pretrained=True, n_tokens=9, coverage=1.).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(model(images), model(model.patch_embed.normalize(images)))


def test_coordinates_stay_in_float32_under_autocast_and_in_half_precision():
    model, images = create(coverage=1., n_tokens=9), torch.randn(2, 3, 64, 64)
    with torch.autocast('cpu', torch.bfloat16):
        assert model.place(images).dtype == torch.float32
        loose = model(images)
    torch.testing.assert_close(loose.float(), model(images), rtol=0.1, atol=0.1)
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


def test_one_convention_has_sizes():
    model, images = create(convention='spot', n_tokens=4), torch.randn(1, 3, 64, 64)
    why = "but under convention='spot' windows have one size, which follows from that of the image"
    with pytest.raises(ValueError, match=rf'positions of shape \(1, 4, 4\) hold spacings, {why}'):
        model(images, sized(1, 4))
    with pytest.raises(ValueError, match=rf'positions of shape \(4, 3\) hold spacings, {why}'):
        model(images, sized(1, 4)[0, :, :3])
    for keywords in (dict(coverage=1.), dict(coverage=(0., 0.5)), dict(eval_coverage=0.5)):
        with pytest.raises(ValueError, match=f"sampler='isotropic' at coverage=.* asks for sizes, {why}"):
            create(convention='spot', n_tokens=4, **keywords)
        with pytest.raises(ValueError, match=f"sampler='isotropic' at coverage=.* asks for sizes, {why}"):
            model.set_placement(**keywords)
    with pytest.raises(ValueError, match=rf"sampler='coarse\+center' at coverage=0\.0 asks for sizes, {why}"):
        model.set_placement(sampler='coarse+center')
    with pytest.raises(ValueError, match=f'size_embed=True tells tokens their size, {why}'):
        create(convention='spot', size_embed=True)
    assert create(convention='spot', n_tokens=4, coverage=0.).patch_embed.size_proj is None
    assert model.place(images).shape == (1, 4, 2)


@pytest.mark.parametrize('changes, error, says', [
    (dict(coverage=1.2), ValueError, 'coverage=1.2'),
    (dict(coverage='all'), TypeError, "coverage='all'"),
    (dict(eval_coverage=(0., 1.)), TypeError, 'must be one number: only training draws'),
    (dict(n_coarse=-1), ValueError, 'n_coarse=-1'),
])
def test_settings_that_are_none(changes, error, says):
    with pytest.raises(error, match=says):
        create(**changes)
    model = create()
    with pytest.raises(error, match=says):
        model.set_placement(**changes)
    assert model.placer.coverage() == 0.


@pytest.mark.filterwarnings('ignore:NOTE. The nodes obtained by tracing')  # in train mode logits are checked too
def test_features_of_timm():
    model, images = create(n_tokens=9, coverage=1.), torch.randn(2, 3, 64, 64)
    torch.nn.init.normal_(model.patch_embed.size_proj.weight)
    tokens = model.forward_intermediates(images, output_fmt='NLC', intermediates_only=True)
    placed = model.forward_intermediates(
        images, output_fmt='NLC', intermediates_only=True, positions=model.place(images))
    for token, expected in zip(tokens, placed, strict=True):  # position features by products of another shape
        torch.testing.assert_close(token, expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    features = timm.create_model(PICO, **SMALL, features_only=True, n_tokens=9, coverage=1., out_indices=(0, 1)).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    for taken, kept in zip(features(images), tokens, strict=True):
        torch.testing.assert_close(taken.flatten(2).transpose(1, 2), kept)
    traced = create_feature_extractor(model, {'blocks.0': 'first'})
    torch.testing.assert_close(traced(images)['first'][:, model.num_prefix_tokens:], tokens[0])
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)
    model.set_input_size(img_size=96, patch_size=16)
    assert model.place(torch.zeros(1, 3, 96, 96))[0, 0, 2:].tolist() == [2., 2.]


def test_feature_maps_of_sized_lattices():
    model = create(n_tokens=9, coverage=1.)
    assert model.forward_intermediates(torch.randn(1, 3, 64, 64), intermediates_only=True)[0].shape == (1, 64, 3, 3)
    mixed = create(n_tokens=9, sampler='coarse+center')
    with pytest.raises(ValueError, match='on no lattice'):
        mixed.forward_intermediates(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize('backend, sizes', [
    ('eager', ((64, 64), (48, 80))), ('inductor', ((64, 64), (48, 80)))])
def test_compiled_models_change_size_and_placement(backend, sizes):
    torch._dynamo.reset()
    model = create(n_tokens=9, coverage=1., depth=1, embed_dim=32, num_heads=2)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for size in sizes:
            images, placement = torch.randn(2, 3, *size), sized(2, 7)
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(compiled(images, placement), model(images, placement), rtol=1e-4, atol=1e-5)


def test_exported_models_take_positions_and_sizes(tmp_path):
    model = create(n_tokens=9, coverage=1., depth=1)
    images = torch.randn(2, 3, 64, 64)
    baked = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(baked(images), model(images), rtol=1e-4, atol=1e-5)
    batch, n = torch.export.Dim('batch', min=2, max=64), torch.export.Dim('n', min=2, max=256)
    program = torch.export.export(model, (images, sized(2, 7)), dynamic_shapes=({0: batch}, {0: batch, 1: n}))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    other, placement = torch.randn(3, 3, 64, 64), sized(3, 11)
    torch.testing.assert_close(
        torch.export.load(file).module()(other, placement), model(other, placement), rtol=1e-4, atol=1e-5)


def test_place_gives_what_sample_placement_draws():
    model = create(n_tokens=25, coverage=0.7, sampler='center')
    assert torch.equal(
        model.place(torch.zeros(1, 3, 64, 64)),
        sample_placement('center', 25, (64, 64), window=8, coverage=0.7))
