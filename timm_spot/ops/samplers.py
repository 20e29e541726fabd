"""Samplers: spatial priors that draw placements.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

A sampler is a function that takes any of the keywords below and returns positions (y, x) in [0, 1], of shape
(batch_size, n_tokens, 2), or (n_tokens, 2) when all images share them:

    n_tokens, image_size, batch_size, saliency, generator, window

It may return four columns instead of two: y, x, and the height and width of the token's cell in fractions of the image,
see `sizes.py`. `placements.py` draws by name.
"""
from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .density import place_by_density, shape_density
from .lattices import center, grid, grid_center, grid_uniform, isotropic
from .lattices import lattice_shape as lattice_shape
from .seeds import check_seed as check_seed
from .seeds import derive_seed as derive_seed

_KEYWORDS = ('n_tokens', 'image_size', 'batch_size', 'saliency', 'generator', 'window')


Draw = Callable[..., torch.Tensor]


class _Sampler(NamedTuple):
    draw: Draw
    deterministic: bool
    keywords: tuple[str, ...]


_SAMPLERS: dict[str, _Sampler] = {}
_ALIASES = {'gauss': 'gaussian'}
_COARSE = 'coarse+'  # in front of a name: some coarse tokens, the others by that sampler


def register_sampler(name: str, deterministic: bool = False) -> Callable[[Draw], Draw]:
    """Decorator that registers a sampler under a name, for `sampler=name` everywhere.

    The function takes, by name, whichever it needs of `n_tokens`, `image_size` (H, W), `batch_size`, `saliency`
    (B, H, W), `generator` (torch.Generator or None) and `window` (pixels), and returns positions of shape
    (batch_size, n_tokens, 2) or (n_tokens, 2), or 4 columns with the height and width of each token's cell.

    Args:
        name: A name not yet taken.
        deterministic: The result depends on `n_tokens`, `image_size` and `window` only.

    Raises:
        ValueError: The name is taken, or the function asks for something a sampler is not given.

    Example:
        >>> import torch, timm_spot
        >>> @timm_spot.register_sampler('middle_row', deterministic=True)
        ... def middle_row(n_tokens, **_):
        ...     x = (torch.arange(n_tokens) + 0.5) / n_tokens
        ...     return torch.stack([torch.full_like(x, 0.5), x], dim=-1)
        >>> timm_spot.sample_positions('middle_row', 2, (224, 224))
        tensor([[[0.5000, 0.2500],
                 [0.5000, 0.7500]]])
    """
    if name.startswith(_COARSE):
        raise ValueError(f'name={name!r}: {_COARSE!r} in front of a name stands for coarse tokens beside it.')
    if name in _SAMPLERS or name in _ALIASES:
        raise ValueError(f'name={name!r} is already a sampler, choose another name.')

    def decorator(fn: Draw) -> Draw:
        parameters = inspect.signature(fn).parameters.values()
        takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        unknown = [p.name for p in named if p.name not in _KEYWORDS and p.default is p.empty]
        if unknown:
            raise ValueError(
                f"sampler {name!r} asks for {', '.join(unknown)}, but samplers are given {', '.join(_KEYWORDS)}.")
        names = {p.name for p in named}
        # A sampler that names `saliency` needs a map, one that merely swallows **kwargs does not.
        keywords = tuple(k for k in _KEYWORDS if k in names or (takes_all and k != 'saliency'))
        _SAMPLERS[name] = _Sampler(fn, deterministic, keywords)
        return fn

    return decorator


def list_samplers() -> list[str]:
    """Names of all samplers, sorted."""
    return sorted(_SAMPLERS)


def split_sampler(name: str) -> tuple[bool, str]:
    """Whether a placement is mixed with coarse tokens, and the name of the sampler.

    Example:
        >>> split_sampler('coarse+center'), split_sampler('center')
        ((True, 'center'), (False, 'center'))
    """
    coarse = isinstance(name, str) and name.startswith(_COARSE)
    return coarse, name[len(_COARSE):] if coarse else name


