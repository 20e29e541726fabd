from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SMALL
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt

from timm_spot import OracleResult, optimize_positions, sample_positions
from timm_spot.tasks.pictures.digits import draw_canvases, load_digits, to_input


@pytest.fixture
def tiny():
    """A model of one block for 10 classes whose logits are not all alike."""
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', num_classes=10, embed_dim=32, depth=1).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


@pytest.fixture
def images():
    """Four smooth images and targets."""
    rough = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(rough, size=64, mode='bicubic')


TARGETS = torch.tensor([3, 7, 1, 0])


def one_by_one(model, images, targets, **kwargs):
    return OracleResult.concat([
        optimize_positions(model, images[i:i + 1], targets[i:i + 1], **kwargs) for i in range(len(images))])


def assert_same(a, b, **tolerance):
    for name, value in vars(a).items():
        torch.testing.assert_close(value, getattr(b, name), **(tolerance or dict(rtol=0, atol=0)))


def test_golden_search(golden):
    model = timm.create_model(
        golden['arch'], pretrained=True, pretrained_cfg_overlay=dict(state_dict=golden['authors'], num_classes=10),
        convention='spot', num_classes=10, **SMALL)
    trajectory = golden['oracle_trajectory']
    result = optimize_positions(model, golden['image'], golden['labels'], init=trajectory[:, 0])
    torch.testing.assert_close(result.trajectory, trajectory, rtol=0, atol=1e-4)
    torch.testing.assert_close(result.positions, trajectory[:, -1], rtol=0, atol=1e-4)
    torch.testing.assert_close(result.losses[:, :-1], golden['oracle_losses'], rtol=0, atol=1e-4)
    torch.testing.assert_close(result.logits_after, golden['oracle_final_logits'], rtol=0, atol=1e-4)


def test_search_by_hand(tiny, images):
    """Plain gradient descent, written out."""
    start = sample_positions('center', 5, (64, 64)).expand(4, -1, -1)
    result = optimize_positions(
        tiny, images, TARGETS, init='center', n_tokens=5, steps=2, lr=0.01, optimizer='sgd',
        optimizer_kwargs=dict(momentum=0., weight_decay=0., nesterov=False))
    positions, losses = start, []
    for _ in range(2):
        positions = positions.detach().requires_grad_()
        losses.append(F.cross_entropy(tiny(images, positions), TARGETS, reduction='none'))
        positions = positions - 0.01 * torch.autograd.grad(losses[-1].sum(), positions)[0]
    losses.append(F.cross_entropy(tiny(images, positions), TARGETS, reduction='none'))
    torch.testing.assert_close(result.positions, positions.detach())
    torch.testing.assert_close(result.losses, torch.stack(losses, dim=1).detach())
    torch.testing.assert_close(result.logits_before, tiny(images, start).detach())
    torch.testing.assert_close(result.logits_after, tiny(images, positions).detach())
    assert torch.equal(result.correct_before, tiny(images, start).argmax(dim=1) == TARGETS)
    assert torch.equal(result.correct_after, result.logits_after.argmax(dim=1) == TARGETS)


@pytest.mark.parametrize('objective', ['label', 'entropy', 'teacher', 'feature'])
def test_every_objective_falls(tiny, images, objective):
    result = optimize_positions(tiny, images, TARGETS, n_tokens=9, objective=objective, steps=10, lr=5e-3)
    assert (result.losses[:, -1] < result.losses[:, 0]).all()


def test_full_budget_is_the_patch_grid(tiny, images):
    """At the patch grid the tried placement is the teacher's own."""
    grid = sample_positions('grid', 64, (64, 64), window=8)
    for objective in ('teacher', 'feature'):
        result = optimize_positions(tiny, images, init=grid[0], objective=objective, steps=0)
        torch.testing.assert_close(result.losses, torch.zeros(4, 1), rtol=0, atol=1e-6)
        assert result.correct_before is None and result.correct_after is None


