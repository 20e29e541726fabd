from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models._features_fx import get_notrace_modules
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torchvision.models.feature_extraction import NodePathTracer

import timm_spot
from timm_spot.models import SubpixelVisionTransformer
from timm_spot.models.pruning_scorers import SCORERS
from timm_spot.models.pruning_vit import RelevanceSubpixelVisionTransformer
from timm_spot.tasks.evaluation.flops import count_flops

BACKBONES = {
    'class token': dict(),
    'registers': dict(reg_tokens=3),
    'mean': dict(global_pool='avg'),
    'mean with prefix': dict(global_pool='avg', pool_include_prefix=True),
    'no class token': dict(class_token=False, global_pool='avg'),
    'registers, no class token': dict(class_token=False, reg_tokens=2, global_pool='avg'),
    'LayerScale and qk_norm': dict(init_values=0.5, qk_norm=True),
}
DROPPING = [name for name, scorer in SCORERS.items() if not scorer.merges]


def backbone(**kwargs):
    """16 patches, 4 blocks; attention is far from even, as in a trained ViT."""
    torch.manual_seed(0)
    arguments = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
    vit = VisionTransformer(**{**arguments, **kwargs}).eval()
    with torch.no_grad():
        for name, p in vit.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
            if 'qkv.weight' in name:
                p.mul_(2)
    return vit


def images(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def masks_of(model, x, n=16, **placement):
    kept = model.kept_tokens(x, **placement)
    return torch.stack([torch.zeros(len(x), n).scatter(1, index, 1.) for index in kept], dim=1)


@pytest.mark.parametrize('kind', BACKBONES)
@pytest.mark.parametrize('scorer', SCORERS)
@torch.no_grad()
def test_keep_rate_1_gives_the_logits_of_the_backbone(kind, scorer):
    vit = backbone(**BACKBONES[kind])
    model = timm_spot.sparsify(vit, keep_rate=1, scorer=scorer)
    assert type(vit) is VisionTransformer
    assert (model(images()) - vit(images())).abs().max() <= 1e-6
    assert set(vit.state_dict()) == {name for name in model.state_dict() if not name.startswith('predictors.')}


@pytest.mark.parametrize('kind', BACKBONES)
@pytest.mark.parametrize('scorer', DROPPING)
@torch.no_grad()
def test_masking_gives_the_logits_of_dropping(kind, scorer):
    model = timm_spot.sparsify(backbone(**BACKBONES[kind]), keep_rate=0.6, scorer=scorer)
    x = images()
    masked = model.forward_masked(x, masks=masks_of(model, x))
    assert (masked.logits - model(x)).abs().max() < 1e-5
    assert masked.masks.sum(dim=2).tolist() == [[10., 6., 3.]] * 3
    last = masked.masks[:, -1].bool()
    tokens = model.forward_features(x)[:, model.num_prefix_tokens:]
    torch.testing.assert_close(masked.tokens[:, model.num_prefix_tokens:][last], tokens.flatten(0, 1))


@pytest.mark.parametrize('kind', ['registers', 'mean'])
@pytest.mark.parametrize('read', ['last', 'all'])
@torch.no_grad()
def test_tokens_that_are_masked_are_judged_as_those_that_are_dropped(kind, read, monkeypatch):
    """What fell at one stage counts neither in the statistics nor in the means that the next stage's predictor sees."""
    model, x = timm_spot.sparsify(backbone(**BACKBONES[kind]), keep_rate=0.6, read=read), images()
    for predictor in model.predictors:
        torch.nn.init.normal_(predictor.head.weight)
    counts = iter((10, 6, 3))

    def best(scores, keep, keep_rate):
        index = scores.masked_fill(keep == 0, -torch.inf).topk(next(counts), dim=1).indices
        return torch.zeros_like(keep).scatter(1, index, 1.)

    monkeypatch.setattr('timm_spot.models.pruning_passes.sample_mask', best)
    masked = model.forward_masked(x)
    assert torch.equal(masked.masks, masks_of(model, x))
    assert (masked.logits - model(x)).abs().max() < 1e-5  # sums in another order


@pytest.mark.parametrize('scorer', DROPPING)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours(scorer):
    model = timm_spot.sparsify(backbone(), keep_rate=0.5, scorer=scorer)
    x = images()
    for a, b in zip(model.kept_tokens(x), model.kept_tokens(x[:1])):
        assert torch.equal(a[:1], b)
    assert (model(x)[:1] - model(x[:1])).abs().max() < 1e-5


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 100), st.sampled_from(DROPPING))
def test_every_count(rows, columns, percent, scorer):
    vit = backbone(img_size=(8 * rows, 8 * columns))
    model = timm_spot.sparsify(vit, keep_rate=percent / 100, stages=(1, 2), scorer=scorer)
    expected = timm_spot.ops.keep_counts(rows * columns, percent / 100, 2)
    with torch.no_grad():
        kept = model.kept_tokens(torch.randn(2, 3, 8 * rows, 8 * columns))
        assert model.forward_features(torch.randn(2, 3, 8 * rows, 8 * columns)).shape[1] == 1 + expected[-1]
    assert [index.shape[1] for index in kept] == expected
    assert set(kept[1][0].tolist()) <= set(kept[0][0].tolist()) <= set(range(rows * columns))


