from __future__ import annotations

import torch
from torch import nn

from timm_spot.models._shallow import shallow_copy


def test_weights_are_shared_settings_are_not():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.budget = 4
    copied = shallow_copy(model)
    copied.budget = 9
    assert model.budget == 4 and copied[0] is model[0]
    with torch.no_grad():
        model[0].weight.zero_()
    assert copied[0].weight.abs().sum() == 0


def test_children_are_exchanged_in_the_copy_only():
    model, other = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 3)
    copied = shallow_copy(model, **{'0': other})
    assert copied[0] is other and model[0] is not other
    copied.extra = nn.Linear(1, 1)
    assert 'extra' not in dict(model.named_children())
