"""How a model asks its placer: in float32, checked, with sizes where a coverage asks for them.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654
"""
from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from ..ops.sizes import add_sizes
from ..ops.windows import check_images
from ._shallow import shallow_copy
from .placement import Placer
from .subpixel_embed import SubpixelEmbed


def place_images(placer: Placer, embed: SubpixelEmbed, images: torch.Tensor) -> torch.Tensor:
    """Placement (B, N, 2), or (B, N, 4) with sizes, that a model's placer gives images, in float32 or finer."""
    check_images(images, embed.window, embed.in_chans)
    if not placer.reads_images:
        return placer(images)
    images = embed.normalize(images)
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    # The meta device knows no autocast.
    with nullcontext() if images.is_meta else torch.autocast(images.device.type, enabled=False):
        placement = placer(images)
    size = (images.shape[-2], images.shape[-1])
    if not torch.compiler.is_compiling():
        _check_count(placer, placement, size)
    placement = placement.to(torch.promote_types(placement.dtype, torch.float32)).expand(images.shape[0], -1, -1)
    return placement if placement.shape[-1] > 2 else add_sizes(placement, size, embed.window, placer.coverage())


def _check_count(placer: Placer, placement: torch.Tensor, image_size: tuple[int, int]) -> None:
    n_tokens = placer.budget(image_size)
    if placement.ndim not in (2, 3) or placement.shape[-2] != n_tokens or placement.shape[-1] not in (2, 3, 4):
        raise ValueError(
            f'{placer.source} gave positions of shape {tuple(placement.shape)}, its budget asks for '
            f'(B, {n_tokens}, 2), or 4 columns with spacings.')


def at_budget(model: nn.Module, n_tokens: int, coverage: float | None = None) -> nn.Module:
    """A subpixel ViT whose own placer has another budget, and coverage; it shares the weights of `model`."""
    changed = {} if coverage is None else dict(coverage=coverage)
    return shallow_copy(model, placer=model.placer.replaced(n_tokens=n_tokens, **changed))


# Compiled code then sees a placement of a dynamic length, instead of one program for each budget.
@torch.compiler.disable
def place_drawn(placer: Placer, embed: SubpixelEmbed, images: torch.Tensor) -> torch.Tensor:
    """Placement at the budget and coverage of this training batch; the next batch has the next of the sequence."""
    placement = place_images(placer, embed, images)
    placer.batches += 1
    return placement
