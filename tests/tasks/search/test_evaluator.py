from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_spot
from timm_spot import sample_positions
from timm_spot.tasks.search.evaluator import Evaluator, frozen, full_placement
from timm_spot.tasks.search.settings import Search

TARGETS = torch.tensor([3, 7, 1])


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', num_classes=10, embed_dim=32, depth=1).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_losses_are_those_of_the_model(tiny, images):
    index, positions = torch.tensor([2, 0]), sample_positions('center', 5, (64, 64)).expand(2, -1, -1)
    logits, losses = Evaluator(tiny, images, TARGETS, Search())(index, positions)
    expected = tiny(images[index], positions)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(losses, F.cross_entropy(expected, TARGETS[index], reduction='none'))


@torch.no_grad()
def test_merged_tokens_are_pooled_by_their_size(images):
    model = timm.create_model('spot_vit_pico_patch8_64', num_classes=10, embed_dim=32, depth=2).eval()
    model = timm_spot.sparsify(model, scorer='merge', r=2)
    index, positions = torch.arange(3), sample_positions('center', 5, (64, 64)).expand(3, -1, -1)
    logits, _ = Evaluator(model, images, TARGETS, Search())(index, positions)
    torch.testing.assert_close(logits, model(images, positions))


@torch.no_grad()
@pytest.mark.parametrize('chunk_size', [None, 2])
def test_the_full_budget_is_seen_once_and_in_chunks(tiny, images, chunk_size):
    sizes = []
    hook = tiny.patch_embed.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[:2])))
    evaluate = Evaluator(tiny, images, None, Search(objective='teacher', chunk_size=chunk_size))
    for _ in range(2):
        losses = evaluate(torch.tensor([1]), sample_positions('center', 5, (64, 64)))[1]
    hook.remove()
    assert sizes == [*([(3, 64)] if chunk_size is None else [(2, 64), (1, 64)]), (1, 5), (1, 5)]
    full = tiny(images[1:2], sample_positions('grid', 64, (64, 64), window=8)).log_softmax(dim=1)
    tried = tiny(images[1:2], sample_positions('center', 5, (64, 64))).log_softmax(dim=1)
    torch.testing.assert_close(losses, (full.exp() * (full - tried)).sum(dim=1), rtol=1e-4, atol=1e-6)
    assert [chunk.tolist() for chunk in evaluate.chunks] == ([[0, 1, 2]] if chunk_size is None else [[0, 1], [2]])


def test_the_full_budget_of_any_image(tiny):
    """70 x 50 px hold 8 x 6 whole windows of 8."""
    placement = full_placement(tiny, torch.zeros(1, 3, 70, 50))
    assert torch.equal(placement, sample_positions('isotropic', 48, (70, 50))[0])


def test_losses_that_are_none_are_refused(tiny, images):
    positions = sample_positions('center', 5, (64, 64)).expand(3, -1, -1).clone().requires_grad_()
    index = torch.arange(3)
    with pytest.raises(ValueError, match=r'one loss for each image, a tensor of shape \(3,\), got torch.Size\(\[\]\)'):
        Evaluator(tiny, images, None, Search(objective=lambda logits: logits.mean()))(index, positions)
    with pytest.raises(ValueError, match='do not depend on the positions'):
        Evaluator(tiny, images, None, Search(objective=lambda logits: logits.detach().mean(dim=1)))(index, positions)


def test_a_frozen_model_is_restored(tiny):
    tiny.blocks.train()
    tiny.head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in tiny.parameters()]
    modes = [m.training for m in tiny.modules()]
    with pytest.raises(ZeroDivisionError), frozen(tiny):
        assert not any(m.training for m in tiny.modules()) and not any(p.requires_grad for p in tiny.parameters())
        1 / 0  # noqa: B018
    assert [p.requires_grad for p in tiny.parameters()] == flags and [m.training for m in tiny.modules()] == modes
