"""The scorers and keep rates at which an evaluation drops or merges a model's tokens."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from ...models.pruning import TokenPruning
from ...models.pruning_scorers import SCORERS
from ...models.pruning_vit import sparsify
from ...ops.attention import check_keep_rate

KEEP_RATES = (1., 0.9, 0.7, 0.5)


@dataclasses.dataclass(frozen=True)
class Pruning:
    """One scorer at one keep rate, of a model that others may share; without one it merges as the model says.

    `share` of the dense model's multiply-adds is that for which the model's rate was found.
    """

    model: TokenPruning
    scorer: str
    keep_rate: float | None
    share: float | None = None

    @property
    def stochastic(self) -> bool:
        """Whether the tokens that fall are drawn."""
        return SCORERS[self.scorer].draws

    @property
    def r(self) -> str:
        """How many tokens each block merges, one number where it is the same for all; '' where nothing fixes it."""
        r = self.model_at(0).r
        return '' if r is None else ' '.join(str(n) for n in (r[:1] if len(set(r)) == 1 else r))

    @property
    def similarity(self) -> float | None:
        """Least cosine of keys at which tokens are merged, where the model goes by it."""
        return self.model_at(0).similarity

    def model_at(self, seed: int) -> TokenPruning:
        """The model at this scorer and keep rate, sharing its weights; `seed` is that of a scorer that draws."""
        return self.model.pruned(self.keep_rate, self.scorer, seed)


def check_prunings(
        models: dict[str, nn.Module],
        scorers: Sequence[str],
        keep_rates: Sequence[float],
        flops: Sequence[float] = (),
) -> None:
    """Raise ValueError for an unknown scorer, a rate or share outside (0, 1], or one that none of the models can use.
    """
    for scorer in scorers:
        if scorer not in SCORERS:
            raise ValueError(f"scorers={','.join(scorers)} has the unknown {scorer!r}: {', '.join(SCORERS)}.")
        if not any(_can_use(model, scorer) for model in models.values()):
            raise ValueError(
                f"scorers={','.join(scorers)}: {scorer!r} needs trained predictors, and {', '.join(models)} has none: "
                'give relevance_spot_vit_pico_patch8_64, say, or what recipes/train_relevance.py wrote.')
    for keep_rate in keep_rates:
        check_keep_rate(keep_rate)
    if keep_rates and not scorers and not any(isinstance(model, TokenPruning) for model in models.values()):
        raise ValueError(f"keep_rates={','.join(map(str, keep_rates))} need scorers: any of {', '.join(SCORERS)}.")
    if flops and not scorers:
        raise ValueError(f"flops={','.join(map(str, flops))} need scorers: any of {', '.join(SCORERS)}.")
    for share in flops:
        if not 0 < share <= 1:
            raise ValueError(f'flops={share} must be greater than 0 and at most 1.')


def list_prunings(
        model: nn.Module,
        scorers: Sequence[str],
        keep_rates: Sequence[float],
        flops: Sequence[float] = (),
) -> list[Pruning]:
    """The ways in which a model's tokens are to be dropped or merged, none for a dense model without `scorers`.

    A model that drops tokens has by default its own scorer and keep rate; one without predictors is left out for the
    scorer 'relevance', and its tokens fall at the default stages.

    Raises:
        ValueError: A model that cannot be sparsified (the message says why).
    """
    if isinstance(model, TokenPruning):
        if not scorers and not keep_rates and not flops:
            return [Pruning(model, model.scorer, None if model.plan.merges_by_itself else model.keep_rate)]
        scorers = scorers or (model.scorer,)
    usable = [scorer for scorer in scorers if _can_use(model, scorer)]
    if usable and not isinstance(model, TokenPruning):
        model = sparsify(model, scorer=usable[0])
    found = []
    for scorer in usable:
        found += [Pruning(model, scorer, rate) for rate in keep_rates or (() if flops else KEEP_RATES)]
        for share in flops:
            changed = model.pruned(scorer=scorer)
            changed.set_flops(share)
            found.append(Pruning(changed, scorer, None if changed.plan.merges_by_itself else changed.keep_rate, share))
    return found


def _can_use(model: nn.Module, scorer: str) -> bool:
    """Whether a model has the predictors that a scorer needs."""
    return not SCORERS[scorer].needs_training or (isinstance(model, TokenPruning) and model.scorer == scorer)