def test_objective_may_be_a_function(tiny, images):
    by_name = optimize_positions(tiny, images, TARGETS, n_tokens=4, steps=2)
    seen = []

    def of_some(logits, index):
        seen.append(index.tolist())
        return F.cross_entropy(logits, TARGETS[index], reduction='none')

    assert_same(by_name, optimize_positions(tiny, images, TARGETS, n_tokens=4, steps=2, objective=of_some))
    assert seen == [[0, 1, 2, 3]] * 3
    of_logits = optimize_positions(tiny, images, n_tokens=4, steps=1, objective=lambda x: x.logsumexp(dim=1))
    torch.testing.assert_close(of_logits.losses[:, 0], of_logits.logits_before.logsumexp(dim=1))
    with pytest.raises(ValueError, match=r'one loss for each image, a tensor of shape \(4,\)'):
        optimize_positions(tiny, images, objective=lambda x: x.mean())
    with pytest.raises(ValueError, match='do not depend on the positions'):
        optimize_positions(tiny, images, objective=lambda x: x.detach().mean(dim=1))


def test_features_of_a_model_without_classifier(tiny, images):
    tiny.reset_classifier(0)
    result = optimize_positions(tiny, images, n_tokens=4, steps=2, objective='feature')
    assert result.logits_after.shape == (4, 32)
    with pytest.raises(ValueError, match='num_classes=0'):
        optimize_positions(tiny, images, TARGETS)


# One of each kind: per element, per tensor (lars, muon, cadamw's mask), over all tensors (lamb), factored, two moments.
@pytest.mark.parametrize('optimizer', ['adamw', 'sgd', 'cadamw', 'lion', 'lamb', 'lars', 'adafactor', 'muon'])
def test_a_batch_equals_its_images_alone(tiny, images, optimizer):
    kwargs = dict(n_tokens=5, steps=3, lr=1e-2, optimizer=optimizer, init='sobol')
    together = optimize_positions(tiny, images, TARGETS, **kwargs)
    # Batches round differently, and three steps of sgd magnify that tenfold and more.
    atol = 1e-4 if optimizer == 'sgd' else 1e-5
    assert_same(together, one_by_one(tiny, images, TARGETS, **kwargs), rtol=0, atol=atol)
    assert (together.positions != together.trajectory[:, 0]).any(dim=2).all()
    assert_same(together, optimize_positions(tiny, images, TARGETS, chunk_size=3, **kwargs), rtol=0, atol=atol)


def test_eight_images_at_the_defaults(pico):
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(8)
    together = optimize_positions(pico, images, targets, n_tokens=9)
    assert_same(together, one_by_one(pico, images, targets, n_tokens=9), rtol=0, atol=1e-5)


def test_second_order_and_unknown_optimizers_are_refused(tiny, images):
    with pytest.raises(ValueError, match="'adahessian' needs second derivatives"):
        optimize_positions(tiny, images, TARGETS, optimizer='adahessian')
    with pytest.raises(ValueError, match='not found'):
        optimize_positions(tiny, images, TARGETS, optimizer='adamv')


def test_the_model_is_left_as_it_was(tiny, images):
    tiny.blocks.train()
    tiny.blocks[0].norm1.weight.requires_grad_(False)
    tiny(images).sum().backward()
    tiny.head.weight.grad = None
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    grads = {k: None if p.grad is None else p.grad.clone() for k, p in tiny.named_parameters()}
    flags = {k: p.requires_grad for k, p in tiny.named_parameters()}
    modes = {k: m.training for k, m in tiny.named_modules()}
    state = torch.get_rng_state()

    def check():
        assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
        assert all((p.grad is None) if grads[k] is None else torch.equal(p.grad, grads[k])
                   for k, p in tiny.named_parameters())
        assert flags == {k: p.requires_grad for k, p in tiny.named_parameters()}
        assert modes == {k: m.training for k, m in tiny.named_modules()}
        assert torch.equal(state, torch.get_rng_state())

    images_before = images.clone()
    start = torch.rand(4, 6, 2, generator=torch.Generator().manual_seed(1))
    start_before = start.clone()
    optimize_positions(tiny, images, TARGETS, init=start, steps=2)
    check()
    optimize_positions(tiny, images, TARGETS, init='uniform', n_tokens=4, steps=1, optimizer='lamb')
    check()
    with pytest.raises(RuntimeError, match='stop'):
        optimize_positions(tiny, images, objective=lambda logits: (_ for _ in ()).throw(RuntimeError('stop')))
    check()
    assert torch.equal(images, images_before) and torch.equal(start, start_before)


