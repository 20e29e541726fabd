"""Samplers: spatial priors that draw placements.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

A sampler is a function that takes any of the keywords below and returns positions (y, x) in [0, 1], of shape
(batch_size, n_tokens, 2), or (n_tokens, 2) when all images share them:

    n_tokens, image_size, batch_size, saliency, generator, window
"""
from __future__ import annotations

import difflib
import hashlib
import inspect
import itertools
import math
import operator
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch

_KEYWORDS = ('n_tokens', 'image_size', 'batch_size', 'saliency', 'generator', 'window')


class _Sampler(NamedTuple):
    draw: Callable[..., torch.Tensor]
    deterministic: bool
    keywords: Tuple[str, ...]


_SAMPLERS: Dict[str, _Sampler] = {}
_ALIASES = {'gauss': 'gaussian'}


def register_sampler(name: str, deterministic: bool = False) -> Callable[[Callable], Callable]:
    """Decorator that registers a sampler under a name, for `sampler=name` everywhere.

    The function takes, by name, whichever it needs of `n_tokens`, `image_size` (H, W), `batch_size`, `saliency`
    (B, H, W), `generator` (torch.Generator or None) and `window` (pixels), and returns positions of shape
    (batch_size, n_tokens, 2) or (n_tokens, 2).

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
    if name in _SAMPLERS or name in _ALIASES:
        raise ValueError(f'name={name!r} is already a sampler, choose another name.')

    def decorator(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
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


def list_samplers() -> List[str]:
    """Names of all samplers, sorted."""
    return sorted(_SAMPLERS)


def get_sampler(name: str) -> _Sampler:
    """Look up a sampler.

    Raises:
        ValueError: Unknown name; the message lists the known ones.
    """
    sampler = _SAMPLERS.get(_ALIASES.get(name, name)) if isinstance(name, str) else None
    if sampler is None:
        close = difflib.get_close_matches(str(name), _SAMPLERS, n=1)
        hint = f' (did you mean {close[0]!r}?)' if close else ''
        raise ValueError(f"sampler={name!r} is unknown{hint}, the samplers are {', '.join(list_samplers())}.")
    return sampler


def check_n_tokens(n_tokens: int) -> None:
    """Raise TypeError or ValueError unless `n_tokens` is a whole number of at least 1."""
    if isinstance(n_tokens, bool) or not isinstance(n_tokens, int):
        raise TypeError(f'n_tokens must be an int, got {n_tokens!r} ({type(n_tokens).__name__}).')
    if n_tokens < 1:
        raise ValueError(f'n_tokens={n_tokens} is not a budget, it must be at least 1.')


def check_budgets(n_tokens: Union[int, Sequence[int]]) -> Tuple[int, int]:
    """Smallest and largest of a fixed budget n, or of budgets (low, high).

    Raises:
        TypeError: Not a whole number, nor two.
        ValueError: A budget below 1, or the first above the second.
    """
    if not isinstance(n_tokens, (tuple, list)):
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


def check_seed(seed: int) -> None:
    """Raise TypeError or ValueError unless `seed` is a whole number that a torch.Generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f'seed must be an int, got {seed!r} ({type(seed).__name__}).')
    if not -2 ** 63 <= seed < 2 ** 64:
        raise ValueError(f'seed={seed} is out of range, generators of random numbers take -2**63 to 2**64 - 1.')


