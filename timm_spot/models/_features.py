"""Results of `forward_intermediates` in the shapes that timm's models give them."""
from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch

Intermediates = Union[List[Any], Tuple[Any, List[Any]], Dict[str, Any]]


def format_intermediates(
        taken: List[torch.Tensor],
        last: Optional[Any],
        num_prefix_tokens: int,
        return_prefix_tokens: bool,
        output_dict: bool,
        to_map: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
) -> Intermediates:
    """What timm's `forward_intermediates` returns.

    Args:
        taken: Tokens (B, prefix + N, D) after each chosen block.
        last: The final features, or None for the intermediates only.
        num_prefix_tokens: How many tokens stand before the image's.
        return_prefix_tokens: Return both prefix and image tokens.
        output_dict: Return a dictionary with 'image_features' and 'image_intermediates'.
        to_map: Makes maps (B, D, rows, columns) of image tokens (B, N, D); by default they stay as they are.
    """
    prefix_tokens = [y[:, :num_prefix_tokens] for y in taken]
    intermediates = [y[:, num_prefix_tokens:] for y in taken]
    return_prefix_tokens = return_prefix_tokens and num_prefix_tokens > 0
    if to_map is not None:
        intermediates = [to_map(y) for y in intermediates]
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


def tokens_to_map(tokens: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Tokens (B, N, D) of a lattice of `size` rows and columns to a map (B, D, rows, columns)."""
    return tokens.transpose(1, 2).unflatten(2, size).contiguous()
