"""The network that looks at a thumbnail once and places any number of tokens."""
from __future__ import annotations

import math
import warnings

import pytest
import timm
import torch

import timm_spot
from timm_spot.models.density_placer import FLOOR
from timm_spot.tasks.evaluation.flops import count_flops

PICO = 'spot_vit_pico_patch8_64'


@pytest.fixture
def placed():
    """A model whose placer is no longer at its start: its densities are far from even."""
    torch.manual_seed(0)
    model = timm.create_model(PICO, placer='density', n_tokens=9).eval()
    with torch.no_grad():
        model.placer.head.weight.normal_(std=0.05)
    return model


def images(batch=3, height=64, width=64, seed=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_it_starts_as_the_isotropic_lattice():
    model = timm.create_model(PICO, placer='density', n_tokens=11).eval()
    for size in ((64, 64), (40, 200)):
        even = timm_spot.sample_positions('isotropic', 11, size).expand(2, -1, -1)
        torch.testing.assert_close(model.place(images(2, *size)), even)
    model.set_placement(coverage=1.)
    even = timm.create_model(PICO, n_tokens=11, coverage=1.).eval()
    torch.testing.assert_close(model.place(images(2)), even.place(images(2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('size', [(64, 64), (32, 1024), (224, 160), (8, 8), (500, 333)])
@pytest.mark.parametrize('n_tokens', [1, 25, 64])
def test_any_size_and_budget_has_exact_counts_inside_the_image(placed, size, n_tokens):
    placed.set_placement(n_tokens=n_tokens)
    x = images(2, *size)
    x[1] = 0.3  # a constant image
    positions, density = placed.placer(x), placed.placer.density(x)
    assert positions.shape == (2, n_tokens, 2) and positions.dtype == torch.float32
    assert (positions >= 0).all() and (positions <= 1).all()
    assert density.ndim == 3 and density.dtype == torch.float32
    torch.testing.assert_close(density.sum(dim=(1, 2)), torch.ones(2))
    assert density.min() >= FLOOR / density[0].numel()
    assert density.shape[1] * density.shape[2] <= 1200  # of a thumbnail
    rows, columns = density.shape[1:]
    assert abs(math.log(rows / columns / (size[0] / size[1]))) < math.log(2.1)  # of the image's aspect


def test_a_thousand_tokens(placed):
    placed.set_placement(n_tokens=1000)
    assert placed.place(images(1)).isfinite().all() and placed.place(images(1)).shape == (1, 1000, 2)


def test_tokens_crowd_where_the_density_is_large(placed):
    placed.set_placement(n_tokens=100)
    x = images()
    density = placed.placer.density(x)
    cells = (placed.place(x) * torch.tensor(density.shape[1:])).long().clamp(max=15)
    crowd = density[torch.arange(3)[:, None], cells[..., 0], cells[..., 1]]
    assert (crowd.mean(dim=1) > 2 * density.mean(dim=(1, 2))).all()
    assert (density.amax(dim=(1, 2)) > 5 / 256).all()


def test_an_image_s_placement_does_not_depend_on_its_neighbours(placed):
    x = images()
    x[1] *= 5
    together = placed.place(x)
    assert (together[0] - together[1]).abs().max() > 0.01
    for i in range(3):
        torch.testing.assert_close(placed.place(x[i:i + 1])[0], together[i], rtol=0, atol=1e-5)
    x[1, 0, 20, 30] = math.nan  # this image alone is lost
    broken = placed.place(x)
    torch.testing.assert_close(broken[[0, 2]], together[[0, 2]], rtol=0, atol=1e-5)
    assert broken[1].isnan().all()


def test_precision_of_the_model_leaves_coordinates_exact(placed):
    x = images()
    exact = placed.place(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(placed.place(x), exact)
        assert torch.equal(placed.placer(x), exact)
    low = placed.bfloat16().place(x.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, placed.place(x.bfloat16().float()))


def test_uint8_images_reach_it_normalised(placed):
    raw = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(placed.place(raw), placed.place(placed.normalization(raw)))
    with pytest.raises(TypeError, match=r'images must be normalised floats, got torch\.uint8'):
        placed.placer(raw)


@pytest.mark.parametrize('in_chans', [1, 4])
def test_other_channels_are_seen_in_grey(placed, in_chans):
    model = timm.create_model(PICO, placer='density', n_tokens=9, in_chans=in_chans).eval()
    model.placer.load_state_dict(placed.placer.state_dict())
    x = torch.randn(2, in_chans, 64, 64)
    grey = x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(model.place(x), placed.place(grey))


def test_coverage_follows_the_stretch(placed):
    placed.set_placement(n_tokens=64, coverage=1.)
    placement = placed.place(images())
    assert placement.shape == (3, 64, 4)
    torch.testing.assert_close(placement[..., :2], placed.placer(images())[..., :2])
    sides = placement[..., 2:] * 8
    assert sides.min() < 6 and sides.max() > 16  # fine where tokens crowd, coarse elsewhere
    placed.set_placement(coverage=0.)
    assert placed.place(images()).shape == (3, 64, 2)


def test_gradients_of_the_loss_are_those_of_finite_differences(placed):
    """Through windows, inverse distribution function, density and network, in float64."""
    placed.double()
    placed.placer.double()
    # A smooth image bends little from pixel to pixel, where the windows' derivative is the mean of both sides.
    x = torch.nn.functional.interpolate(images(2, 5, 5).double(), (64, 64), mode='bicubic')
    weight = placed.placer.head.weight

    def loss():
        return placed(x, placed.placer(x)).square().sum()

    loss().backward()
    slope = weight.grad.clone()
    assert slope.abs().max() > 0
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    direction[(slope.abs() < slope.abs().max() / 10)] = 0
    step, values = 1e-4, []
    with torch.no_grad():
        for sign in (1, -1):
            weight.add_(sign * step * direction)
            values.append(loss().item())
            weight.sub_(sign * step * direction)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx((slope * direction).sum().item(), rel=0.05)


def test_every_weight_has_a_gradient_and_a_step_changes_the_placement(placed):
    model = timm.create_model(PICO, placer='density', n_tokens=(4, 16), train_only='placer').train()
    optimizer = torch.optim.AdamW(model.placer.parameters(), lr=1e-2)
    for _ in range(2):  # behind weights of zero there is no gradient yet
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        assert all(p.grad is not None for p in model.placer.parameters())
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in model.placer.parameters())
    model.eval()
    even = timm_spot.sample_positions('isotropic', 16, (64, 64))
    assert (model.place(images()) - even).abs().max() > 1e-3


def test_it_costs_little():
    plain, placed = (timm.create_model(PICO, placer=placer).eval() for placer in (None, 'density'))
    for n_tokens in (9, 16, 25):
        for model in (plain, placed):
            model.set_placement(n_tokens=n_tokens)
        assert 1. < count_flops(placed, images(1)) / count_flops(plain, images(1)) < 1.1
    assert sum(p.numel() for p in placed.placer.parameters()) == 11_300


@pytest.mark.parametrize('backend', ['eager', 'inductor'])
def test_compiled(placed, backend):
    compiled = torch.compile(placed, fullgraph=True, backend=backend)
    with torch.no_grad():
        for x in (images(), images(2, 72, 96)):
            torch.testing.assert_close(compiled(x), placed(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('coverage', [0., 1.])
def test_exported(placed, coverage):
    placed.set_placement(coverage=coverage)
    program = torch.export.export(placed, (images(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(2)), placed(images(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('size', [(64, 64), (96, 224)])
def test_onnx_takes_an_image_and_gives_logits(placed, size, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    placed.set_placement(n_tokens=16)
    x = torch.nn.functional.avg_pool2d(images(2, *size), 5, 1, 2)  # of noise, a rounding of positions shows
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the exporter itself
        torch.onnx.export(placed, (x,), tmp_path / 'model.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    logits, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), placed(x), rtol=1e-3, atol=1e-4)


def test_weights_appear_after_the_meta_device():
    model = timm.create_model(PICO, placer='density', n_tokens=9, device='meta')
    model.to_empty(device='cpu')
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    even = timm_spot.sample_positions('isotropic', 9, (64, 64))
    torch.testing.assert_close(model.eval().place(images(1)), even)


def test_layer_decay_leaves_it_the_full_learning_rate():
    from timm.optim import param_groups_layer_decay
    model = timm.create_model(PICO, placer='density')
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    assert {scale[id(p)] for p in model.placer.parameters()} == {1.}
    assert scale[id(model.blocks[0].mlp.fc1.weight)] < 0.1


def test_feature_maps_it_has_none(placed):
    with pytest.raises(ValueError, match="placer 'density' places 9 tokens on no lattice"):
        placed.forward_intermediates(images())
    assert placed.forward_intermediates(images(), output_fmt='NLC', intermediates_only=True)[-1].shape == (3, 9, 128)
