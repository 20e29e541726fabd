"""Derivatives of windows beyond the first, and under torch.func."""
from __future__ import annotations

import pytest
import timm
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, vmap

from timm_spot import sample_windows

REFUSED = "second derivatives to positions do not exist under convention='patch'"


def example(k=3):
    """Two images and three positions each, some windows reaching outside, none on a kink."""
    generator = torch.Generator().manual_seed(k)
    images = torch.randn(2, 2, 7, 6, dtype=torch.float64, generator=generator)
    positions = torch.rand(2, 3, 2, dtype=torch.float64, generator=generator) * 1.2 - 0.1
    return images, positions


def energy(images, positions, k=3):
    return sample_windows(images, positions, k).pow(3).sum()


@pytest.mark.parametrize('k', [1, 2, 3])
def test_first_and_second_derivatives_to_the_images(k):
    images, positions = (x[:1] for x in example(k))
    images.requires_grad_()
    for p in (positions, positions.clone().requires_grad_()):  # by grid_sample, and by weighted pixels
        assert gradcheck(lambda x, p=p: sample_windows(x, p, k), images, fast_mode=True)
        assert gradgradcheck(lambda x, p=p: sample_windows(x, p, k), images, fast_mode=True)


def test_gradient_to_positions_has_a_derivative_to_the_images():
    images, positions = example()

    def slope(x):
        p = positions.clone().requires_grad_()
        return torch.autograd.grad(energy(x, p), p, create_graph=True)[0]

    assert gradcheck(slope, images.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize('second', [
    lambda f, p: torch.autograd.functional.hessian(f, p),
    lambda f, p: torch.autograd.functional.hvp(f, p, torch.ones_like(p)),
    lambda f, p: gradgradcheck(f, p.clone().requires_grad_()),
    lambda f, p: jacrev(grad(f))(p),
    lambda f, p: grad(lambda q: grad(f)(q).sum())(p),
], ids=['hessian', 'hvp', 'gradgradcheck', 'jacrev of grad', 'grad of grad'])
def test_second_derivatives_to_positions_are_refused(second):
    """They were wrong without a word: finite differences of the gradient gave 38 % more."""
    images, positions = example()
    with pytest.raises(RuntimeError, match=REFUSED):
        second(lambda p: energy(images, p), positions)


def test_second_derivatives_under_spot_are_right_where_torch_has_them():
    images, positions = example()
    inputs = images.requires_grad_(), positions.requires_grad_()
    try:
        assert gradgradcheck(lambda x, p: sample_windows(x, p, 3, 'spot'), inputs, fast_mode=True)
    except RuntimeError as e:  # older releases of torch refuse
        assert 'not implemented' in str(e)


@pytest.mark.parametrize('convention', ['patch', 'spot'])
def test_transforms_of_torch_func_give_autograd_s_gradients(convention):
    images, positions = example()

    def loss(x, p):
        return sample_windows(x, p, 3, convention).square().sum()

    inputs = images.clone().requires_grad_(), positions.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(grad(loss, (0, 1))(images, positions), expected)
    each = vmap(grad(lambda x, p: loss(x[None], p[None]), (0, 1)))(images, positions)
    torch.testing.assert_close(each, expected)
    # The other way round, where positions of an inner transform seem to need no gradient.
    outer = grad(lambda p: vmap(lambda x, q: loss(x[None], q[None]))(images, p).sum())(positions)
    torch.testing.assert_close(outer, expected[1])
    shared = grad(lambda p: loss(images, p))(positions[0])
    torch.testing.assert_close(shared, torch.autograd.grad(
        loss(images, leaf := positions[0].clone().requires_grad_()), leaf)[0])


def test_jacobian_is_the_symmetric_difference():
    images, positions = example()
    jacobian = jacrev(lambda p: sample_windows(images, p, 2))(positions)  # B N C k k B N 2
    for axis, size in ((0, 7), (1, 6)):
        half = torch.zeros(2, dtype=torch.float64)
        half[axis] = 0.5 / size
        difference = (sample_windows(images, positions + half, 2) - sample_windows(images, positions - half, 2)) * size
        for b in range(2):
            for n in range(3):
                torch.testing.assert_close(jacobian[b, n, ..., b, n, axis], difference[b, n])
                others = jacobian[b, n, ..., axis].clone()
                others[..., b, n] = 0.
                assert not others.any()


def tiny_model():
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', embed_dim=16, depth=1, num_heads=2, num_classes=3)
    model.blocks[0].attn.fused_attn = False  # torch has no second derivative of the fused one
    return model.double().eval()


def test_hessian_vector_product_of_a_model_to_the_images():
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    images, step = torch.randn(2, 1, 3, 24, 24, dtype=torch.float64, generator=generator)
    positions = torch.rand(1, 4, 2, generator=generator)

    def gradient(x):
        x = x.clone().requires_grad_()
        return x, torch.autograd.grad(model(x, positions).logsumexp(dim=1).sum(), x, create_graph=True)[0]

    x, g = gradient(images)
    product, = torch.autograd.grad((g * step).sum(), x)
    ahead, behind = gradient(images + 1e-4 * step)[1], gradient(images - 1e-4 * step)[1]
    difference = (ahead - behind).detach() / 2e-4
    assert difference.norm() > 1e-4
    # Its own error is about the square of the step.
    torch.testing.assert_close(product, difference, rtol=1e-4, atol=1e-6 * difference.abs().max().item())


def test_penalty_on_the_gradient_to_positions_trains_the_weights():
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 24, 24, dtype=torch.float64, generator=generator)
    positions = torch.rand(1, 4, 2, generator=generator).requires_grad_()
    weight = model.patch_embed.proj.weight

    def penalty():
        slope, = torch.autograd.grad(model(images, positions).logsumexp(dim=1).sum(), positions, create_graph=True)
        return slope.double().square().sum()

    analytic, = torch.autograd.grad(penalty(), weight)
    with torch.no_grad():
        index = divmod(analytic.flatten().abs().argmax().item(), analytic[0].numel())
        values = []
        for step in (1e-4, -2e-4):
            weight[index[0]].view(-1)[index[1]] += step
            with torch.enable_grad():
                values.append(penalty().item())
    # The gradient to float32 positions is rounded to float32.
    assert (values[0] - values[1]) / 2e-4 == pytest.approx(analytic.abs().max().item() * analytic.flatten()[
        analytic.flatten().abs().argmax()].sign().item(), rel=1e-2)