def derive_seed(*numbers: int) -> int:
    """A seed that follows from whole numbers: the same in every process, on every machine, under every Python.

    Other numbers, or the same in another order, give seeds that have nothing in common: `derive_seed(seed, image)` is
    the seed of one image's draw.

    Args:
        *numbers: Any whole numbers, at least one.

    Returns:
        A seed in [0, 2**63), which torch, NumPy and SciPy take.

    Example:
        >>> derive_seed(0, 1), derive_seed(1, 0)
        (1506311409109703068, 5474098308975844552)
    """
    if not numbers:
        raise TypeError('derive_seed needs at least one number.')
    text = ','.join(str(operator.index(n)) for n in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') >> 1


def sample_positions(
        sampler: str,
        n_tokens: int,
        image_size: Tuple[int, int],
        batch_size: int = 1,
        saliency: Optional[torch.Tensor] = None,
        generator: Optional[torch.Generator] = None,
        window: int = 16,
        **options: Any,
) -> torch.Tensor:
    """Draw placements from a spatial prior.

    Args:
        sampler: Name of the prior, see `list_samplers`.
        n_tokens: Tokens of each image, at least 1.
        image_size: (H, W) in pixels.
        batch_size: Number of placements; stochastic samplers draw each anew.
        saliency: (batch_size, H, W) or (H, W), non-negative; for the `salient` samplers and any that ask for it. Under
            `batch_size=1` it may hold B maps: they share one set of random numbers, and B placements come back.
        generator: Source of randomness, torch's global generator by default.
        window: Side of a window in pixels; only `grid` looks at it.
        **options: Keywords of the sampler's own: `spread=True` and `inverse=True` for `salient`, which `salient_sobol`
            and `salient_inverse` set by name.

    Returns:
        Positions (y, x) in [0, 1], float32, of shape (batch_size, n_tokens, 2), on the CPU
        (for samplers that use `saliency`: on its device).

    Raises:
        TypeError: `n_tokens` is no int, `saliency` no tensor, or the sampler knows no such option.
        ValueError: An unknown sampler, a budget it cannot serve, an impossible size, a missing or wrong map.

    Example:
        >>> sample_positions('isotropic', 4, (224, 224))[0].tolist()
        [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    """
    draw, _, keywords = get_sampler(sampler)
    check_n_tokens(n_tokens)
    if batch_size < 1:
        raise ValueError(f'batch_size={batch_size} must be at least 1.')
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f'image_size={tuple(image_size)} must be (height, width) in pixels, each at least 1.')
    image_size = (int(image_size[0]), int(image_size[1]))
    rows = batch_size
    if 'saliency' in keywords:
        saliency = _check_saliency(sampler, saliency, image_size, batch_size)
        rows = max(batch_size, saliency.shape[0])
    available = dict(
        n_tokens=n_tokens, image_size=image_size, batch_size=batch_size, saliency=saliency, generator=generator,
        window=window)
    positions = draw(**{k: available[k] for k in keywords}, **options)
    if tuple(positions.shape) not in ((n_tokens, 2), (rows, n_tokens, 2)):
        raise ValueError(
            f'sampler {sampler!r} returned shape {tuple(positions.shape)}, expected ({rows}, {n_tokens}, 2).')
    # Float32 rounding may carry a draw just below 1 up to 1, never beyond.
    return positions.to(torch.float32).clamp(0., 1.).expand(rows, -1, -1)