def test_works_inside_inference_mode(tiny, images):
    outside = optimize_positions(tiny, images, TARGETS, n_tokens=4, steps=2)
    with torch.inference_mode():
        assert_same(outside, optimize_positions(tiny, images + 0, TARGETS, n_tokens=4, steps=2))


def test_stochastic_starts(tiny, images):
    tiny.set_placement(n_tokens=6, sampler='uniform', seed=5)
    shared = optimize_positions(tiny, images, TARGETS, init='uniform', steps=0).positions
    assert torch.equal(shared, tiny.place(images)), 'without a generator as the model itself in eval mode'
    drawn = optimize_positions(
        tiny, images, TARGETS, init='uniform', steps=0, generator=torch.Generator().manual_seed(2)).positions
    assert torch.equal(drawn, sample_positions('uniform', 6, (64, 64), 4, generator=torch.Generator().manual_seed(2)))
    maps = torch.zeros(4, 64, 64)
    maps[:, :32, :32] = 1
    for saliency in (maps, lambda x: maps):
        salient = optimize_positions(tiny, images, TARGETS, init='salient', steps=0, saliency=saliency)
        assert (salient.positions <= 0.5).all()
    with pytest.raises(ValueError, match='needs a saliency map'):
        optimize_positions(tiny, images, TARGETS, init='salient')


def test_best_is_kept_where_the_last_is_worse(tiny, images):
    kwargs = dict(n_tokens=4, steps=6, lr=0.2)  # far too large
    last = optimize_positions(tiny, images, TARGETS, **kwargs)
    best = optimize_positions(tiny, images, TARGETS, keep='best', **kwargs)
    at = last.losses.argmin(dim=1)
    assert (at < 6).any(), 'the test needs an image whose last placement is not its best'
    assert torch.equal(best.positions, last.trajectory[torch.arange(4), at])
    loss = F.cross_entropy(best.logits_after, TARGETS, reduction='none')
    torch.testing.assert_close(loss, last.losses.amin(dim=1))
    assert torch.equal(last.positions, last.trajectory[:, -1])


@pytest.mark.parametrize('bounds', ['none', 'clamp', 'reflect'])
def test_bounds(tiny, images, bounds):
    start = torch.tensor([[0.02, 0.98], [0.5, 1.1]])
    result = optimize_positions(tiny, images, TARGETS, init=start, steps=4, lr=0.1, bounds=bounds)
    inside = (result.trajectory >= 0).all() and (result.trajectory <= 1).all()
    assert bool(inside) == (bounds != 'none')
    torch.testing.assert_close(
        result.trajectory[0, 0, 1, 1].item(), dict(none=1.1, clamp=1., reflect=0.9)[bounds], rtol=0, atol=1e-6)


def test_finished_images_leave_the_batch(tiny, images):
    sizes = []
    hook = tiny.patch_embed.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    # An objective that stops falling at another time for each image.
    fall = torch.tensor([0., 2., 5., 100.])
    count = {}

    def objective(logits, index):
        for i in index.tolist():
            count[i] = count.get(i, -1) + 1
        step = torch.tensor([float(count[i]) for i in index.tolist()])
        return -torch.minimum(step, fall[index]) + 0. * logits.sum(dim=1)

    result = optimize_positions(tiny, images, n_tokens=4, steps=8, objective=objective, patience=2)
    hook.remove()
    # Image 0 falls no more after its first value, and two steps later it is out; and so on.
    assert sizes == [4, 4, 4, 3, 3, 2, 2, 2, 1]
    torch.testing.assert_close(result.losses[1], -torch.tensor([0., 1., 2., 2., 2., 2., 2., 2., 2.]))
    assert torch.equal(result.trajectory[0, 2:], result.trajectory[0, 2].expand(7, -1, -1))
    assert count == {0: 2, 1: 4, 2: 7, 3: 8}


