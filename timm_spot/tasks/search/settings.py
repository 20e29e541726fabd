"""Settings of a search, checked before any work."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info

from ...ops.sizes import SIZE_NODES
from .objectives import Objective, get_objective

MAX_STEPS = 100_000
SIZE_RATE = 10.  # a step of lr image sides moves a token, or the edges of a window of a fifth of the image, as far
SMALLEST_SPACING = 2. ** SIZE_NODES[0]  # below it a token's size is told no more
_WEIGHT_DECAY = 0.01  # what torch.optim.AdamW does unasked, and so did the authors' search


def reflect(positions: torch.Tensor) -> torch.Tensor:
    """Positions mirrored at the edges of the image until they lie in [0, 1]; those inside stay as they are."""
    mirrored = 1. - (1. - positions.remainder(2.)).abs()
    return torch.where((positions < 0) | (positions > 1), mirrored, positions)


BOUNDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = dict(
    none=lambda positions: positions,
    clamp=lambda positions: positions.clamp(0., 1.),
    reflect=reflect,
)


@dataclass(frozen=True)
class Search:
    """How to search; the same for every image.

    Attributes:
        steps, lr, optimizer, optimizer_kwargs, objective, keep, bounds, patience, tol, record, amp_dtype, chunk_size,
            optimize: See `optimize_positions`.

    Raises:
        TypeError: A value of another type.
        ValueError: A wrong range or name, or an optimizer that needs second derivatives.

    Example:
        >>> Search(steps=20, lr=1e-2).bounds
        'none'
        >>> Search(tol=float('nan'))
        Traceback (most recent call last):
        ...
        ValueError: tol=nan must be a finite number.
    """

    steps: int = 5
    lr: float = 3e-3
    optimizer: str = 'adamw'
    optimizer_kwargs: dict[str, Any] | None = None
    objective: str | Objective = 'label'
    keep: str = 'last'
    bounds: str = 'none'
    patience: int | None = None
    tol: float = 0.
    record: bool = True
    amp_dtype: torch.dtype | None = None
    chunk_size: int | None = None
    optimize: tuple[str, ...] = ('position',)

    def __post_init__(self) -> None:
        _check_choice('keep', self.keep, ('last', 'best'))
        _check_choice('bounds', self.bounds, tuple(BOUNDS))
        object.__setattr__(self, 'optimize', _check_moving(self.optimize))
        _check_int('steps', self.steps, 0)
        if self.steps > MAX_STEPS:
            raise ValueError(
                f'steps={self.steps} must be at most {MAX_STEPS:,}: every step of every image is kept in memory.')
        if self.patience is not None:
            _check_int('patience', self.patience, 1)
        if self.chunk_size is not None:
            _check_int('chunk_size', self.chunk_size, 1)
        _check_number('lr', self.lr)
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be a finite number above 0, in units of the image's side.")
        _check_number('tol', self.tol)
        if self.tol < 0:
            raise ValueError(f'tol={self.tol} must be at least 0: the smallest fall of the loss that counts.')
        amp = self.amp_dtype
        if amp is not None and not (isinstance(amp, torch.dtype) and amp.is_floating_point):
            raise TypeError(f'amp_dtype must be a floating-point type such as torch.bfloat16, got {amp!r}.')
        get_objective(self.objective)
        if not isinstance(self.optimizer, str):
            raise TypeError(f'optimizer must be a name of timm.optim, got {self.optimizer!r}.')
        if get_optimizer_info(self.optimizer).second_order:
            raise ValueError(f'optimizer={self.optimizer!r} needs second derivatives, the search has first ones only.')

    def bound(self, placement: torch.Tensor) -> torch.Tensor:
        """A placement (..., 2) or (..., 4) with its positions inside the bounds."""
        bounded = BOUNDS[self.bounds](placement[..., :2])
        return bounded if placement.shape[-1] == 2 else torch.cat([bounded, placement[..., 2:]], dim=-1)

    def unfold(self, placement: torch.Tensor) -> torch.Tensor:
        """What the optimizers move of a placement (..., 2) or (..., 4): positions, logarithms of sizes, or both."""
        parts = dict(position=placement[..., :2], size=placement[..., 2:].log() / SIZE_RATE)
        return torch.cat([parts[name] for name in self.optimize], dim=-1)

    def confine(self, moved: torch.Tensor, largest: float) -> torch.Tensor:
        """What was moved, with positions inside the bounds and spacings between a quarter of a pixel and `largest`."""
        # Rounding is not to carry one across.
        least, most = (math.log(s) / SIZE_RATE for s in (SMALLEST_SPACING, largest * (1. - 1e-5)))
        parts = dict(zip(self.optimize, moved.split(2, dim=-1)))
        limits = dict(position=BOUNDS[self.bounds], size=lambda sizes: sizes.clamp(least, most))
        return torch.cat([limits[name](part) for name, part in parts.items()], dim=-1)

    def scale(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient to what is moved as optimizers get it: that to sizes is the one to their logarithm.

        `SIZE_RATE` then makes their steps larger once, whether an optimizer goes by the size of a gradient or not.
        """
        parts = dict(zip(self.optimize, gradient.split(2, dim=-1)))
        return torch.cat([part / SIZE_RATE if name == 'size' else part for name, part in parts.items()], dim=-1)

    def fold(self, moved: torch.Tensor, placement: torch.Tensor) -> torch.Tensor:
        """The placement with what was moved in its place."""
        parts = dict(zip(self.optimize, moved.split(2, dim=-1)))
        columns = [parts.get('position', placement[..., :2])]
        if placement.shape[-1] > 2:
            columns.append((parts['size'] * SIZE_RATE).exp() if 'size' in parts else placement[..., 2:])
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def create_optimizers(self, places: Sequence[torch.Tensor]) -> list[torch.optim.Optimizer]:
        """One optimizer for the placements of all images, each a parameter of its own; or one each, where they mix."""
        optimizer = self._create_optimizer(places)
        if 'max_grad_norm' in optimizer.defaults or hasattr(optimizer, 'rng'):
            # lamb clips by the norm over all its parameters, kron draws for all from one source: images would mix.
            return [self._create_optimizer([place]) for place in places]
        return [optimizer]

    def _create_optimizer(self, places: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        arguments = {'weight_decay': _WEIGHT_DECAY, **(self.optimizer_kwargs or {})}
        if 'kron' in self.optimizer:
            arguments.setdefault('deterministic', True)  # else it draws from torch's generator
        return create_optimizer_v2(list(places), self.optimizer, lr=self.lr, **arguments)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown, use one of {', '.join(map(repr, choices))}.")


def _check_moving(optimize: Any) -> tuple[str, ...]:
    """What is to be searched, in order."""
    names = (optimize,) if isinstance(optimize, str) else tuple(optimize)
    known = ('position', 'size')
    if not names or any(name not in known for name in names):
        raise ValueError(f"optimize={optimize!r} must name 'position', 'size' or both.")
    return tuple(name for name in known if name in names)


def _check_int(name: str, value: int, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be an int, got {value!r} ({type(value).__name__}).')
    if value < smallest:
        raise ValueError(f'{name}={value} must be at least {smallest}.')


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f'{name} must be a number, got {value!r} ({type(value).__name__}).')
    if not math.isfinite(value):
        raise ValueError(f'{name}={value} must be a finite number.')
