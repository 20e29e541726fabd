"""Weighted nearest-neighbour classification, as self-supervised models are judged.

Paper: `Unsupervised Feature Learning via Non-Parametric Instance Discrimination` - https://arxiv.org/abs/1805.01978
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

_QUERIES, _BANK = 256, 65536  # of a block of similarities, 64 MiB


def to_bank(features: torch.Tensor) -> torch.Tensor:
    """Features (M, D) at unit length in half precision: ImageNet's train set at 768 channels takes 2 GB."""
    return F.normalize(features.float(), dim=-1).half()


def knn_predict(
        queries: torch.Tensor,
        bank: torch.Tensor,
        labels: torch.Tensor,
        num_classes: int,
        k: int = 20,
        temperature: float = 0.07,
) -> torch.Tensor:
    """Class with the largest vote of the k nearest neighbours by cosine, each weighing exp(cosine / temperature).

    Beside the bank it needs memory for a block of similarities only, however large the bank is. Similarities are
    float32.

    Args:
        queries: (Q, D), see `to_bank`.
        bank: (M, D), likewise, on the same device.
        labels: (M,), classes of the bank.
        num_classes: Number of classes.
        k: Neighbours, at most M.
        temperature: Above 0; small ones let the nearest decide.

    Returns:
        Classes (Q,).

    Raises:
        ValueError: `k` or `temperature` is out of range.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f'k={k} must lie between 1 and the {len(bank)} images of the bank.')
    if not temperature > 0:
        raise ValueError(f'temperature={temperature} must be above 0.')
    return torch.cat([
        _predict_block(block.float(), bank, labels, num_classes, k, temperature) for block in queries.split(_QUERIES)])


def _predict_block(
        queries: torch.Tensor,
        bank: torch.Tensor,
        labels: torch.Tensor,
        num_classes: int,
        k: int,
        temperature: float,
) -> torch.Tensor:
    nearest = queries.new_empty(len(queries), 0)
    votes = labels.new_empty(len(queries), 0)
    for block, block_labels in zip(bank.split(_BANK), labels.split(_BANK)):
        similarity, index = (queries @ block.float().T).topk(min(k, len(block)), dim=1)
        nearest, kept = torch.cat([nearest, similarity], dim=1).topk(min(k, nearest.shape[1] + similarity.shape[1]))
        votes = torch.cat([votes, block_labels[index]], dim=1).gather(1, kept)
    # The largest weight is 1: no temperature overflows.
    weights = ((nearest - nearest[:, :1]) / temperature).exp()
    return weights.new_zeros(len(queries), num_classes).scatter_add(1, votes, weights).argmax(dim=1)
