from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope, LayerNorm
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Block

from timm_spot.models._shallow import shallow_copy
from timm_spot.models.attention import mask_keys, read_block, tap_attention

LAYERS = {
    'plain': dict(qkv_bias=True),
    'qk_norm': dict(qk_norm=True, norm_layer=LayerNorm),
    'scale_norm': dict(scale_norm=True, norm_layer=LayerNorm),
    'gated': dict(gated=True),
    'wide heads': dict(attn_head_dim=12),
}


def randomised(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / 2)
    return module.eval()


def layer(**kwargs):
    return randomised(Attention(16, num_heads=2, **kwargs))


def block(**kwargs):
    return randomised(Block(16, num_heads=2, init_values=0.5, **kwargs))


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('fused', [True, False])
@torch.no_grad()
def test_output_is_that_of_the_layer_fused_or_not(kind, fused):
    attn = layer(**LAYERS[kind])
    attn.fused_attn = fused
    x = torch.randn(2, 5, 16)
    output, attention = read_block(attn, x)
    torch.testing.assert_close(output, attn(x), rtol=1e-4, atol=1e-5)  # fused attention sums in another order
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 2, 5))
    assert attn.fused_attn == fused


@torch.no_grad()
def test_the_matrix_is_the_softmax_of_queries_and_keys():
    source, x = block(), torch.randn(2, 5, 16)
    q, k, _ = source.attn.qkv(source.norm1(x)).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = torch.einsum('bhic,bhjc->bhij', q, k).div(8 ** 0.5).softmax(dim=-1)
    output, attention = read_block(source, x)
    torch.testing.assert_close(attention, expected)
    torch.testing.assert_close(output, source(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('attn', [AttentionRope(16, num_heads=2), EvaAttention(16, num_heads=2, norm_layer=LayerNorm)])
@torch.no_grad()
def test_attention_of_other_families_is_read_with_their_own_arguments(attn):
    randomised(attn)
    x, rope = torch.randn(1, 5, 16), torch.randn(4, 16)
    tapped, taps = tap_attention(attn)
    torch.testing.assert_close(tapped(x, rope=rope), attn(x, rope=rope), rtol=1e-4, atol=1e-5)
    assert taps[0].matrix.shape == (1, 2, 5, 5)
    torch.testing.assert_close(taps[0].matrix.sum(dim=-1), torch.ones(1, 2, 5))


@pytest.mark.parametrize('kind', LAYERS)
@torch.no_grad()
def test_a_masked_token_is_as_if_it_were_not_there(kind):
    attn = layer(**LAYERS[kind])
    x = torch.randn(1, 6, 16)
    left = torch.tensor([1., 1., 0., 1., 0., 1.])
    output, attention = read_block(attn, x, left[None])
    expected, expected_attention = read_block(attn, x[:, left.bool()])
    torch.testing.assert_close(output[:, left.bool()], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention[:, :, left.bool()][..., left.bool()], expected_attention)
    assert attention[..., ~left.bool()].abs().max() == 0


@torch.no_grad()
def test_each_image_has_a_mask_of_its_own():
    attn, x = layer(), torch.randn(2, 4, 16)
    keys = torch.tensor([[1., 1., 1., 1.], [1., 0., 1., 1.]])
    output, attention = read_block(attn, x, keys)
    torch.testing.assert_close(output[:1], read_block(attn, x[:1])[0])
    assert attention[0].min() > 0 and (attention[1] == 0).sum() == 2 * 4


def test_gradient_of_a_mask_where_it_is_zero():
    attention = torch.tensor([0.3, -1., 2., 0.], dtype=torch.float64).softmax(dim=0).expand(1, 1, 1, 4)
    keys = torch.tensor([[1., 0., 1., 0.]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: mask_keys(attention, k), keys)
    gradient = torch.autograd.grad(mask_keys(attention, keys)[..., 0].sum(), keys)[0][0]
    assert gradient[1] < 0 and gradient[3] < 0  # either token would have taken from the first


def test_a_masked_score_far_above_the_others_does_no_harm():
    scores = torch.tensor([0., 60., 1.], requires_grad=True)
    keys = torch.tensor([[1., 0., 1.]], requires_grad=True)
    weights = mask_keys(scores.softmax(dim=0)[None, None, None], keys).flatten()
    torch.testing.assert_close(weights, torch.tensor([1 / (1 + torch.e), 0., torch.e / (1 + torch.e)]))
    weights[0].backward()
    assert scores.grad.isfinite().all() and keys.grad.isfinite().all()


def test_masked_keys_that_hold_all_of_the_attention_leave_no_nan():
    scores = torch.tensor([0., 1e4, 1.], requires_grad=True)
    keys = torch.tensor([[1., 0., 1.]], requires_grad=True)
    weights = mask_keys(scores.softmax(dim=0)[None, None, None], keys)
    weights.sum().backward()
    assert weights.isfinite().all() and scores.grad.isfinite().all() and keys.grad.isfinite().all()


@torch.no_grad()
def test_hooks_of_every_module_are_at_work():
    source, x = block(), torch.randn(1, 5, 16)
    modules = dict(source.named_modules())
    seen = {True: set(), False: set()}
    reading = False
    for name, module in modules.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen[reading].add(name))
    source(x)
    source.attn.fused_attn = False  # fused attention does not call its dropout
    source(x)
    reading = True
    read_block(source, x)
    assert seen[True] == seen[False] and {'', 'attn', 'attn.qkv', 'attn.proj', 'mlp.fc1'} <= seen[True]


def test_adapters_in_the_place_of_a_projection_are_called_and_trained():
    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down, self.up = torch.nn.Linear(16, 2, bias=False), torch.nn.Linear(2, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    source, x = block(), torch.randn(1, 5, 16)
    before = read_block(source, x)[1]
    source.attn.qkv = Adapter(source.attn.qkv)
    output, attention = read_block(source, x, torch.ones(1, 5))
    output.sum().backward()
    assert not torch.allclose(attention, before)
    assert source.attn.qkv.up.weight.grad.any() and source.attn.qkv.down.weight.grad.any()


@torch.no_grad()
def test_reading_leaves_the_block_as_it_is():
    source = block(attn_drop=0.3)
    before, state = copy.deepcopy(source), dict(source.state_dict(keep_vars=True))
    tapped, _ = tap_attention(source)
    assert tapped.attn.qkv is source.attn.qkv and tapped.mlp is source.mlp and tapped.attn is not source.attn
    read_block(source, torch.randn(1, 5, 16))
    assert str(source) == str(before) and source.attn.fused_attn == before.attn.fused_attn
    assert all(value is state[name] for name, value in source.state_dict(keep_vars=True).items())


def test_dropout_of_attention_is_at_work_in_train_mode_and_not_in_the_matrix():
    source, x = block(attn_drop=0.5).train(), torch.randn(1, 64, 16)
    torch.manual_seed(0)
    first, attention = read_block(source, x)
    second, again = read_block(source, x)
    assert not torch.allclose(first, second) and torch.equal(attention, again) and attention.min() > 0


def test_every_attention_layer_of_a_block_is_read_and_one_without_is_refused():
    parallel = timm.models.vision_transformer.ParallelThingsBlock(16, num_heads=2, num_parallel=2)
    tapped, taps = tap_attention(parallel)
    tapped(torch.randn(1, 5, 16))
    assert [tap.matrix.shape for tap in taps] == [(1, 2, 5, 5)] * 2
    with pytest.raises(TypeError, match='Mlp has attention of its own'):
        tap_attention(timm.layers.Mlp(16))


def test_a_copy_shares_weights_and_keeps_what_is_changed_to_itself():
    source = block()
    other = shallow_copy(source, mlp=torch.nn.Identity())
    other.note = 3
    assert other.attn is source.attn and other.norm1.weight is source.norm1.weight
    assert isinstance(other.mlp, torch.nn.Identity) and isinstance(source.mlp, timm.layers.Mlp)
    assert not hasattr(source, 'note') and type(other) is Block


@torch.no_grad()
def test_a_block_compiled_in_place_is_read_all_the_same():
    source, x = block(), torch.randn(1, 5, 16)
    expected = read_block(source, x)
    source.compile(backend='eager')
    torch.testing.assert_close(read_block(source, x), expected)
