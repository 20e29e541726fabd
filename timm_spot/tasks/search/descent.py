"""The search itself: placements slide downhill, each on its own image's loss."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .evaluator import Evaluator
from .result import OracleResult
from .settings import Search

Callback = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


def descend(
        search: Search,
        evaluate: Evaluator,
        start: torch.Tensor,
        index: torch.Tensor,
        callback: Callback | None = None,
        largest: float = math.inf,
) -> OracleResult:
    """Search images `index` (B,) of an evaluator from `start` (B, N, 2), or (B, N, 4) with sizes of at most `largest`.

    Raises:
        ValueError: A loss or a gradient that is not finite; names image and step.
    """
    places = _Places(search, start, largest)
    active = torch.arange(len(start), device=start.device)
    for step in range(search.steps + 1):
        last = step == search.steps
        # A copy: optimizers never write to the graph's leaf.
        moved = places.moved[active].requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits, graph = evaluate(index[active], search.fold(moved, start[active]))
        logits, losses = logits.detach(), graph.detach()
        _check_finite('loss', losses, index[active], step)
        if step == 0:
            found, patience = _Found(search, start, logits, losses), _Patience(search, losses)
        placement = search.fold(moved.detach(), start[active])
        found.note(step, active, placement, logits, losses)
        if callback is not None:
            callback(step, index[active], placement, losses)
        if last:
            break
        goes_on = patience.lasts(active, losses)
        if not goes_on.any():
            break
        graph.backward(torch.ones_like(graph))
        _check_finite('gradient', moved.grad.flatten(1).abs().amax(dim=1), index[active], step)
        active = active[goes_on]
        places.step(active, moved.grad[goes_on])
    return found.result


class _Places:
    """What the optimizers move of the placements under way."""

    def __init__(self, search: Search, start: torch.Tensor, largest: float) -> None:
        self.search, self.largest = search, largest
        self.moved = search.confine(search.unfold(start), largest)
        self.places = list(self.moved.unbind())  # views: the optimizers move `moved` itself
        self.optimizers = search.create_optimizers(self.places)

    def step(self, index: torch.Tensor, gradients: torch.Tensor) -> None:
        """Move the placements `index` (b,) by their gradients."""
        for place in self.places:
            place.grad = None  # optimizers pass over these: a finished image stays where it is
        for i, gradient in zip(index.tolist(), gradients):
            self.places[i].grad = self.search.scale(gradient)
        for optimizer in self.optimizers:
            optimizer.step()
        self.moved.copy_(self.search.confine(self.moved, self.largest))


class _Patience:
    """For how long the loss of each image did not fall."""

    def __init__(self, search: Search, losses: torch.Tensor) -> None:
        self.patience, self.tol = search.patience, search.tol
        self.stale = torch.zeros_like(losses, dtype=torch.long)
        self.mark = torch.full_like(losses, torch.inf)  # what the loss must fall below

    def lasts(self, active: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """Whether to go on with the images `active` (b,), now at these losses (b,)."""
        fell = losses < self.mark[active] - self.tol
        self.mark[active] = torch.where(fell, losses, self.mark[active])
        self.stale[active] = torch.where(fell, 0, self.stale[active] + 1)
        return self.stale[active] < self.patience if self.patience is not None else torch.ones_like(fell)


class _Found:
    """The result as it grows."""

    def __init__(self, search: Search, start: torch.Tensor, logits: torch.Tensor, losses: torch.Tensor) -> None:
        self.keep_best = search.keep == 'best'
        self.lowest = torch.full_like(losses, torch.inf)
        self.result = OracleResult(
            positions=start.clone(),
            losses=losses[:, None].repeat(1, search.steps + 1),
            logits_before=logits,
            logits_after=logits.clone(),
            trajectory=start[:, None].repeat(1, search.steps + 1, 1, 1) if search.record else None,
        )

    def note(
            self,
            step: int,
            active: torch.Tensor,
            positions: torch.Tensor,
            logits: torch.Tensor,
            losses: torch.Tensor,
    ) -> None:
        """Take what the images `active` (b,) reached: positions (b, N, 2), logits (b, num_classes), losses (b,)."""
        result = self.result
        # To the end of the row: an image that stops keeps its last values.
        result.losses[active, step:] = losses[:, None]
        if result.trajectory is not None:
            result.trajectory[active, step:] = positions[:, None]
        better = losses < self.lowest[active] if self.keep_best else torch.ones_like(losses, dtype=torch.bool)
        kept = active[better]
        self.lowest[kept] = losses[better]
        result.positions[kept], result.logits_after[kept] = positions[better], logits[better]


def _check_finite(what: str, values: torch.Tensor, index: torch.Tensor, step: int) -> None:
    wrong = (~values.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f'the {what} of image {index[wrong[0]].item()} is {values[wrong[0]].item()} at step {step}: look for NaN '
            'or infinity in that image and in the weights, or lower lr.')