@torch.no_grad()
def test_equally_relevant_tokens_fall_from_the_end():
    model = timm_spot.sparsify(backbone(), keep_rate=0.5)
    for predictor in model.predictors:
        predictor.head.weight.zero_()
    assert [index[0].tolist() for index in model.kept_tokens(images())] == [
        list(range(8)), list(range(4)), list(range(2))]


@torch.no_grad()
def test_scorers_keep_what_they_say():
    vit, x = backbone(), images(1)
    before = vit.forward_intermediates(x, indices=[0], output_fmt='NLC', intermediates_only=True)[0]
    kept = timm_spot.sparsify(vit, keep_rate=0.25, stages=(1,), scorer='norm').kept_tokens(x)[0]
    assert set(kept[0].tolist()) == set(before[0].norm(dim=-1).topk(4).indices.tolist())

    seen = []
    attn = vit.blocks[0].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    vit(x)
    expected = dict(zip(
        ('cls-attention', 'received-attention'),
        (seen[0][0, :, 0, 1:].mean(dim=0), seen[0][0, :, 1:, 1:].mean(dim=(0, 1)))))
    for scorer, scores in expected.items():
        kept = timm_spot.sparsify(backbone(), keep_rate=0.25, stages=(1,), scorer=scorer).kept_tokens(x)[0]
        assert set(kept[0].tolist()) == set(scores.topk(4).indices.tolist())


def test_only_layers_that_are_read_leave_fused_attention(monkeypatch):
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, 'scaled_dot_product_attention', lambda *a, **k: calls.append(1) or fused(*a, **k))
    for read, scorer, expected in (('all', 'relevance', 1), ('last', 'relevance', 3), ('all', 'random', 5)):
        calls.clear()
        timm_spot.sparsify(backbone(depth=5), stages=(2, 4), read=read, scorer=scorer)(images())
        assert len(calls) == expected


@torch.no_grad()
def test_fused_and_unfused_backbones_agree():
    vit, x = backbone(), images()
    unfused = backbone()
    for block in unfused.blocks:
        block.attn.fused_attn = False
    models = []
    for source in (vit, unfused):
        torch.manual_seed(1)
        models.append(timm_spot.sparsify(source))
    assert (models[0](x) - models[1](x)).abs().max() < 1e-5


