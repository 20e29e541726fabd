"""Sizes as constants of a compiled program."""
from __future__ import annotations


def known_int(value: int) -> int:
    """The same whole number, not negative; `torch.compile` makes a program for each value of it.

    From the second shape on, a size is a symbol while `torch.compile` traces: nothing can be drawn or computed for it in
    plain Python, and a function under `assume_constant_result` refuses it. The length of a range is never a symbol, so
    that asking for it turns one into its value, by which the program is guarded.

    Example:
        >>> known_int(196)
        196
    """
    return len(range(value))
