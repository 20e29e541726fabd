"""Results of `forward_intermediates` in the shapes that timm's models give them."""
from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple, Union

import torch

Intermediates = Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]], Dict[str, Any]]


def format_intermediates(
        taken: List[torch.Tensor],
        last: Optional[torch.Tensor],
        num_prefix_tokens: int,
        return_prefix_tokens: bool,
        output_dict: bool,
        map_size: Optional[Tuple[int, int]] = None,
) -> Intermediates:
    """What timm's `forward_intermediates` returns.

    Args:
        taken: Tokens (B, prefix + N, D) after each chosen block.
        last: Tokens after the final norm, or None for the intermediates only.
        num_prefix_tokens: How many tokens stand before the image's.
        return_prefix_tokens: Return both prefix and image tokens.
        output_dict: Return a dictionary with 'image_features' and 'image_intermediates'.
        map_size: Rows and columns of the maps (B, D, rows, columns) that image tokens are to form.
    """
    prefix_tokens = [y[:, :num_prefix_tokens] for y in taken]
    intermediates = [y[:, num_prefix_tokens:] for y in taken]
    return_prefix_tokens = return_prefix_tokens and num_prefix_tokens > 0
    if map_size is not None:
        intermediates = [y.transpose(1, 2).unflatten(2, map_size).contiguous() for y in intermediates]
    if output_dict:
        result: Dict[str, Any] = dict(image_intermediates=intermediates)
        if return_prefix_tokens:
            result['image_intermediates_prefix'] = prefix_tokens
        if last is not None:
            result['image_features'] = last
        return result
    if return_prefix_tokens:
        intermediates = list(zip(intermediates, prefix_tokens))
    return intermediates if last is None else (last, intermediates)
