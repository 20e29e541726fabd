from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from torch._dynamo.utils import counters

import timm_spot

TINY = dict(embed_dim=32, depth=1, num_heads=2, num_classes=3)


@pytest.fixture
def quickly(monkeypatch):
    """Programs that are captured but not translated, which takes a tenth of the time."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='eager'))
    with torch._dynamo.config.patch(recompile_limit=1):  # of one function, fewer than there are budgets
        yield
    torch.compiler.reset()


def made():
    return counters['stats']['unique_graphs']


@pytest.mark.parametrize('placer, budgets', [('sampled', (9, 4, 9)), ('density', (9,))])
def test_every_budget_has_a_program_that_is_made_once(quickly, placer, budgets):
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', placer=placer, **TINY).eval()
    if placer == 'density':
        torch.nn.init.normal_(model.placer.head.weight, std=0.1)
    fast = timm_spot.compile(model, budgets=budgets)
    assert fast.budgets == tuple(sorted(set(budgets)))
    before = made()
    fast.warm_up(torch.randn(2, 3, 64, 64))
    assert made() == before + len(fast.budgets)
    for batch in (3, 2, 5):
        images = torch.randn(batch, 3, 64, 64)
        for n in (None, *fast.budgets):
            model.set_placement(n_tokens=n or 9)
            torch.testing.assert_close(fast(images, n), model(images), rtol=0, atol=1e-5)
    assert made() == before + len(fast.budgets)
    model.set_placement(n_tokens=5)  # which is none of them: the largest
    torch.testing.assert_close(fast(images), fast(images, 9), rtol=0, atol=0)
    for batch in (2, 3):  # a placement for each image is another program
        images, positions = torch.randn(batch, 3, 64, 64), torch.rand(batch, 9, 2)
        torch.testing.assert_close(
            fast(images, positions=positions), model(images, positions), rtol=0, atol=1e-5)
    assert made() == before + len(fast.budgets) + 1
    fast(torch.randn(1, 3, 64, 64))
    assert made() == before + len(fast.budgets) + 2  # batches of one have programs of their own


def test_what_cannot_be_compiled():
    model = timm.create_model('spot_vit_pico_patch8_64', **TINY)
    with pytest.raises(ValueError, match=r'train mode.*model\.eval\(\)'):
        timm_spot.compile(model)
    with pytest.raises(TypeError, match='must be a subpixel ViT, got Linear'):
        timm_spot.compile(torch.nn.Linear(1, 1))
    model.eval()
    assert timm_spot.compile(model, budgets=4).budgets == (4,)
    for budgets, says in (((), 'budgets is empty'), ((0,), 'n_tokens=0 is not a budget')):
        with pytest.raises(ValueError, match=says):
            timm_spot.compile(model, budgets=budgets)
    with pytest.raises(ValueError, match='n_tokens=5 is none of the budgets 4, 9'):
        timm_spot.compile(model, budgets=(4, 9))(torch.zeros(1, 3, 64, 64), 5)
