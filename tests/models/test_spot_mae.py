from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

import timm_spot
from timm_spot.models import Reconstruction

NAME = 'spot_mae_vit_pico_patch8_64'


def create(**kwargs):
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**dict(depth=1, embed_dim=32, num_heads=2, decoder_depth=1), **kwargs})


def test_a_quarter_is_seen_the_rest_reconstructed():
    model = create().train()
    images = torch.randn(2, 3, 64, 64)
    result = model(images)
    assert result.kept.shape == (2, 16, 2) and result.dropped.shape == (2, 48, 2)
    assert result.predicted.shape == result.target.shape == (2, 48, 3 * 8 * 8)
    torch.testing.assert_close(result.loss, (result.predicted - result.target).square().mean())
    result.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_targets_are_the_normalised_pixels_of_the_dropped_windows():
    images = torch.zeros(1, 3, 64, 64)
    images[:, 0] = 1.  # in each window 64 ones and 128 zeros: mean 1 / 3, unbiased variance (2 / 9) 192 / 191
    positions = torch.tensor([[0.25, 0.25], [0.5, 0.5], [0.75, 0.5], [0.5, 0.75]])
    result = create().eval()(images, positions)
    high, low = (2 / 3) / (2 / 9 * 192 / 191) ** 0.5, (-1 / 3) / (2 / 9 * 192 / 191) ** 0.5
    expected = torch.tensor([high] * 64 + [low] * 128).expand(1, 3, -1)
    torch.testing.assert_close(result.target, expected, rtol=1e-4, atol=1e-4)
    everything = torch.cat([result.kept, result.dropped], dim=1)[0]
    assert sorted(everything.tolist()) == sorted(positions.tolist())


def test_the_prediction_never_sees_the_dropped_windows():
    model = create().eval()
    images = torch.randn(1, 3, 64, 64)
    grid = timm_spot.sample_positions('grid', 64, (64, 64), window=8)
    first = model(images, grid)
    changed = images.clone()
    for y, x in (first.dropped[0] * 64).tolist():
        changed[:, :, round(y) - 4:round(y) + 4, round(x) - 4:round(x) + 4] = torch.randn(3, 8, 8)
    second = model(changed, grid)
    assert torch.equal(first.predicted, second.predicted)
    assert not torch.allclose(first.target, second.target)


def test_the_decoder_knows_where_each_dropped_window_lay():
    model = create().eval()
    predicted = model(torch.randn(1, 3, 64, 64)).predicted[0]
    assert (predicted[1:] - predicted[0]).abs().amax(dim=1).min() > 1e-4


def test_eval_is_one_draw_for_all_images():
    model = create().eval()
    images = torch.randn(3, 3, 64, 64)
    whole, part = model(images), model(images[1:2])
    assert torch.equal(whole.dropped[1:2], part.dropped)
    torch.testing.assert_close(whole.predicted[1:2], part.predicted)
    assert torch.equal(whole.loss, model(images).loss)
    model.train()
    assert not torch.equal(model(images).dropped[0], model(images).dropped[0])


def test_encoder_loads_strictly_into_the_model_it_was_made_for(tmp_path):
    model = create()
    file = tmp_path / 'encoder.safetensors'
    save_file(model.encoder_state_dict(), file)
    keywords = dict(depth=1, embed_dim=32, num_heads=2)
    plain = timm.create_model('spot_vit_pico_patch8_64', num_classes=0, **keywords)
    plain.load_state_dict(model.encoder_state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    model.encoder.set_placement(sampler='isotropic')
    torch.testing.assert_close(plain.eval()(images), model.encoder.eval()(images))
    # What timm's train.py --pretrained-path does; the head is fresh.
    overlay = dict(file=str(file), num_classes=-1)
    tuned = timm.create_model(
        'spot_vit_pico_patch8_64', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, **keywords)
    assert torch.equal(tuned.blocks[0].attn.qkv.weight, model.encoder.blocks[0].attn.qkv.weight)
    assert tuned.head.weight.shape == (7, 32)


def test_base_model_is_one_of_timm_s():
    model = timm.create_model('spot_mae_vit_base_patch16', device='meta')
    encoder = timm.create_model('spot_vit_base_patch16_mae', num_classes=0, device='meta')
    shapes = {key: value.shape for key, value in model.encoder_state_dict().items()}
    assert shapes == {key: value.shape for key, value in encoder.state_dict().items()}
    assert len(model.decoder_blocks) == 8
    names = {name for name, _ in model.named_parameters()}
    assert 'mask_token' in model.no_weight_decay() and 'encoder.cls_token' in model.no_weight_decay() & names


@pytest.mark.parametrize('keywords, says', [
    (dict(mask_ratio=1.), r'mask_ratio=1.0 must lie between 0 and 1'),
    (dict(encoder='spot_vit_tiny_patch16_in21k'), "pools 'token'"),
    (dict(coverage=1.), "sampler='uniform' at coverage=1.0 asks for sizes: the decoder reconstructs windows of single"),
    (dict(sampler='coarse+uniform'), r"sampler='coarse\+uniform' at coverage=0.0 asks for sizes"),
])
def test_unsuitable_models(keywords, says):
    with pytest.raises(ValueError, match=says):
        create(**keywords)


def test_budgets_that_leave_nothing():
    with pytest.raises(ValueError, match='keeps 0 of 3 tokens'):
        create(n_tokens=3)(torch.randn(1, 3, 64, 64))


def test_picture():
    pytest.importorskip('matplotlib').use('Agg')
    import matplotlib.pyplot as plt

    image = torch.rand(1, 3, 64, 64)
    positions = timm_spot.sample_positions('grid', 64, (64, 64), window=8)
    result = create().eval()(image, positions)
    perfect = Reconstruction(result.loss, result.target, *result[2:])
    axes = timm_spot.draw_reconstruction(image, perfect)
    whole, seen, made = (ax.images[0].get_array() for ax in axes)
    opaque = seen[..., 3] == 1.
    assert opaque.sum() == 16 * 64 and (made[..., 3] == 1.).all()
    torch.testing.assert_close(
        torch.tensor(seen[opaque][:, :3]), torch.tensor(whole[opaque]).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        torch.tensor(made[..., :3]), torch.tensor(whole).double(), atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match='index=1 does not exist'):
        timm_spot.draw_reconstruction(image, result, index=1)
    with pytest.raises(ValueError, match='has other channels'):
        timm_spot.draw_reconstruction(image[:, :1], result)
    plt.close('all')


def test_sizes_are_refused_and_not_dropped():
    model, images = create(), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r'positions of shape \(1, 8, 4\) must be \(y, x\) alone: the decoder'):
        model(images, torch.rand(1, 8, 4))
    model.encoder.set_placement(coverage=1.)
    with pytest.raises(ValueError, match=r'at coverage=1\.0 asks for sizes'):
        model(images)
