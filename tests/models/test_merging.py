from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models._features_fx import get_notrace_modules
from timm.models.vision_transformer import VisionTransformer
from torchvision.models.feature_extraction import NodePathTracer

import timm_spot
from timm_spot.models.merging import Carried, drop_carried, merge_block, merge_seen, pool_weighted
from timm_spot.models.pruning_scorers import SCORERS
from timm_spot.ops.merging import Matching

BACKBONES = {
    'class token': dict(),
    'registers': dict(reg_tokens=3),
    'mean': dict(global_pool='avg'),
    'mean with prefix': dict(global_pool='avg', pool_include_prefix=True),
    'no class token': dict(class_token=False, global_pool='avg'),
    'registers, no class token': dict(class_token=False, reg_tokens=2, global_pool='avg'),
    'attention pool': dict(class_token=False, global_pool='map'),
    'largest and mean': dict(global_pool='avgmax'),
    'LayerScale and qk_norm': dict(init_values=0.5, qk_norm=True),
}


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


def merged_by_hand(vit, image, r, similarity=2.):
    """The paper's words, token by token, of one image: its tokens (lists of the image's that each stands for) and x.

    Tokens that stand for several are put before the attention as often as they stand for one.
    """
    n_prefix = vit.num_prefix_tokens
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]
    held = [[None]] * n_prefix + [[i] for i in range(len(x) - n_prefix)]
    for block, n_merged in zip(vit.blocks, r):
        owner = [i for i, tokens in enumerate(held) for _ in tokens]
        first = [owner.index(i) for i in range(len(held))]
        y = block.norm1(x)
        x = x + block.ls1(block.attn(y[owner][None])[0][first])
        keys = block.attn.qkv(y).unflatten(1, (3, block.attn.num_heads, -1))[:, 1]
        keys = torch.nn.functional.normalize(block.attn.k_norm(keys).mean(dim=1), dim=1)
        ours, others = ([i for i in range(n_prefix, len(x)) if i % 2 == odd] for odd in (0, 1))
        best = {i: max((keys[i] @ keys[j]).item() for j in others) for i in ours}
        n_merged = max(min(n_merged, (len(x) - n_prefix) // 2), sum(cosine >= similarity for cosine in best.values()))
        if n_merged:
            partner = {i: max(others, key=lambda j: keys[i] @ keys[j]) for i in ours}
            ranked = sorted(ours, key=lambda i: -best[i])
            left = sorted(ranked[n_merged:]) if n_prefix else ranked[n_merged:]
            groups = {j: [j, *(i for i in ranked[:n_merged] if partner[i] == j)] for j in others}
            order = [[i] for i in (*range(n_prefix), *left)] + [groups[j] for j in others]
            x = torch.stack([
                sum(x[i] * len(held[i]) for i in group) / sum(len(held[i]) for i in group) for group in order])
            held = [[token for i in group for token in held[i]] for group in order]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return held, vit.norm(x)


@pytest.mark.parametrize('kind', BACKBONES)
@pytest.mark.parametrize('r', [(3,) * 4, (0, 9, 1, 2)])
@torch.no_grad()
def test_tokens_sources_and_logits_are_those_of_the_paper(kind, r):
    vit = backbone(**BACKBONES[kind])
    model, n_prefix = timm_spot.sparsify(vit, scorer='merge', r=list(r)), vit.num_prefix_tokens
    features, sources, logits = model.forward_features(images()), model.token_sources(images()), model(images())
    for i, image in enumerate(images()):
        held, expected = merged_by_hand(vit, image, r)
        torch.testing.assert_close(features[i], expected, atol=1e-4, rtol=1e-4)
        assert sources[i].tolist() == [
            next(k for k, tokens in enumerate(held[n_prefix:]) if token in tokens) for token in range(16)]
        repeated = expected[[k for k, tokens in enumerate(held) for _ in tokens]][None]
        torch.testing.assert_close(logits[i:i + 1], vit.forward_head(repeated), atol=1e-4, rtol=1e-4)
    assert sources.dtype == torch.int64


@pytest.mark.parametrize('kind', BACKBONES)
@torch.no_grad()
def test_pairs_as_alike_as_asked_are_merged_whatever_the_neighbours(kind):
    vit, x = backbone(**BACKBONES[kind]), images()
    model, n_prefix = timm_spot.sparsify(vit, scorer='merge', similarity=0.55), vit.num_prefix_tokens
    features, sources, logits = model.forward_features(x), model.token_sources(x), model(x)
    maps = model.forward_intermediates(x, norm=True, intermediates_only=True)[-1]
    counts = []
    for i, image in enumerate(x):
        held, expected = merged_by_hand(vit, image, (0,) * 4, 0.55)
        counts.append(len(held))
        last = expected[-1:].expand(features.shape[1] - len(held), -1)  # repeated behind those of other images
        torch.testing.assert_close(features[i], torch.cat([expected, last]), atol=1e-4, rtol=1e-4)
        assert sources[i].tolist() == [
            next(k for k, tokens in enumerate(held[n_prefix:]) if token in tokens) for token in range(16)]
        torch.testing.assert_close(maps[i].flatten(1).T, expected[n_prefix:][sources[i]], atol=1e-4, rtol=1e-4)
        repeated = expected[[k for k, tokens in enumerate(held) for _ in tokens]][None]
        torch.testing.assert_close(logits[i:i + 1], vit.forward_head(repeated), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[i:i + 1], model(image[None]), atol=1e-5, rtol=1e-5)
    assert len(set(counts)) > 1 and features.shape[1] == max(counts)


@torch.no_grad()
def test_nothing_alike_leaves_the_backbone():
    vit, x = backbone(), images()
    torch.testing.assert_close(timm_spot.sparsify(vit, scorer='merge', similarity=1)(x), vit(x), atol=1e-6, rtol=1e-6)
    all_alike = timm_spot.sparsify(vit, scorer='merge', similarity=-1.)
    assert all_alike.forward_features(x).shape[1] == 1 + 1 and all_alike(x).isfinite().all()  # 16, 8, 4, 2, 1


def test_graphs_cannot_hold_counts_that_depend_on_the_image():
    model, x = timm_spot.sparsify(backbone(), scorer='merge', similarity=0.6), images()
    message = r'similarity=0.6: how many tokens .* set_merging\(r\) first'
    with pytest.raises(ValueError, match=message):
        torch.export.export(model, (x,))
    with pytest.raises(ValueError, match=message):
        NodePathTracer(leaf_modules=get_notrace_modules(), param_shapes_constant=True).trace(model)
    with pytest.raises(ValueError, match=message):
        model.to('meta')(x.to('meta'))
    torch.compiler.reset()
    model = timm_spot.sparsify(backbone(), scorer='merge', similarity=0.6)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(model, fullgraph=True, backend='eager')(x)
    torch.compiler.reset()


@pytest.mark.parametrize('name', [
    'vit_small_patch14_dinov2', 'vit_small_patch14_reg4_dinov2', 'vit_base_patch16_siglip_224',
    'deit3_small_patch16_224', 'vit_base_patch16_clip_224', 'vit_base_patch32_clip_quickgelu_224',
    'vit_medium_patch16_reg4_gap_256',
    'vit_base_patch16_224_miil', 'samvit_base_patch16'])
@torch.no_grad()
def test_vits_of_every_kind_merge_as_the_paper_says_or_are_refused_by_name(name):
    patch = 14 if 'patch14' in name else 32 if 'patch32' in name else 16
    small = dict(img_size=4 * patch, depth=2, embed_dim=32, num_heads=2)
    vit = timm.create_model(name, num_classes=5, **small).eval()
    if not isinstance(vit, VisionTransformer):
        with pytest.raises(ValueError, match=f'^{name} cannot be sparsified: it is a VisionTransformerSAM'):
            timm_spot.sparsify(vit, scorer='merge', r=3)
        return
    for p in vit.parameters():
        p.add_(0.3 * torch.randn_like(p))
    model, x = timm_spot.sparsify(vit, scorer='merge', r=3), images(2, 4 * patch)
    features, logits = model.forward_features(x), model(x)
    for i, image in enumerate(x):
        held, expected = merged_by_hand(vit, image, (3, 3))
        torch.testing.assert_close(features[i], expected, atol=1e-3, rtol=1e-3)
        repeated = expected[[k for k, tokens in enumerate(held) for _ in tokens]][None]
        torch.testing.assert_close(logits[i:i + 1], vit.forward_head(repeated), atol=1e-3, rtol=1e-3)
    assert model.forward_intermediates(x, intermediates_only=True)[-1].shape == (2, 32, 4, 4)


@torch.no_grad()
def test_placed_tokens_with_sizes_are_merged(pico):
    """How large a window is has no part in it: a token counts as one of the image's whatever it covers."""
    model, x = timm_spot.sparsify(pico, scorer='merge', r=2), torch.rand(2, 3, 64, 64)
    positions = timm_spot.sample_positions('sobol', 20, (64, 64), batch_size=2)
    sized = torch.cat([positions, 1 + 2 * torch.rand(2, 20, 2)], dim=2)
    for placement in (positions, sized):
        sources = model.token_sources(x, positions=placement)
        assert sources.max() + 1 == 20 - 5 * 2 and model(x, positions=placement).isfinite().all()
        assert model.forward_intermediates(
            x, positions=placement, output_fmt='NLC', unmerge=True)[1][-1].shape == (2, 20, pico.embed_dim)
    assert not torch.equal(model(x, positions=positions), model(x, positions=sized))


@pytest.mark.parametrize('kind', BACKBONES)
@pytest.mark.parametrize('keywords', [dict(r=0), dict(r=[0] * 4), dict(keep_rate=1)])
@torch.no_grad()
def test_nothing_to_merge_gives_the_logits_of_the_backbone_to_the_bit(kind, keywords):
    vit = backbone(**BACKBONES[kind])
    model = timm_spot.sparsify(vit, scorer='merge', **keywords)
    assert torch.equal(model(images()), vit(images()))
    assert model.token_sources(images()).tolist() == [list(range(16))] * 3


@pytest.mark.parametrize('name, r, left', [('vit_small_patch16_224', 13, 40), ('deit_base_patch16_224', 16, 10)])
def test_counts_of_known_models(name, r, left):
    with torch.device('meta'):
        model = timm_spot.sparsify(timm.create_model(name), scorer='merge', r=r).eval()
        assert model.forward_features(torch.empty(2, 3, 224, 224)).shape[1] == 1 + left


@torch.no_grad()
def test_an_image_does_not_depend_on_its_neighbours():
    model, x = timm_spot.sparsify(backbone(), scorer='merge', r=3), images()
    assert torch.equal(model.token_sources(x)[:1], model.token_sources(x[:1]))
    assert (model(x)[:1] - model(x[:1])).abs().max() < 1e-5


@torch.no_grad()
def test_attention_stays_fused_where_tokens_are_merged(monkeypatch):
    layers = []
    monkeypatch.setattr(
        Attention, 'forward', lambda self, *args, _forward=Attention.forward, **kwargs:
        layers.append(self.fused_attn) or _forward(self, *args, **kwargs))
    timm_spot.sparsify(backbone(), scorer='merge', r=3)(images())
    assert layers == [True] * 4


@torch.no_grad()
def test_fused_and_unfused_backbones_agree():
    vit, x = backbone(), images()
    fused = timm_spot.sparsify(vit, scorer='merge', r=3)
    for block in vit.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(timm_spot.sparsify(vit, scorer='merge', r=3)(x), fused(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('keywords', [dict(r=3), dict(similarity=0.55)])
def test_training_reaches_every_parameter_and_checkpoints_change_nothing(keywords):
    model, x = timm_spot.sparsify(backbone(), scorer='merge', **keywords).train(), images()
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        assert all(p.grad.any() for p in model.parameters())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('keywords', [dict(r=3), dict(keep_rate=0.6), dict(scorer='cls-attention', r=2)])
@torch.no_grad()
def test_fx_graph_gives_the_logits(keywords):
    model, x = timm_spot.sparsify(backbone(), **{'scorer': 'merge', **keywords}), images()
    graph = NodePathTracer(leaf_modules=get_notrace_modules(), param_shapes_constant=True).trace(model)
    assert torch.equal(torch.fx.GraphModule(model, graph)(x), model(x))


@pytest.mark.parametrize('keywords', [dict(r=3), dict(keep_rate=0.6), dict(scorer='cls-attention', r=2)])
@torch.no_grad()
def test_compiled_and_exported_programs_at_several_sizes(keywords):
    torch.compiler.reset()
    model = timm_spot.sparsify(backbone(dynamic_img_size=True), **{'scorer': 'merge', **keywords})
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    for size in (32, 48, 24):
        torch.testing.assert_close(compiled(images(2, size)), model(images(2, size)), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()
    torch.testing.assert_close(torch.export.export(model, (images(),)).module()(images()), model(images()))


@pytest.mark.parametrize('keywords', [dict(r=3), dict(scorer='norm', r=2)])
def test_onnx_at_a_fixed_number(keywords, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    model = timm_spot.sparsify(backbone(), **{'scorer': 'merge', **keywords})
    path = tmp_path / 'model.onnx'
    torch.onnx.export(
        model, (images(),), str(path), dynamo=True, input_names=['images'], verbose=False,
        dynamic_shapes=({0: torch.export.Dim('batch')},))
    session = onnxruntime.InferenceSession(path)
    x = images(5)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {'images': x.numpy()})[0]), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_autocast_keeps_counts_and_sizes():
    model, x = timm_spot.sparsify(backbone(), scorer='merge', r=3), images()
    with torch.autocast('cpu', torch.bfloat16):
        assert model.forward_features(x).shape[1] == 1 + 4 and model.token_sources(x).max() == 3
        logits = model(x)
    assert logits.isfinite().all() and logits.dtype == torch.bfloat16
    assert model.bfloat16()(x.bfloat16()).isfinite().all()


@torch.no_grad()
def test_a_block_is_read_where_it_merges():
    block, x = backbone().blocks[0], torch.randn(2, 9, 32)
    whole, _, none = merge_block(block, Carried(x), 2, 1)
    read, _, attention = merge_block(block, Carried(x), 2, 1, read=True)
    assert none is None and attention.shape == (2, 2, 9, 9)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 2, 9))
    torch.testing.assert_close(read.tokens, whole.tokens)


@torch.no_grad()
def test_nothing_merged_is_the_block_itself():
    block, x = backbone().blocks[0], torch.randn(2, 9, 32)
    carried, nothing, _ = merge_block(block, Carried(x), 0, 1)
    assert torch.equal(carried.tokens, block(x)) and carried.sizes is None and nothing is None
    read, _, attention = merge_block(block, Carried(x), 0, 1, read=True)
    torch.testing.assert_close(read.tokens, carried.tokens)
    assert attention.shape == (2, 2, 9, 9)


def test_dropped_tokens_take_their_sizes_along():
    x = Carried(torch.arange(10.).view(1, 5, 2), torch.tensor([[1., 2., 3., 4., 5.]]), torch.tensor([[0, 3, 3, 1, 2]]))
    tokens, sizes, sources = drop_carried(x, torch.tensor([[1, 3]]), 1)
    assert tokens[0, :, 0].tolist() == [0., 4., 8.] and sizes.tolist() == [[1., 3., 5.]]
    assert sources.tolist() == [[-1, 1, 1, 0, -1]]


def test_what_was_seen_of_merged_tokens_adds_up_or_is_averaged():
    # Of prefix and four tokens, of sizes 1, 1, 3, 1, 1, the second and the last are merged.
    matching = Matching(torch.tensor([[0, 1, 3, 2]]), torch.tensor([[4]]), torch.tensor([[3]]))
    sizes, seen = torch.tensor([[1., 1., 3., 1., 1.]]), torch.tensor([[1., 2., 3., 6.]])
    assert merge_seen(seen, sizes, matching, 1, sums=True).tolist() == [[1., 3., 8.]]
    assert merge_seen(seen, sizes, matching, 1, sums=False).tolist() == [[1., 3., 3.]]
    assert merge_seen(seen, None, matching, 1, sums=False).tolist() == [[1., 3., 4.]]
    several = torch.stack([seen, -seen], dim=2)
    assert merge_seen(several, sizes, matching, 1, sums=False).tolist() == [[[1., -1.], [3., -3.], [3., -3.]]]
    assert merge_seen(seen, sizes, None, 1, sums=True) is seen


@pytest.mark.parametrize('scorer', SCORERS)
@torch.no_grad()
def test_every_scorer_goes_with_merging(scorer):
    model = timm_spot.sparsify(backbone(), 0.5, (1, 3), scorer, 'all', r=2)
    sources = model.token_sources(images())
    assert model.forward_features(images()).shape[1] - 1 == sources.max() + 1
    assert sources.max() + 1 == (8 if scorer == 'merge' else 1)
    assert ((sources < 0).sum() == 0) == (scorer == 'merge') and model(images()).isfinite().all()


@pytest.mark.parametrize('keywords', [dict(r=3), dict(keep_rate=0.6), dict(scorer='norm', keep_rate=0.5),
                                      dict(scorer='cls-attention', keep_rate=0.7, r=2)])
@torch.no_grad()
def test_maps_at_any_rate(keywords):
    """Each token of a map is, by its source, one of those left; the dropped are as one left beside them."""
    vit = backbone(reg_tokens=1, img_size=(32, 48))
    model, x = timm_spot.sparsify(vit, **{'scorer': 'merge', **keywords}), torch.randn(3, 3, 32, 48)
    last, left = model.forward_intermediates(x, output_fmt='NLC')
    same, maps = model.forward_intermediates(x)
    assert torch.equal(last, same) and torch.equal(last, model.forward_features(x))
    assert [m.shape for m in maps] == [(3, 32, 4, 6)] * 4
    every = model.forward_intermediates(x, output_fmt='NLC', unmerge=True, intermediates_only=True)
    for tokens, shown in zip(every, maps):
        assert torch.equal(tokens, shown.flatten(2).mT)
    sources = model.token_sources(x)
    for b in range(3):
        held = sources[b] >= 0
        assert torch.equal(every[-1][b, held], left[-1][b, sources[b, held]])
        rows, columns = torch.arange(24) // 6, torch.arange(24) % 6
        for token in torch.nonzero(~held).flatten():
            distance = (rows - rows[token]) ** 2 + (columns - columns[token]) ** 2
            nearest = distance == distance[held].min()
            assert (every[-1][b, token] == every[-1][b, nearest & held]).all(dim=1).any()


@torch.no_grad()
def test_backbones_of_dense_heads():
    small = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    for keywords in (dict(scorer='merge', r=3), dict(scorer='norm', keep_rate=0.5)):
        model = timm.create_model(
            'relevance_vit', backbone='vit_tiny_patch16_224', features_only=True, out_indices=(1, 3), **keywords,
            **small)
        assert [f.shape for f in model.eval()(images())] == [(3, 32, 4, 4)] * 2
        assert model.feature_info.reduction() == [8, 8]


@torch.no_grad()
def test_off_the_grid_features_are_tokens(pico):
    model, x = timm_spot.sparsify(pico, 0.5, scorer='norm', r=2), torch.rand(2, 3, 64, 64)
    assert model.forward_intermediates(x)[1][-1].shape == (2, pico.embed_dim, 8, 8)
    positions = timm_spot.sample_positions('sobol', 20, (64, 64), batch_size=2)
    with pytest.raises(ValueError, match='form no lattice'):
        model.forward_intermediates(x, positions=positions)
    taken = model.forward_intermediates(
        x, positions=positions, output_fmt='NLC', unmerge=True, intermediates_only=True)[-1]
    left = model.forward_intermediates(x, positions=positions, output_fmt='NLC', intermediates_only=True)[-1]
    assert taken.shape == (2, 20, pico.embed_dim)
    sources = model.token_sources(x, positions=positions)
    distances = torch.cdist(positions, positions).masked_fill((sources < 0)[:, None], torch.inf)
    for b in range(2):
        assert torch.equal(taken[b], left[b, sources[b, distances[b].argmin(dim=1)]])
    model.set_placement(sampler='sobol', n_tokens=20)  # train mode draws: tokens and their places are of one draw
    assert model.train().forward_intermediates(
        x, output_fmt='NLC', unmerge=True, intermediates_only=True)[0].shape == (2, 20, pico.embed_dim)


@torch.no_grad()
def test_the_last_blocks_may_be_cut_off():
    model, x = timm_spot.sparsify(backbone(), scorer='merge', r=3), images()
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    model.prune_intermediate_layers(indices=[1])
    assert len(model.blocks) == 2
    assert torch.equal(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], expected)


def test_a_pool_without_weights_is_refused():
    vit = backbone(global_pool='prr', class_token=False)
    with pytest.raises(ValueError, match='AttentionPoolPrr pools tokens of one size only'):
        pool_weighted(vit, torch.rand(1, 16, 32), torch.ones(1, 16))
