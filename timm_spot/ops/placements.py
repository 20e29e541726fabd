"""Placements: positions of tokens drawn by a sampler, and their sizes.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .samplers import check_n_tokens, get_sampler, split_sampler
from .sizes import cell_spacing, check_coverage, check_n_coarse, neighbour_cells

_STATISTICS = 2 ** 16  # draws to be counted, on images of fewer pixels too
_MOST_POSITIONS = 2 ** 28  # in one call: 2 GB


def sample_positions(
        sampler: str,
        n_tokens: int,
        image_size: tuple[int, int],
        batch_size: int = 1,
        saliency: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        window: int = 16,
        **options: Any,
) -> torch.Tensor:
    """Draw placements from a spatial prior, without sizes.

    Args:
        sampler: Name of the prior, see `list_samplers`, or 'coarse+NAME': some coarse windows over all of the
            picture, the others by prior NAME.
        n_tokens: Tokens of each image, at least 1 and at most H * W (or 65,536, for statistics on small images).
        image_size: (H, W) in pixels.
        batch_size: Number of placements; stochastic samplers draw each anew.
        saliency: (batch_size, H, W) or (H, W), non-negative; for the `salient` samplers and any that ask for it. Under
            `batch_size=1` it may hold B maps: they share one set of random numbers, and B placements come back.
        generator: Source of randomness, torch's global generator by default.
        window: Side of a window in pixels; only `grid` looks at it.
        **options: Keywords of the sampler's own: `spread=True` and `inverse=True` for `salient`, which `salient_sobol`
            and `salient_inverse` set by name; `power=` and `floor=` for `salient_lattice`.

    Returns:
        Positions (y, x) in [0, 1], float32, of shape (batch_size, n_tokens, 2), on the CPU
        (for samplers that use `saliency`: on its device).

    Raises:
        TypeError: `n_tokens`, `batch_size` or `window` is no int, `saliency` no tensor, the sampler knows no such
            option, or its positions are no float32 or float64.
        ValueError: An unknown sampler, a budget it cannot serve, an impossible size, a missing or wrong map.

    Example:
        >>> sample_positions('isotropic', 4, (224, 224))[0].tolist()
        [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    """
    return sample_placement(
        sampler, n_tokens, image_size, batch_size, saliency, generator, window, **options)[..., :2].contiguous()


def sample_placement(
        sampler: str,
        n_tokens: int,
        image_size: tuple[int, int],
        batch_size: int = 1,
        saliency: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        window: int = 16,
        coverage: float = 0.,
        n_coarse: int | None = None,
        **options: Any,
) -> torch.Tensor:
    """`sample_positions` with the sizes of windows.

    Args:
        sampler, n_tokens, image_size, batch_size, saliency, generator, window, **options: As in `sample_positions`.
        coverage: How much of its cell a window covers, in [0, 1], see `timm_spot.ops.sizes`.
        n_coarse: Under 'coarse+NAME', how many of the tokens are coarse; by default the largest square up to two
            thirds. These tile the picture, whatever the coverage of the others.

    Returns:
        Positions, of shape (batch_size, n_tokens, 2), where coverage is 0; else positions and spacings (y, x) in
        pixels, (batch_size, n_tokens, 4), float32.

    Raises:
        TypeError, ValueError: As `sample_positions`, or coverage is no number in [0, 1].

    Example:
        >>> sample_placement('isotropic', 4, (64, 64), window=8, coverage=1.)[0, 0]  # windows of 32 px
        tensor([0.2500, 0.2500, 4.0000, 4.0000])
        >>> sample_placement('coarse+center', 25, (64, 64), window=8)[0, 15:17, 2]  # the last coarse, the first fine
        tensor([2., 1.])
    """
    coarse, name = split_sampler(sampler)
    get_sampler(sampler)
    check_coverage(coverage)
    image_size = _check_sizes(n_tokens, image_size, batch_size, window)
    if not coarse:
        drawn = _draw(name, n_tokens, image_size, batch_size, saliency, generator, window, **options)
        positions = drawn[..., :2]
        if coverage == 0.:
            return positions.contiguous()  # saved, it is not to bring the cells along
        cells = drawn[..., 2:] if drawn.shape[-1] == 4 else neighbour_cells(positions, image_size)
        return torch.cat([positions, cell_spacing(cells, image_size, window, coverage)], dim=-1)

    n_coarse = check_n_coarse(n_coarse, n_tokens)
    parts = [sample_placement('isotropic', n_coarse, image_size, window=window, coverage=1.)]
    if n_coarse < n_tokens:
        fine = sample_placement(
            name, n_tokens - n_coarse, image_size, batch_size, saliency, generator, window, coverage, **options)
        parts.append(F.pad(fine, (0, 4 - fine.shape[-1]), value=1.))  # of spacing 1
    rows = max(batch_size, parts[-1].shape[0])
    return torch.cat([part.to(parts[-1].device).expand(rows, -1, -1) for part in parts], dim=1)


def _draw(
        sampler: str,
        n_tokens: int,
        image_size: tuple[int, int],
        batch_size: int,
        saliency: torch.Tensor | None,
        generator: torch.Generator | None,
        window: int,
        **options: Any,
) -> torch.Tensor:
    """What a sampler returns, checked and in float32: (batch_size, n_tokens, 2), or 4 with cells."""
    draw, _, keywords = get_sampler(sampler)
    rows = batch_size
    if 'saliency' in keywords:
        saliency = _check_saliency(sampler, saliency, image_size, batch_size)
        rows = max(batch_size, saliency.shape[0])
    available = dict(
        n_tokens=n_tokens, image_size=image_size, batch_size=batch_size, saliency=saliency, generator=generator,
        window=window)
    drawn = draw(**{k: available[k] for k in keywords}, **options)
    if drawn.shape[-1:] not in ((2,), (4,)) or tuple(drawn.shape[:-1]) not in ((n_tokens,), (rows, n_tokens)):
        raise ValueError(
            f'sampler {sampler!r} returned shape {tuple(drawn.shape)}, expected ({rows}, {n_tokens}, 2), or 4 columns '
            'with the height and width of cells.')
    if drawn.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f'sampler {sampler!r} returned {drawn.dtype}, too coarse for positions: name dtype=torch.float32 where '
            'it makes tensors.')
    # Float32 rounding may carry a draw just below 1 up to 1, never beyond.
    return drawn.to(torch.float32).clamp(0., 1.).expand(rows, -1, -1)


def _check_sizes(n_tokens: int, image_size: Sequence[int], batch_size: int, window: int) -> tuple[int, int]:
    """Raise TypeError or ValueError for what no placement can have, before anything is drawn; the size in integers."""
    check_n_tokens(n_tokens)
    for name, value in (('batch_size', batch_size), ('window', window)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f'{name} must be an int, got {value!r} ({type(value).__name__}).')
        if value < 1:
            raise ValueError(f'{name}={value} must be at least 1.')
    if len(image_size) != 2 or not all(side >= 1 for side in image_size):
        raise ValueError(f'image_size={tuple(image_size)} must be (height, width) in pixels, each at least 1.')
    H, W = int(image_size[0]), int(image_size[1])
    if n_tokens > max(H * W, _STATISTICS):
        raise ValueError(
            f'n_tokens={n_tokens} exceeds the {H * W} pixels of an image of {H} x {W} px: more tokens than pixels see '
            'nothing new.')
    if batch_size * n_tokens > _MOST_POSITIONS:
        raise ValueError(
            f'batch_size={batch_size} placements of n_tokens={n_tokens} are more than {_MOST_POSITIONS} positions: '
            'draw fewer at a time.')
    return H, W


def _check_saliency(
        sampler: str,
        saliency: torch.Tensor | None,
        image_size: tuple[int, int],
        batch_size: int,
) -> torch.Tensor:
    if saliency is None:
        raise ValueError(f'sampler={sampler!r} needs a saliency map: pass saliency=, a tensor of shape (B, H, W).')
    if not isinstance(saliency, torch.Tensor):
        raise TypeError(f'saliency must be a tensor of shape (B, H, W), got {type(saliency).__name__}.')
    saliency = saliency[None] if saliency.ndim == 2 else saliency
    if saliency.ndim != 3 or tuple(saliency.shape[-2:]) != image_size:
        raise ValueError(f'saliency of shape {tuple(saliency.shape)} does not cover images of {image_size}.')
    if batch_size != 1 and saliency.shape[0] not in (1, batch_size):
        raise ValueError(f'saliency of shape {tuple(saliency.shape)} does not match batch_size={batch_size}.')
    if not saliency.isfinite().all():
        raise ValueError(f'saliency of shape {tuple(saliency.shape)} holds NaN or infinity.')
    if (saliency < 0).any():
        raise ValueError(f'saliency must not be negative, its smallest value is {saliency.min().item():.3g}.')
    empty = (saliency.flatten(1).sum(dim=1) <= 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f'saliency is zero everywhere in map {empty[0]}: nowhere to place a token.')
    return saliency