def _check_saliency(
        sampler: str,
        saliency: Optional[torch.Tensor],
        image_size: Tuple[int, int],
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


@register_sampler('uniform')
def uniform(n_tokens: int, batch_size: int, generator: Optional[torch.Generator]) -> torch.Tensor:
    """Independent draws from U[0, 1]^2."""
    return torch.rand(batch_size, n_tokens, 2, generator=generator, device=_device(generator))


@register_sampler('gaussian')
def gaussian(n_tokens: int, batch_size: int, generator: Optional[torch.Generator]) -> torch.Tensor:
    """Independent draws from N(0.5, 1 / pi) (standard deviation), clamped to the image."""
    noise = torch.randn(batch_size, n_tokens, 2, generator=generator, device=_device(generator))
    return (0.5 + noise / math.pi).clamp(0., 1.)


@register_sampler('sobol')
def sobol(n_tokens: int, batch_size: int, generator: Optional[torch.Generator]) -> torch.Tensor:
    """Scrambled Sobol points: as random as uniform draws, but evenly spread. Another scrambling for each image."""
    from scipy.stats import qmc

    seeds = torch.randint(2 ** 31, (batch_size,), generator=generator, device=_device(generator)).tolist()
    log2 = math.ceil(math.log2(n_tokens))
    points = [qmc.Sobol(d=2, rng=seed).random_base2(log2)[:n_tokens] for seed in seeds]
    return torch.stack([torch.from_numpy(p) for p in points])


@register_sampler('isotropic', deterministic=True)
def isotropic(n_tokens: int, image_size: Tuple[int, int]) -> torch.Tensor:
    """Centres of equal cells: a square lattice, or rows of nearly equal length.

    The number of rows makes the tightest cell as wide, in pixels, as the budget allows.
    """
    H, W = image_size
    ideal = math.sqrt(n_tokens * H / W)
    candidates = {min(n_tokens, max(1, math.floor(ideal))), min(n_tokens, max(1, math.ceil(ideal)))}
    rows = max(candidates, key=lambda r: (min(H / r, W / math.ceil(n_tokens / r)), r))
    return _lattice(n_tokens, rows)


@register_sampler('center', deterministic=True)
def center(n_tokens: int, image_size: Tuple[int, int]) -> torch.Tensor:
    """The isotropic lattice pulled to the middle of the image."""
    return _pull_to_center(isotropic(n_tokens, image_size))


@register_sampler('grid', deterministic=True)
def grid(n_tokens: int, image_size: Tuple[int, int], window: int) -> torch.Tensor:
    """Centres of a ViT's patches, row by row; for smaller budgets an even subset of them."""
    H, W = image_size
    rows, columns = H // window, W // window
    if n_tokens > rows * columns:
        raise ValueError(
            f"n_tokens={n_tokens} exceeds the {rows} x {columns} patches that sampler 'grid' finds in images of "
            f"{H} x {W} px with window={window}; 'isotropic' takes any budget.")
    # The patches nearest to the isotropic lattice, its rows neither more nor longer than the grid's.
    lattice_rows = round(math.sqrt(n_tokens * rows / columns))
    lattice_rows = min(rows, n_tokens, max(lattice_rows, math.ceil(n_tokens / columns)))
    patches = torch.tensor([rows, columns], dtype=torch.float64, device='cpu')
    patch = torch.floor(_lattice(n_tokens, lattice_rows) * patches + 1e-9)
    return (patch + 0.5) * window / torch.tensor([H, W], dtype=torch.float64, device='cpu')


@register_sampler('grid_uniform', deterministic=True)
def grid_uniform(n_tokens: int, image_size: Tuple[int, int]) -> torch.Tensor:
    """The authors' even lattice, rounded to whole pixels; not every budget exists."""
    return _authors_lattice('grid_uniform', 'isotropic', n_tokens, image_size)


@register_sampler('grid_center', deterministic=True)
def grid_center(n_tokens: int, image_size: Tuple[int, int]) -> torch.Tensor:
    """The authors' even lattice, pulled to the middle; not every budget exists."""
    return _pull_to_center(_authors_lattice('grid_center', 'center', n_tokens, image_size))


@register_sampler('salient')
def salient(
        n_tokens: int,
        batch_size: int,
        saliency: torch.Tensor,
        generator: Optional[torch.Generator],
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
        generator: Optional[torch.Generator],
) -> torch.Tensor:
    """Scrambled Sobol points carried to the saliency map: its density, but evenly spread."""
    return salient(n_tokens, batch_size, saliency, generator, spread=True)


@register_sampler('salient_inverse')
def salient_inverse(
        n_tokens: int,
        batch_size: int,
        saliency: torch.Tensor,
        generator: Optional[torch.Generator],
) -> torch.Tensor:
    """Independent draws from the background of a saliency map, for control experiments."""
    return salient(n_tokens, batch_size, saliency, generator, inverse=True)


def _invert(weights: torch.Tensor, share: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
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


def _device(generator: Optional[torch.Generator]) -> torch.device:
    # Named outright, so that placements are real numbers under `with torch.device('meta')` too.
    return torch.device('cpu') if generator is None else generator.device


def _lattice(n_tokens: int, rows: int) -> torch.Tensor:
    """Cell centres of `rows` rows of nearly equal length, (n_tokens, 2) in float64."""
    # Rounding the running total spreads the longer rows evenly.
    ends = [math.floor(i * n_tokens / rows + 0.5) for i in range(rows + 1)]
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    points = [((i + 0.5) / rows, (j + 0.5) / length) for i, length in enumerate(lengths) for j in range(length)]
    return torch.tensor(points, dtype=torch.float64, device='cpu')


def _pull_to_center(positions: torch.Tensor) -> torch.Tensor:
    """0.5 + d (1 - exp(-(d / 0.2)^2)) for the offset d from 0.5, along each axis."""
    offset = positions - 0.5
    return 0.5 + offset * (1 - torch.exp(-(offset / 0.2).square()))


def _authors_lattice(name: str, instead: str, n_tokens: int, image_size: Tuple[int, int]) -> torch.Tensor:
    """Whole-pixel lattice: step = round(sqrt(H W / n)), start = floor(sqrt(H W / n) / 2), position = index / size."""
    if n_tokens == 1:
        return torch.full((1, 2), 0.5, dtype=torch.float64, device='cpu')
    H, W = image_size
    spacing = math.sqrt(H * W / n_tokens)
    step, start = max(1, round(spacing)), math.floor(spacing / 2)
    points = [(y / H, x / W) for y in range(start, H, step) for x in range(start, W, step)]
    if len(points) != n_tokens:
        raise ValueError(
            f'n_tokens={n_tokens} does not exist for sampler {name!r} on images of {H} x {W} px (its lattice has '
            f'{len(points)} points); {instead!r} takes any budget.')
    return torch.tensor(points, dtype=torch.float64, device='cpu')


def lattice_shape(positions: torch.Tensor) -> Optional[Tuple[int, int]]:
    """Rows and columns of a placement that is a lattice, or None.

    A lattice has its tokens row by row, those of a row at one y, those of a column at one x, both ascending; all
    images share it.

    Args:
        positions: (B, N, 2).

    Example:
        >>> lattice_shape(sample_positions('isotropic', 12, (96, 128)))
        (3, 4)
        >>> lattice_shape(sample_positions('isotropic', 11, (96, 128))) is None
        True
    """
    if not (positions == positions[:1]).all():
        return None
    y, x = positions[0].unbind(dim=-1)
    n = y.shape[0]
    columns = int((y == y[0]).sum())
    if n % columns:
        return None
    y, x = y.view(-1, columns), x.view(-1, columns)
    rectangular = (y == y[:, :1]).all() and (x == x[:1]).all()
    ascending = (y[:, 0].diff() > 0).all() and (x[0].diff() > 0).all()
    return (n // columns, columns) if rectangular and ascending else None