@pytest.mark.parametrize('kind', BACKBONES)
def test_training_reaches_every_parameter(kind):
    model = timm_spot.sparsify(backbone(**BACKBONES[kind])).train()
    model(images()).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_training_with_gradient_checkpoints_is_the_same():
    gradients = []
    for enable in (False, True):
        model = timm_spot.sparsify(backbone())
        torch.manual_seed(0)
        for predictor in model.predictors:
            torch.nn.init.normal_(predictor.head.weight)
        model.train().set_grad_checkpointing(enable)
        model(images()).square().sum().backward()
        gradients.append(model.predictors[0].proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_shapes_on_the_meta_device():
    """timm's own tests run there."""
    with torch.device('meta'):
        model = timm.create_model('relevance_deit_tiny_patch16_224', keep_rate=0.5).eval()
        images = torch.randn(2, 3, 224, 224)
    assert model.forward_features(images).shape == (2, 1 + 25, 192)


def test_pruning_works_off_the_grid():
    torch.manual_seed(0)
    spot = timm.create_model('spot_vit_pico_patch8_64', n_tokens=49, sampler='sobol').eval()
    model = timm_spot.sparsify(spot, keep_rate=0.5)
    assert type(model) is RelevanceSubpixelVisionTransformer and isinstance(model, SubpixelVisionTransformer)
    x, positions = images(2, 64), torch.rand(2, 30, 2)
    with torch.no_grad():
        assert [index.shape[1] for index in model.kept_tokens(x)] == [25, 12, 6]
        assert [index.shape[1] for index in model.kept_tokens(x, positions=positions)] == [15, 8, 4]
        masked = model.forward_masked(x, masks=masks_of(model, x, 30, positions=positions), positions=positions)
        assert (masked.logits - model(x, positions)).abs().max() < 1e-5
        model.set_keep_rate(1)
        assert torch.equal(model(x, positions), spot(x, positions))
    model.set_keep_rate(0.5)
    model.train()(x, positions).sum().backward()
    assert model.patch_embed.pos_proj.weight.grad.any()


def test_features_are_those_of_the_tokens_left():
    model = timm_spot.sparsify(backbone(reg_tokens=1), keep_rate=0.5)
    with torch.no_grad():
        last, features = model.forward_intermediates(images(), output_fmt='NLC')
        assert [f.shape for f in features] == [(3, n, 32) for n in (16, 8, 4, 2)]
        assert torch.equal(last, model.forward_features(images()))
        result = model.forward_intermediates(
            images(), indices=[1], output_fmt='NLC', norm=True, stop_early=True, return_prefix_tokens=True,
            output_dict=True, intermediates_only=True)
        assert set(result) == {'image_intermediates', 'image_intermediates_prefix'}
        assert torch.equal(result['image_intermediates'][0], model.norm(features[1]))
        assert result['image_intermediates_prefix'][0].shape == (3, 2, 32)
        with pytest.raises(ValueError, match="output_fmt='NHWC' must be 'NCHW' or 'NLC'"):
            model.forward_intermediates(images(), output_fmt='NHWC')
        model.set_keep_rate(1)
        assert model.forward_intermediates(images(), intermediates_only=True)[0].shape == (3, 32, 4, 4)


def test_default_stages_are_quarters_of_the_depth():
    assert timm_spot.sparsify(backbone(depth=12)).stages == (3, 6, 9)
    assert timm_spot.sparsify(backbone(depth=5)).stages == (1, 2, 3)
    assert timm_spot.sparsify(backbone(depth=2)).stages == (1,)


@pytest.mark.parametrize('name', ['deit_small_patch16_224', 'deit_base_patch16_224', 'spot_vit_pico_patch8_64'])
@pytest.mark.parametrize('read', ['all', 'last'])
def test_predictors_are_small(name, read):
    with torch.device('meta'):
        model = timm_spot.sparsify(name, read=read)
    added = sum(p.numel() for p in model.predictors.parameters())
    assert added < 0.015 * (sum(p.numel() for p in model.parameters()) - added)


@pytest.mark.parametrize('name, published', [('deit_small_patch16_224', 2.9), ('deit_base_patch16_224', 11.4)])
@torch.no_grad()
def test_multiply_adds_are_the_published_ones_predictors_included(name, published):
    """The published figures of models that drop tokens at keep rate 0.7 in front of blocks 3, 6 and 9."""
    model, image = timm_spot.sparsify(name, 0.7, (3, 6, 9), read='all').eval(), torch.zeros(1, 3, 224, 224)
    flops = count_flops(model, image)
    assert flops / 2e9 == pytest.approx(published, rel=0.03)
    model.set_scorer('random')
    predictors = flops - count_flops(model, image)
    model.set_keep_rate(1)
    assert 0 < predictors < 0.04 * count_flops(model, image)


@pytest.mark.parametrize('keywords, error, message', [
    (dict(keep_rate=0), ValueError, 'keep_rate=0 must be greater than 0'),
    (dict(keep_rate=1.5), ValueError, r'keep_rate=1\.5 must be'),
    (dict(stages=(1, 4)), ValueError, r'stages=\(1, 4\) must be .* to 3 \(the model has 4 blocks\)'),
    (dict(stages=(2, 1)), ValueError, 'in rising order'),
    (dict(stages=(2, 2)), ValueError, 'in rising order'),
    (dict(stages=(0, 1)), ValueError, 'from 1'),
    (dict(stages=()), ValueError, 'one or more'),
    (dict(stages=(1.5,)), TypeError, 'must be ints'),
    (dict(scorer='cls'), ValueError, "scorer='cls' is unknown, use one of relevance, random"),
    (dict(read='first'), ValueError, "read='first' is unknown, use one of all, last"),
    (dict(num_classes=3), TypeError, 'already built takes no num_classes'),
])
def test_wrong_arguments(keywords, error, message):
    vit = backbone()
    with pytest.raises(error, match=message):
        timm_spot.sparsify(vit, **keywords)
    assert type(vit) is VisionTransformer


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_a_default_dtype_of_the_moment_does_not_change_which_tokens_fall(dtype):
    model, x = timm_spot.sparsify(backbone(), keep_rate=0.5, scorer='random'), images()
    expected = [index.tolist() for index in model.kept_tokens(x)]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        during = [index.tolist() for index in model.kept_tokens(x)]
    finally:
        torch.set_default_dtype(default)
    assert during == expected == [index.tolist() for index in model.kept_tokens(x)]


@torch.no_grad()
def test_hooks_on_blocks_and_projections_are_called_in_each_pass():
    """Blocks that are read used to be taken apart."""
    calls = []
    for scorer, keep_rate in (('relevance', 0.5), ('norm', 0.5), ('cls-attention', 1)):
        model = timm_spot.sparsify(backbone(), keep_rate=keep_rate, scorer=scorer)
        calls.clear()
        for block in model.blocks:
            for module in (block, block.attn, block.attn.qkv, block.attn.proj):
                module.register_forward_hook(lambda *_: calls.append(1))
        model(images())
        assert len(calls) == 4 * 4
        if scorer == 'relevance':
            model.forward_masked(images())
            assert len(calls) == 2 * 4 * 4


def test_features_reach_every_parameter():
    model = timm_spot.sparsify(backbone(), 0.5).train()
    for keep_rate in (0.5, 1.):
        model.set_keep_rate(keep_rate)
        model.zero_grad()
        model.forward_features(images()).square().sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is None} == {'head.weight', 'head.bias'}
    model.set_keep_rate(0.5)
    model.zero_grad()
    sum(f.square().sum() for f in model.forward_intermediates(images(), intermediates_only=True)).backward()
    assert {name.split('.')[0] for name, p in model.named_parameters() if p.grad is None} == {'norm', 'head'}


