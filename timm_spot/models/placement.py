"""Where tokens lie and how large they are: the modules that place tokens, and the registry of these.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

A `Placer` turns images (B, C, H, W) into a placement: positions (B, N, 2), or positions and spacings (B, N, 4).
`SampledPlacer` draws it by a registered sampler and looks at an image at most through its saliency; a network that
looks for itself is a class of its own, see `register_placer`.
"""
from __future__ import annotations

import dataclasses
import difflib
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, Optional, TypeVar

import torch
from timm.models import register_notrace_module
from torch import nn

from ..ops.placements import sample_placement
from ..ops.samplers import derive_seed, get_sampler, lattice_shape, split_sampler
from ..ops.sizes import check_coverage
from ._shallow import shallow_copy
from .prior import ImageSize, Prior, compute_saliency

SAMPLED = 'sampled'  # the placer that a model has unless it is given another


class _Plan(NamedTuple):
    """All that a placement without a look at the image depends on; `dtype` is torch's default, which draws follow."""

    sampler: str
    n_tokens: int
    image_size: ImageSize
    window: int
    seed: int
    coverage: float
    n_coarse: int | None
    device: torch.device
    dtype: torch.dtype


@lru_cache(maxsize=256)
def _carry_out(plan: _Plan) -> torch.Tensor:
    """The placement (1, N, 2) of a plan, or (1, N, 4)."""
    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(plan.seed)
        return sample_placement(
            plan.sampler, plan.n_tokens, plan.image_size, generator=generator, window=plan.window,
            coverage=plan.coverage, n_coarse=plan.n_coarse).contiguous().to(plan.device)

    # A thread of its own knows nothing of the caller's inference mode, default device or the fake tensors of
    # torch.export, any of which would make the kept placement unusable for the next caller.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(draw).result()


@torch.compiler.assume_constant_result
def _fixed_placement(
        sampler: str, n_tokens: int, image_size: ImageSize, window: int, seed: int, coverage: float,
        n_coarse: int | None, device: torch.device,
) -> torch.Tensor:
    """The one placement that all images of a size share, a constant to exported programs; a copy."""
    return _carry_out(_Plan(
        sampler, n_tokens, image_size, window, seed, coverage, n_coarse, device, torch.get_default_dtype())).clone()


# To `torch.compile` it is an operator: one program then serves all sizes and budgets.
@torch.library.custom_op('timm_spot::fixed_placement', mutates_args=())
def _placement_operator(
        sampler: str, n_tokens: int, height: int, width: int, window: int, seed: int, coverage: float,
        n_coarse: Optional[int], device: torch.device, columns: int,
) -> torch.Tensor:
    return _fixed_placement(sampler, n_tokens, (height, width), window, seed, coverage, n_coarse, device)


@_placement_operator.register_fake
def _(
        sampler: str, n_tokens: int, height: int, width: int, window: int, seed: int, coverage: float,
        n_coarse: Optional[int], device: torch.device, columns: int,
) -> torch.Tensor:
    return torch.empty(1, n_tokens, columns, dtype=torch.float32, device=device)


def fixed_placement(
        sampler: str,
        n_tokens: int,
        image_size: ImageSize,
        window: int,
        device: torch.device,
        seed: int = 0,
        coverage: float = 0.,
        n_coarse: int | None = None,
) -> torch.Tensor:
    """`sample_placement` of a sampler without a look at the image, kept for each size: (1, N, 2), or (1, N, 4)."""
    arguments = (window, seed, coverage, n_coarse, device)
    if torch.compiler.is_dynamo_compiling():
        columns = 2 if coverage == 0. and not split_sampler(sampler)[0] else 4
        return _placement_operator(sampler, n_tokens, image_size[0], image_size[1], *arguments, columns)
    return _fixed_placement(sampler, n_tokens, image_size, *arguments)


