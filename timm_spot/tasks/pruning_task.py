"""Training of token relevance, as a task of timm's (`timm.task`).

Paper: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.task import TrainingTask, resolve_classification_loss
from torch import nn

from ..models.pruning import MaskedOutput, TokenPruning
from ..models.spot_vit import SubpixelVisionTransformer
from ..ops.attention import check_keep_rate


def ratio_loss(masks: torch.Tensor, keep_rate: float) -> torch.Tensor:
    """Squared deviation of each stage's share of kept tokens from its target, keep_rate ** stage.

    Args:
        masks: (B, stages, N) of ones and zeros.
        keep_rate: Share that each stage keeps of what it is given.

    Returns:
        Mean over images and stages: what falls at inference is the same count in each image.
    """
    targets = keep_rate ** torch.arange(1, masks.shape[1] + 1, device=masks.device, dtype=masks.dtype)
    return (masks.mean(dim=2) - targets).square().mean()


def logit_loss(logits: torch.Tensor, dense_logits: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from the dense model's prediction, logits (B, classes), mean over images."""
    return F.kl_div(
        logits.log_softmax(dim=-1), dense_logits.log_softmax(dim=-1), reduction='batchmean', log_target=True)


def token_loss(tokens: torch.Tensor, dense_tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared distance of surviving tokens to the dense model's, mean over tokens and channels.

    Both are normalised without weights first, so that it means the same for a ViT that norms after its pooling.

    Args:
        tokens: Image tokens (B, N, D) after the last block.
        dense_tokens: Those of the dense model.
        mask: (B, N), the last stage's.
    """
    D = tokens.shape[-1:]
    distance = (F.layer_norm(tokens.float(), D) - F.layer_norm(dense_tokens.float(), D)).square().mean(dim=-1)
    return (distance * mask).sum() / mask.sum()


class MaskedForward(nn.Module):
    """`forward_masked` as the `forward` of a module, which is what DistributedDataParallel can call."""

    def __init__(self, model: TokenPruning) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, keep_rate: float, **placement: torch.Tensor) -> MaskedOutput:
        return self.model.forward_masked(images, keep_rate=keep_rate, **placement)


class RelevanceTask(TrainingTask):
    """Train a model of `timm_spot.sparsify`: classification, keep ratio, and a dense teacher's logits and tokens.

    Args:
        student_model: With scorer='relevance'. Parameters that are not to be trained have requires_grad=False.
        teacher_model: The dense model, which sees the same images and placements; not changed by training.
        criterion: Loss of the logits, by default cross-entropy.
        keep_rate: By default the model's; a pair (low, high) is drawn from evenly at each step.
        ratio_weight: Of `ratio_loss`.
        logit_weight: Of `logit_loss`.
        token_weight: Of `token_loss`.
        **kwargs: `device`, `dtype`, `verbose` of timm's TrainingTask.

    Raises:
        ValueError: A model without predictors, a keep rate outside (0, 1) or a range out of order.
    """

    def __init__(
            self,
            student_model: TokenPruning,
            teacher_model: nn.Module,
            criterion: Callable[..., torch.Tensor] | None = None,
            keep_rate: float | tuple[float, float] | None = None,
            ratio_weight: float = 2.0,
            logit_weight: float = 0.5,
            token_weight: float = 0.5,
            **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(student_model, TokenPruning) or not student_model.predictors:
            raise ValueError("student_model has no predictors to train: make it by timm_spot.sparsify(vit).")
        keep_rate = student_model.keep_rate if keep_rate is None else keep_rate
        self.keep_rate = keep_rate if isinstance(keep_rate, tuple) else (keep_rate, keep_rate)
        for rate in self.keep_rate:
            check_keep_rate(rate)
        if not self.keep_rate[0] <= self.keep_rate[1] < 1:
            raise ValueError(f'keep_rate={keep_rate} must be below 1, and a range of it in rising order.')
        self.trainable_module = student_model
        self.masked = MaskedForward(student_model)
        self.teacher = teacher_model.eval()
        self.criterion = resolve_classification_loss(criterion, self.device)
        self.weights = dict(task=1., ratio=ratio_weight, logit=logit_weight, token=token_weight)

    def train(self, mode: bool = True) -> RelevanceTask:
        """Set the mode of the student; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> RelevanceTask:
        """Wrap the student's masked forward in DistributedDataParallel."""
        self.masked = nn.parallel.DistributedDataParallel(self.masked, device_ids=device_ids, **ddp_kwargs)
        return self

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (B, C, H, W) and labels (B,) to 'loss', 'output' (logits) and each term by name, unweighted."""
        low, high = self.keep_rate
        keep_rate = low + (high - low) * torch.rand((), dtype=torch.float32, device='cpu').item()
        student = self.trainable_module
        # A subpixel ViT draws its placements: both models see the same.
        placement = dict(positions=student.place(input)) if isinstance(student, SubpixelVisionTransformer) else {}
        output = self.masked(input, keep_rate, **placement)
        with torch.no_grad():
            dense_tokens = self.teacher.forward_features(input, **placement)
            dense_logits = self.teacher.forward_head(dense_tokens)
        prefix = self.teacher.num_prefix_tokens
        terms = dict(
            task=self.criterion(output.logits, target),
            ratio=ratio_loss(output.masks, keep_rate),
            logit=logit_loss(output.logits, dense_logits),
            token=token_loss(output.tokens[:, prefix:], dense_tokens[:, prefix:], output.masks[:, -1]),
        )
        loss = sum(self.weights[name] * term for name, term in terms.items())
        return dict(loss=loss, output=output.logits, **{f'{name}_loss': term for name, term in terms.items()})
