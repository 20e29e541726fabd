"""Floating-point operations of a call, as torch counts them."""
from __future__ import annotations

from typing import Any, Callable

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(call: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of the matrix products and convolutions in `call(*args)`, backward passes included.

    A multiplication and an addition count as two. Normalisation, softmax, and the interpolation of windows do not
    count.
    """
    # The kernels that fuse attention on a CPU are not counted by torch, the plain one is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()
