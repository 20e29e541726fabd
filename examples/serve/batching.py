"""Requests gathered into batches, at a budget that follows from the load.

One thread runs the model. While it does, requests wait; a batch takes what waits, and its budget is the largest at
which all that waits would be answered within a target. So the same file gives its best answers when it is quiet, and
its fastest under pressure. What would have to wait for too long is refused at once.
"""
from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Model = Callable[[np.ndarray, int], np.ndarray]
_LATEST = 0.2  # weight of the latest batch in what an image is thought to take


class Busy(Exception):
    """As many requests are admitted as may be.

    Attributes:
        seconds: After which it is worth asking again.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f'busy for about {seconds:.1f} s')
        self.seconds = seconds


class Answer(NamedTuple):
    """Logits (classes,) of an image, and the budget at which they were computed."""

    logits: np.ndarray
    n_tokens: int


@dataclass
class Counts:
    """What happened since the start."""

    images: Counter = field(default_factory=Counter)  # by budget
    batches: int = 0
    refused: int = 0


class Batcher:
    """Answers images one by one, computes them together.

    Args:
        model: From images (B, C, H, W) and a budget to logits.
        budgets: That it may choose from.
        seconds: What an image takes at each of them, as measured before; kept up to date.
        wait: How long a batch waits for more images, in seconds, while it is not full.
        largest: Images in a batch.
        target: Seconds within which all that waits shall be answered, if any budget allows that.
        limit: Images that may be admitted at a time; beyond them is refused.
    """

    def __init__(
            self,
            model: Model,
            budgets: Sequence[int],
            seconds: dict[int, float],
            wait: float = 0.004,
            largest: int = 16,
            target: float = 0.2,
            limit: int = 128,
    ) -> None:
        self.model, self.budgets, self.seconds = model, sorted(budgets), dict(seconds)
        self.wait, self.largest, self.target, self.limit = wait, largest, target, limit
        self.n_tokens = self.budgets[-1]
        self.pending = 0
        self.counts = Counts()
        self._queue: asyncio.Queue = asyncio.Queue()
        self._thread = ThreadPoolExecutor(max_workers=1)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A place among those that wait, from before a picture is decoded until its answer is there.

        Raises:
            Busy: There is none.
        """
        if self.pending >= self.limit:
            self.counts.refused += 1
            raise Busy(self.pending * self.seconds[self.budgets[0]])
        self.pending += 1
        try:
            yield
        finally:
            self.pending -= 1

    async def answer(self, image: np.ndarray) -> Answer:
        """The answer to one image (C, H, W) that was admitted."""
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((image, future))
        return await future

    async def run(self) -> None:
        """Compute batches until cancelled; what waits then is refused."""
        try:
            while True:
                batch = await self._gather()
                await self._compute(batch, self.choose(self.pending))
        finally:
            self._thread.shutdown(wait=False)
            while not self._queue.empty():
                _resolve(self._queue.get_nowait()[1], Busy(1.))

    def choose(self, waiting: int) -> int:
        """The largest budget at which so many images are answered within the target, or the smallest."""
        fits = [n for n in self.budgets if waiting * self.seconds[n] <= self.target]
        return fits[-1] if fits else self.budgets[0]

    async def _gather(self) -> list:
        batch = [await self._queue.get()]
        try:
            if self._queue.qsize() < self.largest - 1:
                await asyncio.sleep(self.wait)
        except asyncio.CancelledError:
            _resolve(batch[0][1], Busy(1.))
            raise
        while len(batch) < self.largest and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return [(image, future) for image, future in batch if not future.done()]  # the others' clients went away

    async def _compute(self, batch: list, n_tokens: int) -> None:
        if not batch:
            return
        begin = time.perf_counter()
        try:
            logits = await asyncio.get_running_loop().run_in_executor(
                self._thread, self.model, np.stack([image for image, _ in batch]), n_tokens)
        except asyncio.CancelledError:
            for _, future in batch:
                _resolve(future, Busy(1.))
            raise
        except Exception as e:  # whatever it is, nobody is left waiting
            for _, future in batch:
                _resolve(future, e)
            return
        took = (time.perf_counter() - begin) / len(batch)
        self.seconds[n_tokens] += _LATEST * (took - self.seconds[n_tokens])
        self.n_tokens = n_tokens
        self.counts.batches += 1
        self.counts.images[n_tokens] += len(batch)
        for (_, future), row in zip(batch, logits):
            _resolve(future, Answer(row, n_tokens))


def _resolve(future: asyncio.Future, value: Answer | Exception) -> None:
    if future.done():
        return
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)