def test_stopping_early_changes_nothing_for_the_others(tiny, images):
    kwargs = dict(n_tokens=5, steps=12, lr=0.05, patience=1, optimizer='adamw')
    together = optimize_positions(tiny, images, TARGETS, **kwargs)
    stopped = [int((row[1:] != row[:-1]).sum()) for row in together.losses]
    assert len(set(stopped)) > 1, 'the test needs images that stop at different steps'
    assert_same(together, one_by_one(tiny, images, TARGETS, **kwargs), rtol=0, atol=1e-5)
    free = optimize_positions(tiny, images, TARGETS, **{**kwargs, 'patience': None})
    for i, n in enumerate(stopped):
        torch.testing.assert_close(together.trajectory[i, :n + 1], free.trajectory[i, :n + 1], rtol=0, atol=1e-5)


def test_tol_asks_for_a_real_fall(tiny, images):
    result = optimize_positions(tiny, images, TARGETS, n_tokens=4, steps=9, patience=3, tol=1e3)
    assert torch.equal(result.losses[:, 3:], result.losses[:, 3:4].expand(-1, 7))
    assert (result.losses[:, 3] != result.losses[:, 2]).all()


def test_callback_sees_every_step(tiny, images):
    seen = []
    result = optimize_positions(
        tiny, images, TARGETS, n_tokens=4, steps=3, chunk_size=3, record=False,
        callback=lambda *args: seen.append(args))
    assert result.trajectory is None
    assert [(step, index.tolist()) for step, index, _, _ in seen] == [
        *((step, [0, 1, 2]) for step in range(4)), *((step, [3]) for step in range(4))]
    for step, index, positions, losses in seen:
        assert positions.shape == (len(index), 4, 2) and not losses.requires_grad
        assert torch.equal(losses, result.losses[index, step])


def test_autocast_keeps_positions_and_losses_in_float32(tiny, images):
    exact = optimize_positions(tiny, images, TARGETS, n_tokens=9, steps=3)
    half = optimize_positions(tiny, images, TARGETS, n_tokens=9, steps=3, amp_dtype=torch.bfloat16)
    assert all(v.dtype == torch.float32 for k, v in vars(half).items() if not k.startswith('correct'))
    assert not torch.equal(half.logits_after, exact.logits_after)
    torch.testing.assert_close(half.losses, exact.losses, rtol=0, atol=0.1)


@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
@pytest.mark.parametrize('reentrant', [False, True])
def test_activation_checkpointing_gives_the_same_result(tiny, images, reentrant):
    kwargs = dict(n_tokens=5, steps=2)
    plain = optimize_positions(tiny, images, TARGETS, **kwargs)
    tiny.set_grad_checkpointing(True)
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(reentrant)
    try:
        assert_same(plain, optimize_positions(tiny, images, TARGETS, **kwargs), rtol=0, atol=1e-6)
    finally:
        set_reentrant_ckpt(before)


def test_nan_names_the_image(tiny, images):
    images[2, 0, 32, 32] = math.nan
    with pytest.raises(ValueError, match='the loss of image 2 is nan at step 0'):
        optimize_positions(tiny, images, TARGETS)
    with pytest.raises(ValueError, match='the loss of image 2 is nan at step 0'):
        optimize_positions(tiny, images, TARGETS, chunk_size=1)
    with pytest.raises(ValueError, match='the gradient of image 0 is nan at step 0'):
        optimize_positions(tiny, images[:1], objective=lambda logits: (0. * logits).sum(dim=1).sqrt())