def test_predictors_that_judge_nothing_have_a_gradient_of_zero():
    model = timm_spot.sparsify(backbone(), keep_rate=1).train()
    with torch.no_grad():
        next(model.predictors.parameters()).fill_(torch.nan)  # which must not reach the logits
    logits = model(images())
    assert torch.equal(logits, model.eval()(images()))
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.predictors.parameters())
    assert model.blocks[0].attn.qkv.weight.grad.any()


@pytest.mark.parametrize('keywords, kind', [
    (dict(block_fn=ResPostBlock), 'ResPostBlock'),
    (dict(block_fn=ParallelScalingBlock), 'ParallelScalingBlock'),
    (dict(attn_layer='diff'), 'DiffAttention'),
])
def test_other_blocks_are_refused(keywords, kind):
    with pytest.raises(ValueError, match=f'block 0 is, or attends by, a {kind}'):
        timm_spot.sparsify(backbone(**keywords))


@pytest.mark.parametrize('scorer', ['relevance', 'cls-attention', 'received-attention'])
def test_nan_in_attention_is_refused(scorer):
    x = images()
    x[1, 0, 0, 0] = torch.nan
    with torch.no_grad(), pytest.raises(ValueError, match='tokens of image 1 is NaN or infinite'):
        timm_spot.sparsify(backbone(), scorer=scorer)(x)