def get_sampler(name: str) -> _Sampler:
    """Look up a sampler, of 'coarse+NAME' that of NAME.

    Raises:
        ValueError: Unknown name; the message lists the known ones.
    """
    _, name = split_sampler(name)
    sampler = _SAMPLERS.get(_ALIASES.get(name, name)) if isinstance(name, str) else None
    if sampler is None:
        close = difflib.get_close_matches(str(name), _SAMPLERS, n=1)
        hint = f' (did you mean {close[0]!r}?)' if close else ''
        raise ValueError(f"sampler={name!r} is unknown{hint}, the samplers are {', '.join(list_samplers())}.")
    return sampler


def check_n_tokens(n_tokens: Any) -> None:
    """Raise TypeError or ValueError unless `n_tokens` is a whole number of at least 1."""
    if isinstance(n_tokens, bool) or not isinstance(n_tokens, int):
        raise TypeError(f'n_tokens must be an int, got {n_tokens!r} ({type(n_tokens).__name__}).')
    if n_tokens < 1:
        raise ValueError(f'n_tokens={n_tokens} is not a budget, it must be at least 1.')


def check_budgets(n_tokens: int | Sequence[int]) -> tuple[int, int]:
    """Smallest and largest of a fixed budget n, or of budgets (low, high).

    Raises:
        TypeError: Not a whole number, nor two.
        ValueError: A budget below 1, or the first above the second.
    """
    if not isinstance(n_tokens, Sequence) or isinstance(n_tokens, str):
        check_n_tokens(n_tokens)
        return n_tokens, n_tokens
    if len(n_tokens) != 2:
        raise TypeError(f'n_tokens={n_tokens!r} must be one budget or two, the smallest and the largest of a range.')
    for n in n_tokens:
        check_n_tokens(n)
    low, high = n_tokens
    if low > high:
        raise ValueError(f'n_tokens={n_tokens!r} is out of order: give the smaller budget first, ({high}, {low}).')
    return low, high


@register_sampler('uniform')
def uniform(n_tokens: int, batch_size: int, generator: torch.Generator | None) -> torch.Tensor:
    """Independent draws from U[0, 1]^2."""
    return torch.rand(batch_size, n_tokens, 2, generator=generator, **_kind(generator))


@register_sampler('gaussian')
def gaussian(n_tokens: int, batch_size: int, generator: torch.Generator | None) -> torch.Tensor:
    """Independent draws from N(0.5, 1 / pi) (standard deviation), clamped to the image."""
    noise = torch.randn(batch_size, n_tokens, 2, generator=generator, **_kind(generator))
    return (0.5 + noise / math.pi).clamp(0., 1.)


@register_sampler('sobol')
def sobol(n_tokens: int, batch_size: int, generator: torch.Generator | None) -> torch.Tensor:
    """Scrambled Sobol points: as random as uniform draws, but evenly spread. Another scrambling for each image."""
    from scipy.stats import qmc

    kind = dict(_kind(generator), dtype=torch.int64)
    seeds = torch.randint(2 ** 31, (batch_size,), generator=generator, **kind).tolist()
    log2 = math.ceil(math.log2(n_tokens))
    points = [qmc.Sobol(d=2, rng=seed).random_base2(log2)[:n_tokens] for seed in seeds]
    return torch.stack([torch.from_numpy(p) for p in points])


register_sampler('isotropic', deterministic=True)(isotropic)
register_sampler('center', deterministic=True)(center)
register_sampler('grid', deterministic=True)(grid)
register_sampler('grid_uniform', deterministic=True)(grid_uniform)
register_sampler('grid_center', deterministic=True)(grid_center)