@pytest.mark.parametrize('wrong, error, message', [
    (dict(targets=None), ValueError, 'needs targets, a tensor of 4 class indices'),
    (dict(targets=torch.tensor([0, 1, 10, 2])), ValueError, r'targets\[2\]=10 is no class, .* 0 to 9'),
    (dict(targets=torch.tensor([0, -1, 1, 2])), ValueError, r'targets\[1\]=-1 is no class'),
    (dict(targets=torch.tensor([0, 1])), ValueError, r'shape \(2,\) do not match 4 images'),
    (dict(targets=torch.rand(4)), TypeError, 'int64'),
    (dict(steps=-1), ValueError, 'steps=-1 must be at least 0'),
    (dict(steps=2.5), TypeError, 'steps must be an int'),
    (dict(keep='first'), ValueError, "keep='first' is unknown, use one of 'last', 'best'"),
    (dict(bounds='wrap'), ValueError, "bounds='wrap' is unknown"),
    (dict(patience=0), ValueError, 'patience=0'),
    (dict(chunk_size=0), ValueError, 'chunk_size=0'),
    (dict(init='isotropc'), ValueError, "did you mean 'isotropic'"),
    (dict(init=torch.rand(3, 9, 2)), ValueError, r'positions must have shape \(4, N, 2\)'),
    (dict(init=torch.rand(4, 9, 2), n_tokens=8), ValueError, 'n_tokens=8, but init'),
    (dict(n_tokens=0), ValueError, 'n_tokens=0'),
    (dict(n_tokens=10 ** 12), ValueError, 'n_tokens=1000000000000 is more than the 4096 pixels'),
    (dict(init=224. * torch.rand(4, 9, 2)), ValueError, r'fractions of the image, .* divide pixels by \(64, 64\)'),
    (dict(init='sampled_by_me'), ValueError, "'sampled_by_me' is unknown"),
    (dict(images=torch.rand(4, 1, 64, 64)), ValueError, r'\(4, 1, 64, 64\) have 1 channels, the model takes 3'),
    (dict(tol=math.nan), ValueError, 'tol=nan must be a finite number'),
    (dict(lr=math.inf), ValueError, 'lr=inf'),
    (dict(images=torch.rand(0, 3, 64, 64)), ValueError, 'hold no image'),
    (dict(model=torch.nn.Identity()), TypeError, 'subpixel ViT'),
])
def test_mistakes_are_refused(tiny, images, wrong, error, message):
    arguments = dict(model=tiny, images=images, targets=TARGETS, n_tokens=None)
    with pytest.raises(error, match=message):
        optimize_positions(**{**arguments, **wrong})


def held_out_canvases(model, count):
    digits, targets = load_digits('held_out')
    canvases = draw_canvases(digits[:count], torch.Generator().manual_seed(0))
    return to_input(canvases, model), targets[:count]


def test_gradient_on_the_patch_grid_has_the_sign_of_the_difference():
    """Every sample lies on a kink of the interpolation there; see benchmarks/oracle_gradient.py."""
    model = timm.create_model('spot_vit_pico_patch8_64', pretrained=True).eval()
    images, targets = held_out_canvases(model, 64)
    positions = sample_positions('grid', 16, (64, 64), 64, window=8).clone().requires_grad_()
    F.cross_entropy(model(images, positions), targets, reduction='sum').backward()
    differences = []
    with torch.no_grad():
        for i, axis in itertools.product(range(16), range(2)):
            shift = torch.zeros(16, 2)
            shift[i, axis] = 0.5 / 64
            ahead, behind = (
                F.cross_entropy(model(images, positions + sign * shift), targets, reduction='none') for sign in (1, -1))
            differences.append(ahead - behind)
    difference = torch.stack(differences, dim=1)
    # Below a tenth of an image's typical difference the curvature of the loss decides, not its slope.
    clear = difference.abs() > 0.1 * difference.square().mean(dim=1, keepdim=True).sqrt()
    agree = (difference.sign() == positions.grad.flatten(1).sign())[clear]
    assert len(agree) > 1000 and agree.float().mean() >= 0.9


def test_search_halves_the_errors_of_the_digits_model():
    model = timm.create_model('spot_vit_pico_patch8_64', pretrained=True).eval()
    images, targets = held_out_canvases(model, 64)
    result = optimize_positions(model, images, targets, n_tokens=9, steps=20, lr=1e-2)
    errors_before, errors_after = (~result.correct_before).sum(), (~result.correct_after).sum()
    assert errors_before >= 6 and errors_after <= errors_before / 2


def test_uint8_images_are_searched_as_normalised_ones():
    model = timm.create_model('spot_vit_pico_patch8_64', pretrained=True).eval()
    images, targets = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), torch.tensor([3, 7])
    keywords = dict(n_tokens=4, steps=2, init='salient', saliency='spectral_residual')
    result = optimize_positions(model, images, targets, **keywords)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    expected = optimize_positions(model, (images / 255 - mean) / std, targets, **keywords)
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-3, atol=1e-4)