def test_what_cannot_be_masked():
    model = timm_spot.sparsify(backbone(global_pool='max')).train()
    with pytest.raises(ValueError, match="global_pool='max' cannot be masked"):
        model(images())
    with pytest.raises(ValueError, match="not for scorer='norm'"):
        timm_spot.sparsify(backbone(), scorer='norm').forward_masked(images())
    with pytest.raises(ValueError, match='keep_rate=1'):
        timm_spot.sparsify(backbone(), keep_rate=1).forward_masked(images())
    with pytest.raises(ValueError, match='attn_mask and is_causal'):
        timm_spot.sparsify(backbone())(images(), is_causal=True)


@pytest.mark.parametrize('scorer', ['relevance', 'random'])
def test_exports(scorer):
    model, x = timm_spot.sparsify(backbone(depth=2), scorer=scorer), images()
    with torch.no_grad():
        assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize('compiler, changes', [
    ('eager', ((32, 0.7), (48, 0.7), (48, 0.5), (24, 1))), ('inductor', ((32, 0.7), (24, 0.5)))])
@torch.no_grad()
def test_a_compiled_model_that_draws_at_three_stages_changes_its_size_and_budget(compiler, changes):
    """From the second shape on sizes are symbols to the compiler."""
    torch.compiler.reset()
    model = timm_spot.sparsify(backbone(dynamic_img_size=True), scorer='random')
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for size, keep_rate in changes:
        model.set_keep_rate(keep_rate)
        torch.testing.assert_close(compiled(images(2, size)), model(images(2, size)), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@torch.no_grad()
def test_a_compiled_model_with_predictors_changes_its_size_and_budget():
    torch.compiler.reset()
    model = timm_spot.sparsify(backbone(depth=2, dynamic_img_size=True), read='all')
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    for size, keep_rate in ((32, 0.7), (48, 0.7), (24, 0.5)):
        model.set_keep_rate(keep_rate)
        torch.testing.assert_close(compiled(images(2, size)), model(images(2, size)), atol=1e-6, rtol=1e-6)
    torch.compiler.reset()


def test_a_compiled_model_trains():
    torch.compiler.reset()
    model = timm_spot.sparsify(backbone(depth=2)).train()
    torch.compile(model, fullgraph=True, backend='eager')(images()).square().sum().backward()
    assert all(p.grad.any() for p in model.predictors.parameters())
    torch.compiler.reset()


@torch.no_grad()
def test_fx_graph_gives_the_logits():
    """Functions that an FX graph takes as they are have to be known in each module that calls them."""
    model, x = timm_spot.sparsify(backbone(depth=2)), images()
    graph = NodePathTracer(leaf_modules=get_notrace_modules(), param_shapes_constant=True).trace(model)
    assert torch.equal(torch.fx.GraphModule(model, graph)(x), model(x))


def test_onnx_at_a_fixed_keep_rate(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    model = timm_spot.sparsify(backbone(depth=2), keep_rate=0.5)
    for predictor in model.predictors:  # ties are broken alike
        torch.nn.init.zeros_(predictor.head.weight)
    path = tmp_path / 'model.onnx'
    torch.onnx.export(
        model, (images(),), str(path), dynamo=True, input_names=['images'], verbose=False,
        dynamic_shapes=({0: torch.export.Dim('batch')},))
    session = onnxruntime.InferenceSession(path)
    x = images(5)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {'images': x.numpy()})[0]), model(x), rtol=1e-4, atol=1e-4)
