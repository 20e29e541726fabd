from __future__ import annotations

import torch
from dht_golden import make_tokenizer

from timm_spot.models.dht_layers import RowwiseLinear


def test_rows_do_not_depend_on_their_number():
    """The guarantee that an image's regions do not depend on its batch: a matrix product fails this for one row."""
    torch.manual_seed(0)
    linear, rows = RowwiseLinear(8, 3), torch.randn(1000, 8)
    whole = linear(rows)
    for n in (1, 2, 3, 7, 8, 9, 31, 64, 999):
        assert torch.equal(linear(rows[:n]), whole[:n])
        assert torch.equal(linear(rows[-n:]), whole[-n:])
    torch.testing.assert_close(whole, torch.nn.functional.linear(rows, linear.weight, linear.bias))


def test_rows_are_summed_in_the_order_of_their_channels():
    """A matrix product fuses multiplication and addition, and orders them, as the processor and the size suggest."""
    torch.manual_seed(0)
    linear, rows = RowwiseLinear(8, 3), torch.randn(1000, 8)
    with torch.no_grad():
        for row, out in zip(rows[:50], linear(rows)):
            for weight, bias, value in zip(linear.weight, linear.bias, out):
                total = row[0] * weight[0]
                for i in range(1, 8):
                    total = total + row[i] * weight[i]
                assert (total + bias).item() == value.item()


def test_gradient_activation_at_and_off_zero():
    activation = make_tokenizer('released_64x64').gradact
    with torch.no_grad():
        activation.lmbda.copy_(torch.tensor([2., -2.]).view(2, 1, 1))
    x = torch.tensor([0., 0.5, -1.]).expand(1, 2, 1, 3)
    out = activation(x)
    torch.testing.assert_close(out[0, 0, 0], torch.asinh(2 * x[0, 0, 0]) / torch.asinh(torch.tensor(2.)))
    torch.testing.assert_close(out[0, 1, 0], torch.sinh(x[0, 0, 0] * torch.asinh(torch.tensor(-2.))) / -2.)
