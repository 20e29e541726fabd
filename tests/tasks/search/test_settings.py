from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot.tasks.search.settings import Search, reflect


@settings(max_examples=100, deadline=None)
@given(st.floats(-6, 6, width=32))
def test_reflection_is_a_triangle_wave(x):
    period = x % 2
    expected = period if period <= 1 else 2 - period
    assert abs(reflect(torch.tensor([x])).item() - expected) < 1e-5


def test_bounds_by_hand():
    x = torch.tensor([-0.25, 0., 0.3, 1., 1.25, 2.5])
    expected = dict(none=x, clamp=torch.tensor([0., 0., 0.3, 1., 1., 1.]),
                    reflect=torch.tensor([0.25, 0., 0.3, 1., 0.75, 0.5]))
    for bounds, values in expected.items():
        bounded = Search(bounds=bounds).bound(x[:, None].expand(-1, 2))
        torch.testing.assert_close(bounded, values[:, None].expand(-1, 2), rtol=0, atol=1e-6)


def test_the_search_is_that_of_the_paper_unless_told_otherwise():
    search = Search()
    assert (search.steps, search.lr, search.keep, search.bounds, search.objective) == (5, 3e-3, 'last', 'none', 'label')
    optimizer, = search.create_optimizers([torch.zeros(3, 2, requires_grad=True)])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]['lr'] == 3e-3 and optimizer.param_groups[0]['weight_decay'] == 0.01
    optimizer, = Search(optimizer_kwargs=dict(weight_decay=0.)).create_optimizers(
        [torch.zeros(3, 2, requires_grad=True)])
    assert optimizer.param_groups[0]['weight_decay'] == 0.


@pytest.mark.parametrize('name, count', [('adamw', 1), ('sgd', 1), ('lamb', 3)])
def test_optimizers_that_mix_their_parameters_get_one_each(name, count):
    places = [torch.zeros(3, 2, requires_grad=True) for _ in range(3)]
    optimizers = Search(optimizer=name).create_optimizers(places)
    assert len(optimizers) == count
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group['params']]
    assert sorted(owned) == sorted(map(id, places))


@pytest.mark.parametrize('wrong, error, message', [
    (dict(steps=-1), ValueError, 'steps=-1 must be at least 0'),
    (dict(steps=True), TypeError, 'steps must be an int'),
    (dict(steps=10 ** 12), ValueError, 'steps=1000000000000 must be at most 100,000: every step'),
    (dict(lr=0.), ValueError, r'lr=0\.0 must be a finite number above 0'),
    (dict(lr=-1e-3), ValueError, r'lr=-0\.001'),
    (dict(lr=math.nan), ValueError, 'lr=nan must be a finite number'),
    (dict(lr='fast'), TypeError, "lr must be a number, got 'fast'"),
    (dict(lr=None), TypeError, 'lr must be a number'),
    (dict(tol=math.nan), ValueError, 'tol=nan must be a finite number'),
    (dict(tol=math.inf), ValueError, 'tol=inf'),
    (dict(tol=-1.), ValueError, r'tol=-1\.0 must be at least 0: the smallest fall'),
    (dict(patience=0), ValueError, 'patience=0 must be at least 1'),
    (dict(patience=1.5), TypeError, 'patience must be an int'),
    (dict(chunk_size=0), ValueError, 'chunk_size=0'),
    (dict(keep='first'), ValueError, "keep='first' is unknown, use one of 'last', 'best'"),
    (dict(bounds='wrap'), ValueError, "bounds='wrap' is unknown, use one of 'none', 'clamp', 'reflect'"),
    (dict(objective='lable'), ValueError, "'lable' is unknown"),
    (dict(optimizer='adamv'), ValueError, 'not found'),
    (dict(optimizer=3), TypeError, 'optimizer must be a name'),
    (dict(optimizer='adahessian'), ValueError, "'adahessian' needs second derivatives"),
    (dict(amp_dtype='bfloat16'), TypeError, "amp_dtype must be a floating-point type .*, got 'bfloat16'"),
    (dict(amp_dtype=torch.int8), TypeError, 'amp_dtype'),
])
def test_nonsense_is_refused_with_the_reason(wrong, error, message):
    with pytest.raises(error, match=message):
        Search(**wrong)
