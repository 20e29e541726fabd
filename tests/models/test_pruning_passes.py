from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from timm_spot.models.merging import Carried
from timm_spot.models.pruning_passes import drop_tokens, make_plan, mask_tokens


@pytest.fixture
def vit():
    """Two prefix tokens, 16 image tokens, 4 blocks."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=8, depth=4, num_heads=2, num_classes=3, reg_tokens=1).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model


def tokens(*norms):
    """Two prefix tokens, larger than all others, and image tokens of these norms."""
    x = torch.randn(1, 2 + len(norms), 8, generator=torch.Generator().manual_seed(0))
    return x / x.norm(dim=2, keepdim=True) * torch.tensor([100., 100., *norms])[:, None]


@pytest.mark.parametrize('read, scorer, before', [
    ('last', 'relevance', [(0,), (3,)]),
    ('all', 'relevance', [(0,), (1, 2, 3)]),
    ('all', 'cls-attention', [(0,), (3,)]),
    ('last', 'received-attention', [(0,), (3,)]),
    ('all', 'norm', [(), ()]),
    ('all', 'random', [(), ()]),
])
def test_blocks_that_are_read(read, scorer, before):
    plan = make_plan(6, (1, 4), scorer, read)
    assert plan.read_before == before and plan.read_blocks == tuple(i for blocks in before for i in blocks)


def test_default_stages():
    assert [make_plan(depth).stages for depth in (2, 3, 4, 5, 12, 24)] == [
        (1,), (1, 2), (1, 2, 3), (1, 2, 3), (3, 6, 9), (6, 12, 18)]


@pytest.mark.parametrize('arguments, error, message', [
    (dict(depth=1), ValueError, r'to 0 \(the model has 1 blocks\)'),
    (dict(depth=4, stages=(4,)), ValueError, r'stages=\(4,\) must be .* to 3'),
    (dict(depth=4, stages=(True,)), TypeError, 'must be ints'),
    (dict(depth=4, read='none'), ValueError, "read='none' is unknown"),
])
def test_plans_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        make_plan(**arguments)


@torch.no_grad()
def test_tokens_fall_in_front_of_the_block_and_prefix_tokens_never(vit):
    seen = []
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = tokens(1, 5, 3, 5, 2, 5)
    # Block 0 does nothing, so that the norms of stage 1 are known.
    for p in (*vit.blocks[0].attn.proj.parameters(), *vit.blocks[0].mlp.fc2.parameters()):
        p.zero_()
    dropped = drop_tokens(vit, Carried(x), make_plan(4, (1, 3), 'norm'), counts=(4, 2), take=(0, 3))
    assert dropped.kept[0].tolist() == [[1, 2, 3, 5]]  # ascending
    assert torch.equal(seen[1], x[:, [0, 1, 3, 4, 5, 7]])
    assert [s.shape[1] for s in seen] == [8, 6, 6, 4]
    assert set(dropped.kept[1][0].tolist()) < {1, 2, 3, 5} and dropped.kept[1].shape == (1, 2)
    left = [2 + [1, 2, 3, 5].index(i) for i in dropped.kept[1][0].tolist()]
    torch.testing.assert_close(seen[3], vit.blocks[2](seen[2])[:, [0, 1, *left]])
    assert torch.equal(dropped.last.tokens, dropped.taken[1].tokens) and torch.equal(dropped.taken[0].tokens, seen[0])


@torch.no_grad()
def test_of_equally_good_tokens_the_first_stay(vit):
    for p in (*vit.blocks[0].attn.proj.parameters(), *vit.blocks[0].mlp.fc2.parameters()):
        p.zero_()
    x = tokens(1, 1, 1, 1, 1)
    x[:, 2:] = x[:, 2:3]  # the very same, so that no rounding tells them apart
    assert drop_tokens(vit, Carried(x), make_plan(4, (1,), 'norm'), counts=(3,)).kept[0].tolist() == [[0, 1, 2]]


@torch.no_grad()
def test_stages_of_a_random_scorer_draw_for_their_own_count(vit):
    plan = make_plan(4, (1, 2), 'random', scorer_seed=3)
    dropped = drop_tokens(vit, Carried(tokens(*range(1, 9))), plan, counts=(4, 2))
    # random.Random(3): .238 .544 .370 .604 .626 .066 .013 .837; of four .238 .544 .370 .604
    assert dropped.kept[0].tolist() == [[1, 3, 4, 7]]
    assert dropped.kept[1].tolist() == [[3, 7]]


@torch.no_grad()
def test_only_the_blocks_asked_for_run(vit):
    x = tokens(*range(1, 9))
    dropped = drop_tokens(vit, Carried(x), make_plan(4, (1, 3), 'norm'), counts=(4, 2), n_blocks=2)
    assert len(dropped.kept) == 1 and dropped.last.tokens.shape == (1, 2 + 4, 8)


@torch.no_grad()
def test_tokens_are_merged_and_dropped_on_one_way(vit):
    """Block 1 merges two of eight, then three of the six left stay, and block 2 merges one of them."""
    vit.blocks[0].attn.proj.weight.zero_()
    x = Carried(tokens(*range(1, 9)), sources=torch.arange(8)[None])
    dropped = drop_tokens(vit, x, make_plan(4, (2,), 'norm', r=(0, 2, 1, 0)), (3,), merges={1: 2, 2: 1}, take=(0, 1, 2))
    assert [taken.tokens.shape[1] for taken in dropped.taken] == [10, 8, 4]
    assert [taken.sizes is None for taken in dropped.taken] == [True, False, False]
    for taken, held in zip(dropped.taken[1:], (8, None)):
        counts = torch.bincount(taken.sources[taken.sources >= 0], minlength=taken.tokens.shape[1] - 2)
        assert counts.tolist() == taken.sizes[0, 2:].tolist() and taken.sizes[0, :2].tolist() == [1, 1]
        assert held is None or counts.sum() == held
    best = dropped.taken[1].tokens[0, 2:].norm(dim=1).topk(3).indices
    assert dropped.kept[0][0].tolist() == sorted(best.tolist())
    assert (dropped.last.sources < 0).sum() == 8 - dropped.taken[1].sizes[0, 2 + best].sum()
    assert torch.equal(dropped.last.sizes, dropped.taken[2].sizes)


@torch.no_grad()
def test_tokens_masked_are_keys_no_more_from_their_stage_on(vit):
    x = tokens(1, 5, 3, 5, 2, 5)
    masks = torch.tensor([[[1., 1., 0., 1., 0., 1.], [1., 0., 0., 1., 0., 0.]]])
    out, returned = mask_tokens(vit, x, make_plan(4, (1, 3), 'norm'), 0.5, masks=masks)
    assert torch.equal(returned, masks)
    left = vit.blocks[0](x)[:, [0, 1, 2, 3, 5, 7]]
    left = vit.blocks[3](vit.blocks[2](vit.blocks[1](left))[:, [0, 1, 2, 4]])
    torch.testing.assert_close(out[:, [0, 1, 2, 5]], left, atol=1e-4, rtol=1e-4)  # masked attention is never fused
