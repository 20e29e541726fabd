"""Where a search starts, and what an evaluation draws: placements of images of a data set, each by its own number."""
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...models.placement import list_placers
from ...models.prior import Saliency, compute_saliency
from ...ops.placements import sample_placement
from ...ops.samplers import check_n_tokens, get_sampler, list_samplers, split_sampler
from ...ops.windows import check_placement, check_sized

MAX_SEED = 2 ** 32


def starting_positions(
        model: nn.Module,
        images: torch.Tensor,
        init: str | torch.Tensor = 'isotropic',
        n_tokens: int | None = None,
        saliency: Saliency | None = None,
        generator: torch.Generator | None = None,
        coverage: float | None = None,
) -> torch.Tensor:
    """Where `optimize_positions` starts, a copy: with a model in eval mode, its arguments and its errors.

    (B, N, 2), or with sizes (B, N, 4), which go by `coverage`, by default the model's.
    """
    size = (images.shape[-2], images.shape[-1])
    if isinstance(init, torch.Tensor):
        check_start(init, images)
        if init.shape[-1] > 2:
            check_sized(model.patch_embed.convention, f'init of shape {tuple(init.shape)} holds spacings')
        if n_tokens is not None and n_tokens != init.shape[-2]:
            raise ValueError(f'n_tokens={n_tokens}, but init of shape {tuple(init.shape)} has {init.shape[-2]} tokens.')
        init = init.detach().expand(len(images), -1, -1)
        return torch.cat([init, init[..., 2:]], dim=-1) if init.shape[-1] == 3 else init.clone()
    coverage = model.placer.coverage() if coverage is None else coverage
    check_init(model, init)
    check_sizes(model, init, coverage)
    n_tokens = check_budget(model, n_tokens, size)
    if names_placer(init):
        return _with_placer(model, n_tokens=n_tokens, coverage=coverage).place(images).detach()  # a copy already
    prior, window = model.placer.prior, model.patch_embed.window
    maps = None
    if 'saliency' in get_sampler(init).keywords:
        maps = compute_saliency(prior.saliency if saliency is None else saliency, model.patch_embed.normalize(images))
    # Without a generator all images share one placement, as in a model in eval mode: drawn by its seed alone.
    shared = generator is None
    generator = torch.Generator().manual_seed(prior.seed) if generator is None else generator
    placement = sample_placement(
        init, n_tokens, size, 1 if shared else len(images), maps, generator, window,
        coverage=coverage, n_coarse=prior.n_coarse)
    return placement.to(images.device).expand(len(images), -1, -1).clone()


def image_generator(seed: int, index: int) -> torch.Generator:
    """Source of randomness for image number `index` of a dataset, whichever batch or process it falls to."""
    return torch.Generator().manual_seed(1_000_003 * seed + index)


def draw_placements(
        model: nn.Module,
        images: torch.Tensor,
        sampler: str,
        n_tokens: int | None,
        maps: torch.Tensor | None,
        index: torch.Tensor,
        seed: int,
        coverage: float | None = None,
) -> torch.Tensor:
    """Placements of images of a dataset, drawn for each by `seed` and its number in `index` (B,), see above.

    `sampler` may name the model's own placer, which goes by the images alone.
    """
    if names_placer(sampler):
        return starting_positions(model, images, sampler, n_tokens, coverage=coverage)
    return torch.cat([
        starting_positions(
            model, images[j:j + 1], sampler, n_tokens, None if maps is None else maps[j], image_generator(seed, i),
            coverage)
        for j, i in enumerate(index.tolist())])


def names_placer(init: str) -> bool:
    """Whether a name is that of a placer; samplers come first."""
    return init in list_placers() and init not in list_samplers()


def check_sizes(model: nn.Module, init: str, coverage: float) -> None:
    """Raise ValueError where a start has sizes and windows of the model have one."""
    if coverage or split_sampler(init)[0]:
        check_sized(model.patch_embed.convention, f'{init!r} at coverage={coverage} asks for sizes')


def check_init(model: nn.Module, init: str) -> None:
    """Raise ValueError unless `init` names a sampler, or the placer that the model has."""
    if not names_placer(init):
        get_sampler(init)
    elif model.placer.name != init:
        raise ValueError(
            f"init={init!r} is a placer, but the model's is {model.placer.name!r}: create the model with "
            f'placer={init!r}.')


def check_budget(model: nn.Module, n_tokens: int | None, image_size: tuple[int, int]) -> int:
    """A budget for images of (H, W) pixels, by default the model's own.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is below 1, or above the number of pixels.
    """
    n_tokens = model.placer.budget(image_size) if n_tokens is None else n_tokens
    check_n_tokens(n_tokens)
    H, W = image_size
    if n_tokens > H * W:
        raise ValueError(
            f'n_tokens={n_tokens} is more than the {H * W} pixels of an image of {H} x {W}: windows would only repeat.')
    return n_tokens


def check_draw_seed(seed: int) -> None:
    """Raise TypeError or ValueError unless `seed` gives the images of a data set generators of their own."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f'seed must be an int, got {seed!r} ({type(seed).__name__}).')
    if abs(seed) > MAX_SEED:
        raise ValueError(f'seed={seed} is out of range, it must lie between -2**32 and 2**32.')


def check_start(init: torch.Tensor, images: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless `init` is a placement for `images`, most of it near the image.

    A search may start, and end, somewhat outside of [0, 1]. Where most tokens are more than a side of the image away
    from it, the numbers are something else: pixels, as a rule.
    """
    check_placement(init, images)
    positions = init[..., :2]
    far = ((positions < -1.) | (positions > 2.)).any(dim=-1)
    if far.float().mean() > 0.5:
        raise ValueError(
            f'init of shape {tuple(init.shape)} lies mostly outside of the image, its largest value is '
            f'{positions.max().item():.4g}: positions are (y, x) as shares of height and width, in [0, 1]. Divide '
            f'pixels by ({images.shape[-2]}, {images.shape[-1]}).')


def _with_placer(model: nn.Module, **changes: Any) -> nn.Module:
    """A copy of a model that shares everything, but places by another budget or coverage."""
    other = copy.copy(model)
    other._modules = {**model._modules, 'placer': model.placer.replaced(**changes)}
    return other
