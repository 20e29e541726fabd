from __future__ import annotations

import math

import pytest
import torch

from timm_spot.tasks.search.objectives import OBJECTIVES, get_objective


def test_values_by_hand():
    half, sure = torch.tensor([[0., 0.]]), torch.tensor([[math.log(3.), 0.]])  # (1/2, 1/2) and (3/4, 1/4)
    torch.testing.assert_close(OBJECTIVES['label'](sure, torch.tensor([1])), torch.tensor([math.log(4.)]))
    torch.testing.assert_close(OBJECTIVES['entropy'](half), torch.tensor([math.log(2.)]))
    # KL(full || tried) = 3/4 ln (3/4 / 1/2) + 1/4 ln (1/4 / 1/2)
    expected = torch.tensor([0.75 * math.log(1.5) + 0.25 * math.log(0.5)])
    torch.testing.assert_close(OBJECTIVES['teacher'](half, full_logits=sure), expected)
    features = torch.tensor([[1., 1.], [0., 2.]])
    torch.testing.assert_close(
        OBJECTIVES['feature'](features, torch.tensor([[2., 0.], [0., 1.]])), torch.tensor([1 - math.sqrt(0.5), 0.]))


@pytest.mark.parametrize('name', ['teacher', 'feature'])
def test_agreement_costs_nothing(name):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(OBJECTIVES[name](x, x), torch.zeros(3), rtol=0, atol=1e-6)


def test_functions_get_what_they_name():
    assert get_objective('teacher')[1] == ('logits', 'full_logits')
    assert get_objective(lambda features, index: features)[1] == ('features', 'index')
    function, keywords = get_objective(lambda x: 2 * x)
    assert keywords == ('logits',) and function(logits=3) == 6
    with pytest.raises(ValueError, match='asks for temperature, but objectives are given logits, features'):
        get_objective(lambda logits, temperature: logits)
    with pytest.raises(ValueError, match="'lable' is unknown, the objectives are label, entropy"):
        get_objective('lable')
    with pytest.raises(TypeError, match='a name or a function'):
        get_objective(3)
