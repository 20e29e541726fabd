"""Information criteria that judge a region by its variance and its size.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652
"""
from __future__ import annotations

import math

import torch

CRITERIA = ('aicc', 'aic', 'bic', 'cic')


def check_criterion(criterion: str) -> None:
    """Raise ValueError unless `criterion` is known."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r} is unknown, use one of {', '.join(map(repr, CRITERIA))}.")


@torch.no_grad()
def information_criterion(
        variances: torch.Tensor,
        sizes: torch.Tensor,
        image_pixels: int,
        criterion: str = 'aicc',
        iota: float = 5.,
) -> torch.Tensor:
    """Criterion of regions, the larger the better.

    With df = 1 / (2 m - 2 sqrt(m)) it is -(m / pixels * ln(prod(2 pi v) + iota) + penalty(df, m)).

    Args:
        variances: (C, n), of each channel within each region.
        sizes: Pixels m of each region, (n,).
        image_pixels: Pixels of the whole image.
        criterion: 'aicc', 'aic', 'bic' or 'cic'.
        iota: Keeps the logarithm of a flat region from -infinity.

    Returns:
        (n,), at most finite; -infinity for a region of one pixel.

    Raises:
        ValueError: Unknown criterion.

    Example:
        >>> import torch
        >>> information_criterion(torch.zeros(3, 2), torch.tensor([1, 16]), 64, 'aic', iota=1.)
        tensor([   -inf, -0.0833])
    """
    check_criterion(criterion)
    m = sizes.to(variances.dtype)
    df = 1. / (2. * m - 2. * m.sqrt())
    penalty = {
        'aicc': lambda: 2. * df + 2. * (df.square() + df) / (m - df - 1.),
        'aic': lambda: 2. * df,
        'bic': lambda: m.log() * df,
        'cic': lambda: (m.log() + 1.) * df,
    }[criterion]()
    volume = 2. * math.pi * variances[0]
    for variance in variances[1:]:  # in a fixed order, see `sum_channels`
        volume = volume * (2. * math.pi * variance)
    likelihood = m / image_pixels * (volume + iota).log()
    return torch.where(sizes > 1, -(likelihood + penalty), -math.inf)