FORWARD = 'no derivatives in forward mode .* take those in reverse'


@pytest.mark.filterwarnings('ignore:.*torch.jit.script')  # torch's own, as forward mode begins
@pytest.mark.parametrize('options', [{}, dict(convention='spot'), dict(spacing=1.5)], ids=['patch', 'spot', 'sized'])
@pytest.mark.parametrize('way', [
    lambda f, x: torch.func.jvp(f, (x,), (x,)),
    lambda f, x: torch.func.jacfwd(f)(x),
    lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    lambda f, x: dual(f, x),
], ids=['jvp', 'jacfwd', 'hessian', 'forward_ad'])
def test_forward_mode_is_refused(way, options):
    """Torch names a function of its own, or one of ours, and no remedy."""
    images, positions = example()
    for derive, f in ((images, lambda x: sample_windows(x, positions, 3, **options)),
                      (positions, lambda p: sample_windows(images, p, 3, **options))):
        with pytest.raises(RuntimeError, match=FORWARD):
            way(f, derive)


def dual(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.filterwarnings('ignore:.*torch.jit.script')
def test_forward_mode_to_what_comes_after_the_windows_is_right():
    images, positions = example()
    weights = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def f(w):
        return sample_windows(images, positions, 3) * w

    out, tangent = torch.func.jvp(f, (weights,), (torch.ones_like(weights),))
    torch.testing.assert_close(out, f(weights))
    torch.testing.assert_close(tangent, sample_windows(images, positions, 3))
