"""Soft targets and losses for segmentation with tokens that are regions.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652
"""
from __future__ import annotations

import torch
import torch.nn.functional as F


@torch.no_grad()
def token_targets(
        segmentation: torch.Tensor,
        labels: torch.Tensor,
        sizes: torch.Tensor,
        image: torch.Tensor,
        num_classes: int,
) -> torch.Tensor:
    """Soft class targets of tokens: intersection over union with each class of the image, summing to one.

    Args:
        segmentation: (B, H, W), ids 0..N - 1 running across the batch.
        labels: Classes (B, H, W); pixels outside 0..num_classes - 1 are skipped.
        sizes: Pixels of each token, (N,).
        image: Index of each token's image, (N,).
        num_classes: Number of classes n.

    Returns:
        (N, n), a row of zeros for a token without any labelled pixel.

    Raises:
        ValueError: The shapes of labels and segmentation differ.
    """
    if labels.shape != segmentation.shape:
        raise ValueError(
            f'labels of shape {tuple(labels.shape)} must match the segmentation, {tuple(segmentation.shape)}.')
    valid = (labels >= 0) & (labels < num_classes)
    classes = labels.long()[valid]
    overlap = torch.bincount(
        segmentation[valid] * num_classes + classes, minlength=len(sizes) * num_classes).view(-1, num_classes)
    area = _class_areas(labels, num_classes)[image]
    iou = torch.where(overlap > 0, overlap / (sizes[:, None] + area - overlap), 0.)
    return iou / iou.sum(1, keepdim=True).clamp_min(torch.finfo(iou.dtype).tiny)


def _class_areas(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Pixels (B, n) of each class in each image."""
    valid = (labels >= 0) & (labels < num_classes)
    image = torch.arange(len(labels), device=labels.device)[:, None, None].expand_as(labels)
    entry = image[valid] * num_classes + labels.long()[valid]
    return torch.bincount(entry, minlength=len(labels) * num_classes).view(-1, num_classes)


def token_focal_loss(
        logits: torch.Tensor,
        targets: torch.Tensor,
        gamma: int = 4,
        ignored_class: int | None = None,
) -> torch.Tensor:
    """Focal loss of tokens, (1 - q)^gamma * cross-entropy, scaled to be about as large as cross-entropy itself.

    Args:
        logits: (N, n).
        targets: Soft targets (N, n) from `token_targets`; rows of zeros are left out.
        gamma: q is the predicted probability of a token's main class, this the power of what is missing to one.
        ignored_class: Class without weight.

    Returns:
        Mean over the tokens, zero where no token has a label.
    """
    labelled = targets.sum(1) > 0
    logits, targets = logits[labelled], targets[labelled]
    if not len(logits):
        return logits.sum()
    q = logits.softmax(1).gather(1, targets.argmax(1, keepdim=True))[:, 0]
    weight = logits.new_ones(logits.shape[1])
    if ignored_class is not None:
        weight[ignored_class] = 0.
    entropy = -(weight * targets * logits.log_softmax(1)).sum(1)
    scale = (gamma + 1) / sum(1 / k for k in range(1, gamma + 2))
    return ((1. - q) ** gamma * entropy).mean() * scale


def image_area_loss(
        logits: torch.Tensor,
        labels: torch.Tensor,
        ignored_class: int | None = None,
) -> torch.Tensor:
    """Binary cross-entropy of an image's logits (B, n) against the areas of the classes in its labels (B, H, W).

    Targets are the fourth roots of the classes' shares of the image, normalised to sum to one.
    """
    num_classes = logits.shape[1]
    share = (_class_areas(labels, num_classes) / labels[0].numel()) ** 0.25
    target = share / share.sum(1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
    weight = logits.new_ones(num_classes)
    if ignored_class is not None:
        weight[ignored_class] = 0.
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), weight=weight)