@register_notrace_module
class Placer(nn.Module):
    """Images to placements: the base of `SampledPlacer` and of placement networks of one's own.

    Shapes: images (B, C, H, W), normalised, float32; positions (B, N, 2), (y, x) in [0, 1], with N = `budget((H, W))`.
    With spacings (y, x) in pixels in two more columns it sizes its windows too; otherwise the model does, by the
    distances between tokens, where there is a `coverage()`. An image's placement must not depend on its neighbours in
    the batch.

    A subclass is registered by `timm_spot.register_placer`, built with the two priors, and calls this `__init__` with
    them. It works in float32 whatever the precision of the model around it, since coarser coordinates misplace windows.

    Args:
        train_prior: What holds in train mode.
        eval_prior: What holds in eval mode.

    Attributes:
        name: Under which it is registered.
        batches: Training batches placed so far, by which the random budgets go.
    """

    name = ''

    def __init__(self, train_prior: Prior, eval_prior: Prior) -> None:
        super().__init__()
        self.batches = 0
        self.set_priors(train_prior, eval_prior)

    def set_priors(self, train_prior: Prior, eval_prior: Prior) -> None:
        """Change what holds in train mode and in eval mode."""
        self.train_prior = train_prior
        self.eval_prior = eval_prior

    @property
    def prior(self) -> Prior:
        """What holds in the mode (train, eval) that the placer is in."""
        return self.train_prior if self.training else self.eval_prior

    @property
    def reads_images(self) -> bool:
        """Whether positions depend on the pixels, not only on the images' size."""
        return True

    @property
    def source(self) -> str:
        """Who places the tokens, for messages."""
        return f'placer {self.name!r}'

    def budget(self, image_size: ImageSize) -> int:
        """Tokens of each image of (H, W) pixels; in train mode those of this batch, where its budget is drawn.

        The draw follows from the seed and the number of the batch, so that all processes draw the same.

        Raises:
            ValueError: The budget exceeds the pixels of the image.
        """
        low, high = self.prior.budgets(image_size)
        if high > image_size[0] * image_size[1]:
            raise ValueError(f'n_tokens={high} exceeds the pixels of an image of {image_size[0]} x {image_size[1]}.')
        if not (self.training and low < high):
            return high
        return min(high, int(low * ((high + 1) / low) ** self._share()))

    def coverage(self) -> float:
        """How much of its cell a window covers; in train mode that of this batch, where it is drawn."""
        low, high = check_coverage(self.prior.coverage)
        return low + (high - low) * self._share(1) if self.training and low < high else high

    def _share(self, *numbers: int) -> float:
        """A random number in [0, 1) that follows from the seed, the number of the batch and other numbers."""
        generator = torch.Generator().manual_seed(derive_seed(self.prior.seed, self.batches, *numbers))
        return torch.rand((), generator=generator, dtype=torch.float64, device='cpu').item()

    def lattice(self, image_size: ImageSize) -> tuple[int, int] | None:
        """Rows and columns of the lattice on which the tokens of all images of (H, W) pixels lie, None without one."""
        return None

    def replaced(self, **changes: Any) -> Placer:
        """A copy that shares the weights, with fields of both priors changed.

        Example:
            >>> placer = SampledPlacer(Prior(), Prior())
            >>> placer.replaced(n_tokens=9).budget((64, 64)), placer.budget((64, 64))
            (9, 16)
        """
        placer = shallow_copy(self)
        placer.set_priors(*(dataclasses.replace(prior, **changes) for prior in (self.train_prior, self.eval_prior)))
        return placer

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Keep the weights in float32 where the model around them is cast to half precision."""
        def cast(t: torch.Tensor) -> torch.Tensor:
            out = fn(t)
            return t.to(out.device) if t.is_floating_point() and out.dtype.itemsize < 4 else out

        return super()._apply(cast, recurse)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f'{type(self).__name__} must define forward(images) -> positions (B, N, 2).')


@register_notrace_module
class SampledPlacer(Placer):
    """Places tokens by a registered sampler.

    In eval mode it draws once for its seed, budget and image size and gives every image that placement, so that an
    image's placement never depends on its neighbours or on how often the model was called; in train mode it draws anew
    for each image and call, from torch's global generator.
    """

    name = SAMPLED

    def set_priors(self, train_prior: Prior, eval_prior: Prior) -> None:
        super().set_priors(train_prior, eval_prior)
        # A network that gives the maps is a part of the model: saved, moved and trained with it.
        saliency = train_prior.saliency
        self.saliency_network = saliency if isinstance(saliency, nn.Module) else None

    @property
    def reads_images(self) -> bool:
        return self.prior.needs_saliency

    @property
    def source(self) -> str:
        return f'sampler {self.prior.sampler!r}'

    def lattice(self, image_size: ImageSize) -> tuple[int, int] | None:
        prior = self.prior
        if not get_sampler(prior.sampler).deterministic or (self.training and prior.draws_budget):
            return None
        n_tokens = operator.index(self.budget(image_size))
        placement = fixed_placement(
            prior.sampler, n_tokens, image_size, prior.window, torch.device('cpu'), prior.seed, self.coverage(),
            prior.n_coarse)
        return lattice_shape(placement[..., :2])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        (B, _, H, W), prior = images.shape, self.prior
        n_tokens, size, coverage = self.budget((H, W)), (H, W), self.coverage()
        sizes = dict(window=prior.window, coverage=coverage, n_coarse=prior.n_coarse)
        if prior.needs_saliency:
            maps = compute_saliency(prior.saliency, images)
            generator = None if self.training else torch.Generator().manual_seed(prior.seed)
            # One draw for a batch of maps shares its random numbers: each placement then depends on its map alone.
            positions = sample_placement(
                prior.sampler, n_tokens, size, B if self.training else 1, maps, generator, **sizes)
            if positions.shape[0] not in (1, B):
                raise ValueError(f'saliency of shape {tuple(maps.shape)} does not match a batch of {B} images.')
        elif self.training and not get_sampler(prior.sampler).deterministic:
            positions = sample_placement(prior.sampler, n_tokens, size, B, **sizes)
        else:
            positions = fixed_placement(
                prior.sampler, n_tokens, size, prior.window, images.device, prior.seed, coverage, prior.n_coarse)
        return positions.to(images.device).expand(B, -1, -1)


_PLACERS: dict[str, type[Placer]] = {SAMPLED: SampledPlacer}
PlacerClass = TypeVar('PlacerClass', bound=type[Placer])


def register_placer(name: str) -> Callable[[PlacerClass], PlacerClass]:
    """Class decorator that registers a `Placer` under a name, for `placer=name` wherever `sampler=` can be given.

    Args:
        name: A name not yet taken.

    Raises:
        TypeError, ValueError: The class is no `Placer`, the name is taken.

    Example:
        >>> import timm, timm_spot, torch
        >>> @timm_spot.register_placer('brightest_row')
        ... class BrightestRow(timm_spot.Placer):
        ...     def forward(self, images):
        ...         y = (images.mean(dim=(1, 3)).argmax(dim=1) + 0.5) / images.shape[2]
        ...         n = self.budget(images.shape[-2:])
        ...         x = (torch.arange(n, device=images.device) + 0.5) / n
        ...         return torch.stack([y[:, None].expand(-1, n), x.expand(len(y), -1)], dim=-1)
        >>> model = timm.create_model('spot_vit_pico_patch8_64', placer='brightest_row', n_tokens=4).eval()
        >>> model.place(torch.zeros(1, 3, 64, 64))[0, 0].tolist()
        [0.0078125, 0.125]
    """
    if name in _PLACERS:
        raise ValueError(f'name={name!r} is already a placer, choose another name.')

    def decorator(cls: PlacerClass) -> PlacerClass:
        if not (isinstance(cls, type) and issubclass(cls, Placer)):
            raise TypeError(f'placer {name!r} must be a subclass of timm_spot.Placer, got {cls!r}.')
        cls.name = name
        _PLACERS[name] = register_notrace_module(cls)
        return cls

    return decorator


def list_placers() -> list[str]:
    """Names of all placers, sorted."""
    return sorted(_PLACERS)


def get_placer(name: str) -> type[Placer]:
    """Look up a placer.

    Raises:
        ValueError: Unknown name; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in _PLACERS:
        close = difflib.get_close_matches(str(name), _PLACERS, n=1)
        hint = f' (did you mean {close[0]!r}?)' if close else ''
        raise ValueError(f"placer={name!r} is unknown{hint}, the placers are {', '.join(list_placers())}.")
    return _PLACERS[name]
