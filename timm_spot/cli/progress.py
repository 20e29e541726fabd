"""How far a command is: a bar on a terminal, elsewhere a line of a log now and then."""
from __future__ import annotations

import math
import sys
import time
from contextlib import contextmanager
from typing import Iterator, Protocol

import click

EVERY = 10.  # seconds between two lines of a log


class Progress(Protocol):
    def update(self, n_steps: int, current_item: str | None = None) -> None:
        """So many more are done; what of is named beside them."""


class _Log:
    def __init__(self, length: int, label: str, every: float) -> None:
        self.length, self.label, self.every = length, label, every
        self.done, self.due = 0, time.monotonic() + every

    def update(self, n_steps: int, current_item: str | None = None) -> None:
        self.done += n_steps
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + self.every
            click.echo(
                f'{self.label}: {self.done} of {self.length}{f", {current_item}" if current_item else ""}', err=True)


@contextmanager
def show_progress(length: int, label: str, shown: bool = True) -> Iterator[Progress]:
    """What to tell of work as it is done.

    Args:
        length: How much there is.
        label: What is being done.
        shown: Show nothing otherwise, as in all but one of several processes.

    Example:
        >>> with show_progress(3, 'evaluate') as progress:
        ...     progress.update(1, 'grid, 25 tokens')
    """
    if shown and sys.stderr.isatty():
        with click.progressbar(
                length=length, label=label, file=sys.stderr, show_pos=True, item_show_func=lambda item: item) as bar:
            yield bar
    else:
        yield _Log(length, label, EVERY if shown else math.inf)
