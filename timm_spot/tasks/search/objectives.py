"""Objectives: what the oracle minimises, one number for each image.

An objective is a function that takes, by name, whichever it needs of the following and returns losses (b,). It sees b
of the images, those still searched:

    logits         (b, num_classes), of the placement tried
    features       (b, D), the pooled features in front of the classifier
    targets        (b,), class indices
    full_logits    (b, num_classes), of the same model at its full budget, see `optimize_positions`
    full_features  (b, D), of the same
    index          (b,), which images of the call these are
"""
from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F

Objective = Callable[..., torch.Tensor]

_KEYWORDS = ('logits', 'features', 'targets', 'full_logits', 'full_features', 'index')


def label(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the true class: the paper's objective, which needs the label."""
    return F.cross_entropy(logits, targets, reduction='none')


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the prediction, in nats: be sure, of whatever it is."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def teacher(logits: torch.Tensor, full_logits: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from the prediction at the full budget: agree with the model that sees everything."""
    return F.kl_div(
        logits.log_softmax(dim=-1), full_logits.log_softmax(dim=-1), reduction='none', log_target=True).sum(dim=-1)


def feature(features: torch.Tensor, full_features: torch.Tensor) -> torch.Tensor:
    """One minus the cosine between the pooled features and those at the full budget."""
    return 1. - F.cosine_similarity(features, full_features, dim=-1)


OBJECTIVES: dict[str, Objective] = dict(label=label, entropy=entropy, teacher=teacher, feature=feature)


def get_objective(objective: str | Objective) -> tuple[Objective, tuple[str, ...]]:
    """An objective and the keywords it takes.

    Args:
        objective: Name of one, or a function; if its only parameter has a name of its own, it is given the logits.

    Returns:
        A function of keywords, and their names.

    Raises:
        ValueError: An unknown name, or a function that asks for something an objective is not given.
        TypeError: Neither a name nor a function.
    """
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise ValueError(f"objective={objective!r} is unknown, the objectives are {', '.join(OBJECTIVES)}.")
        objective = OBJECTIVES[objective]
    elif not callable(objective):
        raise TypeError(f'objective must be a name or a function that returns losses (b,), got {objective!r}.')
    parameters = [
        p for p in inspect.signature(objective).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.POSITIONAL_ONLY)]
    keywords = tuple(p.name for p in parameters if p.name in _KEYWORDS)
    required = [p.name for p in parameters if p.default is p.empty]
    if len(required) == 1 and not keywords:
        return lambda logits: objective(logits), ('logits',)
    unknown = [name for name in required if name not in _KEYWORDS]
    if unknown or not keywords:
        raise ValueError(
            f"objective {objective!r} asks for {', '.join(unknown) or 'nothing'}, but objectives are given "
            f"{', '.join(_KEYWORDS)}.")
    return objective, keywords
