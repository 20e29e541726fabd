"""The search on a loss whose course is known: (x - target)^2, halved distances under sgd with lr 1/4."""
from __future__ import annotations

import pytest
import torch

from timm_spot.tasks.search.descent import descend
from timm_spot.tasks.search.settings import SIZE_RATE, Search

TARGETS = torch.tensor([0.5, 0., 1.])
START = torch.tensor([[[0., 0.]], [[0.5, 0.5]], [[1., 1.]]])
SGD = dict(optimizer='sgd', lr=0.25, optimizer_kwargs=dict(momentum=0., weight_decay=0., nesterov=False))


def squares(index, positions):
    """Logits (b, 2), the positions; losses (b,), their squared distance from the image's target."""
    return positions[:, 0], (positions - TARGETS[index, None, None]).square().sum(dim=(1, 2))


def test_steps_by_hand():
    seen = []
    found = descend(Search(steps=2, **SGD), squares, START, torch.arange(3), lambda *args: seen.append(args))
    # x <- x - 1/4 * 2 (x - t): the distance halves.
    expected = torch.tensor([[0., 0.25, 0.375], [0.5, 0.25, 0.125], [1., 1., 1.]])
    assert torch.equal(found.trajectory, expected[:, :, None, None].expand(-1, -1, 1, 2))
    assert torch.equal(found.positions, expected[:, 2:, None].expand(-1, -1, 2))
    assert torch.equal(found.losses, 2 * (expected - TARGETS[:, None]).square())
    assert torch.equal(found.logits_before, START[:, 0]) and torch.equal(found.logits_after, found.positions[:, 0])
    assert [(step, index.tolist()) for step, index, _, _ in seen] == [(i, [0, 1, 2]) for i in range(3)]
    for step, _, positions, losses in seen:
        assert torch.equal(positions, found.trajectory[:, step]) and torch.equal(losses, found.losses[:, step])


@pytest.mark.parametrize('optimizer', [
    SGD, dict(optimizer='adamw', optimizer_kwargs=dict(weight_decay=0.))])
def test_sizes_move_by_their_rate_once(optimizer):
    """A gradient of 1 to the logarithm of a size is one of 1 to a position, but for the rate."""
    def sums(index, placement):
        return placement[:, 0], placement[..., 0].sum(dim=1) + placement[..., 2].log().sum(dim=1)

    search = Search(**{**optimizer, 'lr': 1e-3}, steps=1, optimize=('position', 'size'))
    start = torch.tensor([[[0.5, 0.5, 2., 2.]]])
    found = descend(search, sums, start, torch.arange(1)).positions
    assert (found - start)[0, 0, 0].item() == pytest.approx(-1e-3, rel=1e-3)
    assert (found / start).log()[0, 0, 2].item() == pytest.approx(-SIZE_RATE * 1e-3, rel=1e-3)
    assert torch.equal(found[..., 1], start[..., 1]) and found[0, 0, 3].item() == pytest.approx(2.)


@pytest.mark.parametrize('sign, end', [(1., 0.25), (-1., 64.)])
def test_sizes_stay_where_windows_see_something(sign, end):
    def sums(index, placement):
        return placement[:, 0], sign * placement[..., 2:].log().sum(dim=(1, 2))

    start = torch.tensor([[[0.5, 0.5, 1., 64.]]])
    found = descend(Search(steps=9, lr=1., optimize='size'), sums, start, torch.arange(1), largest=64.)
    sizes = found.trajectory[..., 2:]
    assert (sizes >= 0.25 * (1 - 1e-5)).all() and (sizes <= 64.).all()
    torch.testing.assert_close(found.positions[..., 2:], torch.full((1, 1, 2), end), rtol=1e-4, atol=0.)
    assert torch.equal(found.positions[..., :2], start[..., :2])


def test_images_are_asked_for_by_their_numbers():
    found = descend(Search(steps=1, **SGD), squares, START[1:2], torch.tensor([2]))
    assert found.positions.tolist() == [[[0.75, 0.75]]], 'towards the target of image 2'


def test_an_image_without_progress_leaves_and_keeps_what_it_has():
    asked = []

    def watch(index, positions):
        asked.append(index.tolist())
        return squares(index, positions)

    # Losses 0.5, 0.125, 0.03125, ...: image 2 never falls; 0 and 1 fall by more than 0.1 once.
    found = descend(Search(steps=5, patience=1, tol=0.1, **SGD), watch, START, torch.arange(3))
    assert asked == [[0, 1, 2], [0, 1, 2], [0, 1]]
    assert found.losses.tolist() == [[0.5, 0.125, *[0.03125] * 4]] * 2 + [[0.] * 6]
    assert found.trajectory[0, :, 0, 0].tolist() == [0., 0.25, *[0.375] * 4]
    assert found.positions[:, 0, 0].tolist() == [0.375, 0.125, 1.]


@pytest.mark.parametrize('keep, x', [('last', 2.), ('best', 0.)])
def test_what_is_kept(keep, x):
    """With lr 3/2 the distance doubles in each step, from one side to the other."""
    search = Search(steps=2, keep=keep, record=False, **{**SGD, 'lr': 1.5})
    found = descend(search, squares, START[:1], torch.arange(1))
    # 0 -> 1.5 -> -1.5: distances 0.5, 1, 2
    assert found.positions.tolist() == [[[{2.: -1.5, 0.: 0.}[x]] * 2]] and found.trajectory is None
    assert found.losses.tolist() == [[0.5, 2., 8.]]
    assert torch.equal(found.logits_after, found.positions[:, 0])


def test_bounds_hold_after_every_step():
    search = Search(steps=2, bounds='clamp', **{**SGD, 'lr': 1.5})
    found = descend(search, squares, START[:1], torch.arange(1))
    assert found.trajectory[0, :, 0, 0].tolist() == [0., 1., 0.]


def test_what_is_not_finite_is_named():
    def broken(index, positions):
        logits, losses = squares(index, positions)
        return logits, losses + torch.where(index == 1, torch.nan, 0.)

    def steep(index, positions):
        return positions[:, 0], (0. * positions).sum(dim=(1, 2)).sqrt()

    with pytest.raises(ValueError, match='the loss of image 1 is nan at step 0'):
        descend(Search(**SGD), broken, START, torch.arange(3))
    with pytest.raises(ValueError, match='the gradient of image 2 is nan at step 0'):
        descend(Search(**SGD), steep, START[:1], torch.tensor([2]))