@register_sampler('salient')
def salient(
        n_tokens: int,
        batch_size: int,
        saliency: torch.Tensor,
        generator: torch.Generator | None,
        spread: bool = False,
        inverse: bool = False,
) -> torch.Tensor:
    """Draws from a saliency map by its inverse distribution function: a row first, then a column of that row.

    Args:
        n_tokens: Tokens of each image.
        batch_size: Number of placements; with 1, all maps share one set of random numbers.
        saliency: (B, H, W), non-negative, no map zero everywhere.
        generator: Source of randomness.
        spread: Invert scrambled Sobol points instead of independent draws, so that tokens crowd less.
        inverse: Draw from the background, the map's largest value minus the map (all of it where the map is constant).

    Returns:
        Positions (batch_size or B, n_tokens, 2), each inside a pixel of positive weight.
    """
    maps = saliency.double()
    if inverse:
        maps = maps.amax(dim=(1, 2), keepdim=True) - maps
        maps = torch.where(maps.amax(dim=(1, 2), keepdim=True) > 0, maps, 1.)
    points = (sobol if spread else uniform)(n_tokens, batch_size, generator).to(maps.device, maps.dtype)
    B = max(batch_size, maps.shape[0])
    maps, points = maps.expand(B, -1, -1), points.expand(B, -1, -1)
    y, inside_y = _invert(maps.sum(dim=2), points[..., 0])
    rows = maps.gather(1, y[..., None].expand(-1, -1, maps.shape[2]))  # B N W
    x, inside_x = _invert(rows, points[..., 1:])
    size = torch.tensor(maps.shape[1:], dtype=maps.dtype, device=maps.device)
    return torch.stack([y + inside_y, (x + inside_x)[..., 0]], dim=-1) / size


@register_sampler('salient_sobol')
def salient_sobol(
        n_tokens: int,
        batch_size: int,
        saliency: torch.Tensor,
        generator: torch.Generator | None,
) -> torch.Tensor:
    """Scrambled Sobol points carried to the saliency map: its density, but evenly spread."""
    return salient(n_tokens, batch_size, saliency, generator, spread=True)


@register_sampler('salient_inverse')
def salient_inverse(
        n_tokens: int,
        batch_size: int,
        saliency: torch.Tensor,
        generator: torch.Generator | None,
) -> torch.Tensor:
    """Independent draws from the background of a saliency map, for control experiments."""
    return salient(n_tokens, batch_size, saliency, generator, inverse=True)


@register_sampler('salient_lattice')
def salient_lattice(
        n_tokens: int,
        image_size: tuple[int, int],
        batch_size: int,
        saliency: torch.Tensor,
        power: float = 1.,
        floor: float = 0.02,
) -> torch.Tensor:
    """The isotropic lattice carried to a saliency map by its inverse distribution function: nothing is drawn.

    Args:
        n_tokens: Tokens of each image.
        image_size: (H, W) in pixels.
        batch_size: Number of placements; with 1 as many as there are maps.
        saliency: (B, H, W), non-negative, no map zero everywhere.
        power: To which the map is raised: above 1 tokens crowd where it is large, below 1 they spread.
        floor: Share of the density that is spread evenly, in [0, 1]; 1 leaves the lattice as it is.

    Returns:
        Positions and cells, (batch_size or B, n_tokens, 4); with coverage 1 the windows of whole rows tile the picture.

    Raises:
        ValueError: A power that is not positive, a floor outside of [0, 1].
    """
    if not 0. < power < math.inf:
        raise ValueError(f'power={power!r} must be positive.')
    if not 0. <= floor <= 1.:
        raise ValueError(f'floor={floor!r} must lie in [0, 1].')
    lattice = isotropic(n_tokens, image_size)
    placed = place_by_density(lattice, shape_density(saliency.double(), power, floor))
    return placed.expand(max(batch_size, placed.shape[0]), -1, -1)


def _invert(weights: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert the distribution over bins (..., L) at shares (..., K) of its total: bin and place inside it, (..., K)."""
    cumulative = weights.cumsum(dim=-1)
    target = share * cumulative[..., -1:]
    # right=True skips bins of weight zero; the last positive one guards against a target rounded up to the total.
    last = (weights.shape[-1] - 1) - (weights > 0).flip(-1).int().argmax(dim=-1, keepdim=True)
    index = torch.searchsorted(cumulative, target, right=True).minimum(last)
    weight = weights.gather(-1, index)
    inside = ((target - cumulative.gather(-1, index) + weight) / weight).clamp(0., 1.)
    # Stay a thousandth of a bin off its edges, so that rounding to float32 cannot cross them.
    return index, 0.001 + 0.998 * inside


def _kind(generator: torch.Generator | None) -> dict[str, Any]:
    """Device and dtype of random numbers: the generator's, and float32."""
    # Named outright, so that placements do not depend on torch's default dtype or on `with torch.device('meta')`.
    return dict(device='cpu' if generator is None else generator.device, dtype=torch.float32)
