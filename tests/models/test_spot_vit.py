from __future__ import annotations

import io

import pytest
import timm
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import resolve_model_input_args

import timm_spot

PICO = 'spot_vit_pico_patch8_64'
SAMPLERS = ['uniform', 'gaussian', 'sobol', 'isotropic', 'center', 'grid']


def create(name=PICO, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


@settings(max_examples=25, deadline=None)
@given(
    sampler=st.sampled_from(SAMPLERS), n_tokens=st.integers(1, 20), batch=st.integers(2, 7),
    H=st.integers(40, 90), W=st.integers(40, 90))
def test_logits_do_not_depend_on_the_batch(sampler, n_tokens, batch, H, W):
    model = create(sampler=sampler, n_tokens=n_tokens)
    images = torch.randn(batch, 3, H, W)
    with torch.inference_mode():
        together = model(images)
        torch.testing.assert_close(model(images), together, rtol=0, atol=0)
        for i in range(batch):
            torch.testing.assert_close(model(images[i:i + 1])[0], together[i], rtol=1e-4, atol=1e-5)
        assert model.forward_features(images).shape == (batch, 1 + n_tokens, 64)


def test_logits_do_not_depend_on_the_batch_under_spot():
    model = create(convention='spot', n_tokens=6)
    images, positions = torch.randn(3, 3, 64, 64), torch.rand(3, 6, 2)
    together = model(images, positions)
    for i in range(3):
        torch.testing.assert_close(model(images[i:i + 1], positions[i:i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_train_and_eval_placements():
    images = torch.randn(2, 3, 64, 64)
    model = create(sampler='uniform', n_tokens=5)
    assert torch.equal(model(images), model(images))
    assert not torch.equal(model(images), create(sampler='uniform', n_tokens=5, seed=1)(images))
    model.train()
    torch.manual_seed(7)
    first = model(images)
    assert not torch.equal(first, model(images))
    torch.manual_seed(7)
    assert torch.equal(first, model(images))


def test_positions_override_the_sampler():
    model = create(n_tokens=5)
    images, positions = torch.randn(2, 3, 64, 64), torch.rand(9, 2)
    expected = model(images, positions.expand(2, -1, -1))
    # Features of a shared placement are products of another shape than those of its copies: equal up to rounding.
    torch.testing.assert_close(model(images, positions), expected)
    torch.testing.assert_close(model.forward_head(model.forward_features(images, positions=positions)), expected)
    features, taken = model.forward_intermediates(images, positions=positions, output_fmt='NLC')
    assert [t.shape for t in taken] == [(2, 9, 64)] * 2
    torch.testing.assert_close(model.forward_head(features), expected)
    torch.testing.assert_close(model(images, model.place(images)), model(images))
    with pytest.raises(ValueError, match=r'\(2, N, 2\) or \(N, 2\)'):
        model(images, torch.rand(3, 9, 2))


def test_place_returns_a_copy():
    model = create(n_tokens=5)
    images = torch.randn(1, 3, 64, 64)
    before = model.place(images).clone()
    model.place(images).zero_()
    assert torch.equal(model.place(images), before)


def test_set_placement_is_saved(tmp_path):
    model = create(n_tokens=5, sampler='uniform')
    model.set_placement(n_tokens=9, sampler='gaussian', seed=4)
    timm.models.save_for_hf(model, tmp_path)
    reloaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.place(images), reloaded.place(images))
    assert torch.equal(model(images), reloaded(images))


def test_saved_config_reads_in_timm_s_scripts(tmp_path):
    timm.models.save_for_hf(create('spot_vit_base_patch16_in1k.spot_in1k', n_tokens=5), tmp_path)
    arguments = resolve_model_input_args(f'local-dir:{tmp_path}', {}, in_chans=None)
    model = timm.create_model(**arguments, pretrained=True)
    assert model.n_tokens == 5 and model.patch_embed.convention == 'spot'


def test_feature_maps_are_lattices_or_refused():
    images = torch.randn(2, 3, 64, 96)
    model = create()
    assert [f.shape for f in model.forward_intermediates(images, intermediates_only=True)] == [(2, 64, 8, 12)] * 2
    model.set_placement(n_tokens=6)
    maps = model.forward_intermediates(images, intermediates_only=True)[-1]
    tokens = model.forward_intermediates(images, intermediates_only=True, output_fmt='NLC')[-1]
    assert maps.shape == (2, 64, 2, 3)
    assert torch.equal(maps[1, :, 1, 2], tokens[1, 5])
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(images, positions=torch.rand(49, 2))
    lattice = timm_spot.sample_positions('isotropic', 8, (64, 128))
    taken = model.forward_intermediates(images, positions=lattice[0], intermediates_only=True)
    assert taken[0].shape == (2, 64, 2, 4)
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(images, output_fmt='NHWC')


def test_49_tokens_at_random_do_not_become_a_14_x_14_map():
    model = create(n_tokens=49, sampler='uniform', features_only=True, out_indices=1)
    with pytest.raises(ValueError, match="'uniform' places 49 tokens on no lattice"):
        model(torch.randn(1, 3, 112, 112))


@pytest.mark.parametrize('kwargs', [
    dict(reg_tokens=4), dict(class_token=False, global_pool='avg'), dict(global_pool='map'), dict(pre_norm=True),
    dict(qk_norm=True), dict(dynamic_img_size=True), dict(in_chans=1), dict(num_classes=0), dict(no_embed_class=True),
    dict(patch_drop_rate=0.5), dict(embed_norm_layer=torch.nn.LayerNorm)])
def test_keywords_of_timm_s_vision_transformer(kwargs):
    model = create(**kwargs)
    output = model(torch.randn(2, kwargs.get('in_chans', 3), 70, 50))
    assert output.shape == (2, kwargs.get('num_classes', 10) or 64)


def test_position_table_is_refused():
    with pytest.raises(ValueError, match="pos_embed must be 'none'"):
        create(pos_embed='learn')


def test_small_images_are_refused(pico):
    with pytest.raises(ValueError, match='7 x 64 px are smaller than one window of 8 x 8'):
        pico(torch.rand(1, 3, 7, 64))


def test_meta_to_empty_init_weights_leaves_nothing_uninitialised():
    model = timm.create_model(PICO, device='meta', dtype=torch.float64, **SMALL)
    model = model.to_empty(device='cpu').eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float('nan'))
    model.init_weights()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all(), name
    assert model.patch_embed.n_sigma == 1
    assert model(torch.rand(1, 3, 64, 64, dtype=torch.float64)).isfinite().all()


def test_groups_for_weight_and_layer_decay(pico):
    matcher = timm.models.group_parameters(pico, pico.group_matcher(), return_values=False, reverse=True)
    for name in ('patch_embed.proj.weight', 'patch_embed.pos_proj.weight', 'cls_token'):
        assert matcher[name] == 0
    assert matcher['blocks.4.mlp.fc1.weight'] > matcher['blocks.0.mlp.fc1.weight'] > 0


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_compiles_without_a_break(sampler):
    torch._dynamo.reset()
    model = create(sampler=sampler, n_tokens=9, depth=1)
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))
        positions = torch.rand(2, 7, 2)
        torch.testing.assert_close(compiled(images, positions), model(images, positions))


