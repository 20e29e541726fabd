"""What an evaluation reports of each image's logits, with standard errors."""
from __future__ import annotations

import math
from typing import Dict, NamedTuple, Optional

import torch
import torch.nn.functional as F

_BINS = 15  # of the calibration error
_RESAMPLES = 200  # of the bootstrap for its standard error


class Estimate(NamedTuple):
    """A mean, its standard error over images, and over seeds (None with a single one)."""

    value: float
    se: float
    se_seeds: Optional[float]


def score_logits(logits: torch.Tensor, targets: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Score each image.

    Args:
        logits: (B, num_classes).
        targets: (B,), class indices.

    Returns:
        Tensors (B,) in float64: `top1` and `top5`, 1 where the target is among the first one or five classes; `nll`,
        the negative log-likelihood of the target in nats; `confidence`, the probability of the first class.

    Raises:
        ValueError: A target that is no class.
    """
    if targets.min() < 0 or targets.max() >= logits.shape[-1]:
        raise ValueError(
            f'labels reach from {targets.min()} to {targets.max()}, the model has {logits.shape[-1]} classes.')
    log_p = logits.double().log_softmax(dim=-1)
    ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == targets[:, None]
    return dict(
        top1=ranked[:, 0].double(),
        top5=ranked.any(dim=-1).double(),
        nll=F.nll_loss(log_p, targets, reduction='none'),
        confidence=log_p.amax(dim=-1).exp())


def estimate_mean(values: torch.Tensor, groups: Optional[torch.Tensor] = None) -> Estimate:
    """Mean of a quantity of each image.

    Args:
        values: (S, B), one row for each seed.
        groups: (B,), where several images have one origin: the error is then over origins, not over images.
    """
    per_image = values.mean(dim=0)
    if groups is None:
        se = per_image.std() / math.sqrt(len(per_image))
    else:
        _, groups = groups.unique(return_inverse=True)
        origins = int(groups.max()) + 1
        residual = torch.zeros(origins, dtype=values.dtype).index_add(0, groups, per_image - per_image.mean())
        se = residual.square().sum().sqrt() / len(per_image) * math.sqrt(origins / (origins - 1))
    return Estimate(per_image.mean().item(), se.item(), _se_seeds(values.mean(dim=1)))


def estimate_calibration(
        confidence: torch.Tensor,
        correct: torch.Tensor,
        groups: Optional[torch.Tensor] = None,
) -> Estimate:
    """Expected calibration error in 15 equal bins, `On Calibration of Modern Neural Networks`.

    Paper: https://arxiv.org/abs/1706.04599

    Its standard error is that of a bootstrap over images (or their origins) with a fixed seed.

    Args:
        confidence: (S, B) in [0, 1], the probability of the class named.
        correct: (S, B), 1 where that class is the target.
        groups: See `estimate_mean`.
    """
    B = confidence.shape[1]
    weights = torch.ones(1, B, dtype=torch.float64)
    per_seed = torch.stack([_calibration(c, k, weights)[0] for c, k in zip(confidence, correct)])
    _, groups = (torch.arange(B) if groups is None else groups).unique(return_inverse=True)
    origins = int(groups.max()) + 1
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(origins, (_RESAMPLES, origins), generator=generator)
    weights = torch.zeros(_RESAMPLES, origins, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    weights = weights[:, groups]
    resampled = torch.stack([_calibration(c, k, weights) for c, k in zip(confidence, correct)]).mean(dim=0)
    return Estimate(per_seed.mean().item(), resampled.std().item(), _se_seeds(per_seed))


def _calibration(confidence: torch.Tensor, correct: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Calibration error (R,) for each of R weightings (R, B) of the images."""
    gap = confidence.new_zeros(_BINS, len(confidence))
    gap[(confidence * _BINS).long().clamp(max=_BINS - 1), torch.arange(len(confidence))] = correct - confidence
    return (weights @ gap.T).abs().sum(dim=1) / weights.sum(dim=1)


def _se_seeds(per_seed: torch.Tensor) -> Optional[float]:
    return (per_seed.std() / math.sqrt(len(per_seed))).item() if len(per_seed) > 1 else None

