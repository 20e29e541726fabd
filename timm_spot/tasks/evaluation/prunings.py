"""The scorers and keep rates at which an evaluation drops a model's tokens."""
from __future__ import annotations

import copy
import dataclasses
from typing import Dict, List, Sequence

from torch import nn

from ...models.pruning import TokenPruning
from ...models.pruning_predictor import SCORERS
from ...models.pruning_vit import sparsify
from ...ops.attention import check_keep_rate

KEEP_RATES = (1., 0.9, 0.7, 0.5)


@dataclasses.dataclass
class Pruning:
    """One scorer at one keep rate, of a model that others may share."""

    model: TokenPruning
    scorer: str
    keep_rate: float

    @property
    def stochastic(self) -> bool:
        """Whether the tokens that fall are drawn."""
        return self.scorer == 'random'

    def model_at(self, seed: int) -> TokenPruning:
        """The model at this scorer and keep rate, sharing its weights; `seed` is that of the scorer 'random'."""
        model = copy.copy(self.model)
        model.__dict__.update({name: dict(model.__dict__[name]) for name in ('_modules', '_parameters', '_buffers')})
        if self.scorer != 'relevance':
            model.set_scorer(self.scorer, seed)
        model.set_keep_rate(self.keep_rate)
        return model


def check_prunings(models: Dict[str, nn.Module], scorers: Sequence[str], keep_rates: Sequence[float]) -> None:
    """Raise ValueError for an unknown scorer, a keep rate outside (0, 1], or one that none of the models can use."""
    for scorer in scorers:
        if scorer not in SCORERS:
            raise ValueError(f"scorers={','.join(scorers)} has the unknown {scorer!r}: {', '.join(SCORERS)}.")
    for keep_rate in keep_rates:
        check_keep_rate(keep_rate)
    if 'relevance' in scorers and not any(_has_predictors(model) for model in models.values()):
        raise ValueError(
            f"scorers={','.join(scorers)}: 'relevance' needs trained predictors, and {', '.join(models)} has none: "
            'give relevance_spot_vit_pico_patch8_64, say, or what recipes/train_relevance.py wrote.')
    if keep_rates and not scorers and not any(isinstance(model, TokenPruning) for model in models.values()):
        raise ValueError(f"keep_rates={','.join(map(str, keep_rates))} need scorers: any of {', '.join(SCORERS)}.")


def list_prunings(model: nn.Module, scorers: Sequence[str], keep_rates: Sequence[float]) -> List[Pruning]:
    """The ways in which a model's tokens are to be dropped, none for a dense model without `scorers`.

    A model that drops tokens has by default its own scorer and keep rate; one without predictors is left out for the
    scorer 'relevance', and its tokens fall at the default stages.

    Raises:
        ValueError: A model that cannot be sparsified (the message says why).
    """
    sparse = isinstance(model, TokenPruning)
    if sparse:
        keep_rates = keep_rates or (KEEP_RATES if scorers else (model.keep_rate,))
        scorers = scorers or (model.scorer,)
    untrained = None
    found = []
    for scorer in scorers:
        if scorer == 'relevance':
            if not _has_predictors(model):
                continue
            chosen = model
        else:
            if untrained is None:
                untrained = copy.deepcopy(model) if sparse else sparsify(model, scorer=scorer)
            chosen = untrained
        found += [Pruning(chosen, scorer, keep_rate) for keep_rate in keep_rates or KEEP_RATES]
    return found


def _has_predictors(model: nn.Module) -> bool:
    return isinstance(model, TokenPruning) and model.scorer == 'relevance'