@pytest.mark.parametrize('backend, budgets, sizes', [
    ('eager', (None, 9, 16, 25), ((64, 64), (48, 80), (96, 64), (32, 33))),
    ('inductor', (None, 9), ((64, 64), (48, 80))),
])
def test_compiled_models_change_size_and_budget(backend, budgets, sizes):
    """At a second image size symbolic ints once reached the function that draws the placement, which refused them."""
    torch._dynamo.reset()
    model = create(embed_dim=32, depth=1, num_heads=2).eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for n_tokens in budgets:
            model.set_placement(n_tokens=n_tokens)
            for size in sizes:
                images = torch.randn(2, 3, *size)
                torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


def test_compiled_gradient_to_positions():
    torch._dynamo.reset()
    model = create(depth=1)
    images, positions = torch.randn(2, 3, 64, 64), torch.rand(2, 7, 2, requires_grad=True)
    plain, = torch.autograd.grad(model(images, positions).sum(), positions)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    graph, = torch.autograd.grad(compiled(images, positions).sum(), positions)
    torch.testing.assert_close(graph, plain)


def test_export_with_placement_baked_in_or_as_input():
    model = create(n_tokens=9, sampler='sobol')
    images, positions = torch.randn(2, 3, 64, 64), torch.rand(2, 7, 2)
    for size in ((64, 64), (72, 88)):  # the nominal size and one that was never seen before
        other = torch.randn(2, 3, *size)
        torch.testing.assert_close(torch.export.export(model, (other,)).module()(other), model(other))
    baked = torch.export.export(model, (images,), strict=True)
    torch.testing.assert_close(baked.module()(images), model(images))
    batch, n = torch.export.Dim('batch', min=2, max=64), torch.export.Dim('n', min=2, max=256)
    free = torch.export.export(model, (images, positions), dynamic_shapes=({0: batch}, {0: batch, 1: n}))
    images, positions = torch.randn(5, 3, 64, 64), torch.rand(5, 12, 2)
    torch.testing.assert_close(free.module()(images, positions), model(images, positions))


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')  # exporter's
@pytest.mark.parametrize('with_positions', [False, True])
def test_onnx_with_dynamic_batch_and_budget(with_positions, tmp_path):
    import onnxruntime

    model = create(n_tokens=9, sampler='sobol', depth=1)
    dynamic = torch.export.Dim.DYNAMIC
    inputs, shapes = (torch.randn(2, 3, 64, 64), torch.rand(2, 7, 2)), ({0: dynamic}, {0: dynamic, 1: dynamic})
    n_inputs = 2 if with_positions else 1
    program = torch.onnx.export(
        model, inputs[:n_inputs], dynamo=True, dynamic_shapes=shapes[:n_inputs], verbose=False)
    program.save(tmp_path / 'model.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    inputs = (torch.randn(5, 3, 64, 64), torch.rand(5, 12, 2))[:n_inputs]
    answer, = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs)})
    torch.testing.assert_close(torch.from_numpy(answer), model(*inputs).detach(), rtol=1e-4, atol=1e-5)


def test_state_dict_round_trip():
    model = create(n_tokens=9)
    images = torch.randn(2, 3, 64, 64)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = create(n_tokens=9, num_classes=10)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(other(images), model(images))


def test_uint8_images_are_normalised_as_the_config_says():
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    model = create(n_tokens=9, pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(-1, 1, 1)
    torch.testing.assert_close(model(images), model((images / 255 - mean) / std), rtol=1e-4, atol=1e-5)

    features = create(n_tokens=9, features_only=True, out_indices=2)
    cfg = features.model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    for actual, expected in zip(features(images), features((images / 255 - mean) / std)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    vit = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=1).eval()
    retrofitted = timm_spot.retrofit(vit, n_tokens=4)
    torch.testing.assert_close(retrofitted(images), retrofitted(images / 127.5 - 1), rtol=1e-4, atol=1e-5)


def test_uint8_images_compile_without_a_break():
    torch._dynamo.reset()
    model = create(n_tokens=4, patch_size=4, depth=1)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))
        positions = torch.rand(2, 7, 2)
        torch.testing.assert_close(compiled(images, positions), model(images, positions))
