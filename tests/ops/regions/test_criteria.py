from __future__ import annotations

import math

import pytest
import torch

from timm_spot.ops.regions.criteria import information_criterion

DF = 1 / (2 * 16 - 2 * 4)


@pytest.mark.parametrize('criterion, penalty', [
    ('aicc', 2 * DF + 2 * (DF ** 2 + DF) / (16 - DF - 1)),
    ('aic', 2 * DF),
    ('bic', math.log(16) * DF),
    ('cic', (math.log(16) + 1) * DF),
])
def test_by_hand(criterion, penalty):
    value = information_criterion(torch.full((2, 1), 0.5), torch.tensor([16]), 64, criterion, iota=5.)
    assert value.item() == pytest.approx(-(0.25 * math.log(math.pi ** 2 + 5) + penalty), rel=1e-6)


@pytest.mark.parametrize('criterion', ['aicc', 'aic', 'bic', 'cic'])
def test_one_pixel_is_worst(criterion):
    assert information_criterion(torch.zeros(3, 1), torch.tensor([1]), 64, criterion).item() == -math.inf


def test_unknown():
    with pytest.raises(ValueError, match="'mdl' is unknown, use one of 'aicc'"):
        information_criterion(torch.zeros(3, 1), torch.tensor([4]), 64, 'mdl')
