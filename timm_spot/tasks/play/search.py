"""A search of `optimize_positions`, step by step, as it goes on in a thread of its own."""
from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch

from ..search.objectives import OBJECTIVES
from ..search.optimize import optimize_positions
from .stage import Stage

MAX_STEPS = 500
_WAITING = 2  # steps that may lie ready while nobody takes them


class _Left(Exception):
    """Nobody takes the steps any more."""


def search_steps(
        stage: Stage,
        picture: str,
        positions: Sequence[Sequence[float]],
        objective: str = 'entropy',
        label: int | None = None,
        steps: int = 30,
        lr: float = 1e-2,
) -> Iterator[dict[str, Any]]:
    """The placements of a search, one after the other: `step`, `positions`, `loss` and `scores` of each.

    Closed early, it stops the search. Others may ask the stage in between two steps.

    Args:
        stage: Whose model is searched with.
        picture: Id of a picture.
        positions: N pairs (y, x) to start from.
        objective: 'label', 'entropy', 'teacher' or 'feature', see `timm_spot.tasks.search.objectives`.
        label: The class that 'label' looks for.
        steps: At most `MAX_STEPS`.
        lr: Learning rate, in units of the image's side.

    Raises:
        UnknownPicture: It is not there.
        ValueError: A wrong objective, label or number; at once, before the first step.
    """
    shown, start = stage.shown(picture), stage.placement(positions)
    if objective not in OBJECTIVES:
        raise ValueError(f'objective={objective!r} is none of {", ".join(OBJECTIVES)}.')
    if objective == 'label' and not (isinstance(label, int) and 0 <= label < len(stage.names)):
        raise ValueError(f"label={label!r} must be a class, 0 to {len(stage.names) - 1}, for the objective 'label'.")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f'steps={steps} must be at least 1 and at most {MAX_STEPS}.')
    if not 0 < lr <= 1:
        raise ValueError(f'lr={lr} must be above 0 and at most 1.')
    targets = torch.tensor([label]) if objective == 'label' else None
    handover = _Handover()

    def on_step(step: int, index: torch.Tensor, placement: torch.Tensor, losses: torch.Tensor) -> None:
        with torch.no_grad():
            probabilities = stage.model(shown.images, positions=placement)[0].softmax(dim=0)
        stage.lock.release()
        try:
            handover.give(dict(
                step=step, positions=placement[0].tolist(), loss=losses[0].item(),
                scores=stage.scores(probabilities, shown.full)))
        finally:
            stage.lock.acquire()

    def search() -> None:
        with stage.lock:
            optimize_positions(
                stage.model, shown.images, targets, init=start, steps=steps, lr=lr, objective=objective,
                bounds='clamp', record=False, callback=on_step)

    return handover.take(search)


class _Handover:
    """Steps from the thread that makes them to who takes them."""

    def __init__(self) -> None:
        self._ready: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue(_WAITING)
        self._left = threading.Event()

    def give(self, item: dict[str, Any] | Exception | None) -> None:
        """Wait until there is room; raises `_Left` once nobody takes any more."""
        while not self._left.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue
        raise _Left

    def take(self, work: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """What `work`, in a thread of its own, gives; it raises what that raises."""
        thread = threading.Thread(target=self._run, args=(work,))
        thread.start()
        try:
            while (item := self._ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
            thread.join()
        finally:
            self._left.set()  # the thread ends at its next step

    def _run(self, work: Callable[[], None]) -> None:
        with suppress(_Left):
            try:
                work()
            except _Left:
                raise
            except Exception as e:  # whoever takes the steps gets it
                self.give(e)
            else:
                self.give(None)
