"""Seeds of random draws."""
from __future__ import annotations

import hashlib
import operator


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
