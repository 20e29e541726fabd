from __future__ import annotations

import math

import pytest
import torch
from dht_golden import load

from timm_spot.ops.regions.loss import image_area_loss, token_focal_loss, token_targets

SEGMENTATION = torch.tensor([[[0, 0, 1, 1]]])
SIZES, IMAGE = torch.tensor([2, 2]), torch.tensor([0, 0])


def test_golden_targets():
    tensors, _ = load('dense_64x64')
    segmentation = tensors['seg'].long()
    counts = [len(s.unique()) for s in segmentation]
    targets = token_targets(
        segmentation, tensors['labels'], torch.bincount(segmentation.flatten()),
        torch.arange(2).repeat_interleave(torch.tensor(counts)), 5)
    torch.testing.assert_close(targets, tensors['token_targets'], atol=1e-6, rtol=0)


def test_targets_by_hand():
    targets = token_targets(SEGMENTATION, torch.tensor([[[0, 0, 0, 1]]]), SIZES, IMAGE, 2)
    # Token 0: class 0 with 2 / (2 + 3 - 2). Token 1: class 0 with 1 / (2 + 3 - 1), class 1 with 1 / (2 + 1 - 1).
    torch.testing.assert_close(targets, torch.tensor([[1., 0.], [1 / 3, 2 / 3]]))


def test_a_token_without_labels_has_no_target_and_no_loss():
    targets = token_targets(SEGMENTATION, torch.tensor([[[1, 1, 255, -1]]]), SIZES, IMAGE, 2)
    assert targets.tolist() == [[0., 1.], [0., 0.]]
    logits = torch.tensor([[0., 0.], [5., 1.]])
    assert token_focal_loss(logits, targets) == token_focal_loss(logits[:1], targets[:1])
    assert token_focal_loss(logits[1:], targets[1:]) == 0.


def test_focal_loss_by_hand():
    scale = 5 / (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5)
    logits, targets = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]])
    assert token_focal_loss(logits, targets).item() == pytest.approx(math.log(2) / 16 * scale)
    assert token_focal_loss(logits, targets, ignored_class=1).item() == pytest.approx(0.25 * math.log(2) / 16 * scale)


def test_area_loss_by_hand():
    labels = torch.tensor([[[0] * 15 + [1]]])
    a, b = (15 / 16) ** 0.25, 0.5
    logits = torch.tensor([[0.3, -0.2]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.tensor([[a / (a + b), b / (a + b)]]))
    torch.testing.assert_close(image_area_loss(logits, labels), expected)


def test_labels_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r'labels of shape \(1, 2, 2\)'):
        token_targets(SEGMENTATION, torch.zeros(1, 2, 2), SIZES, IMAGE, 2)
