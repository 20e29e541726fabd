"""Saliency from what a ViT's class token attends to, or from what all its patches do.

Paper: `Emerging Properties in Self-Supervised Vision Transformers` (DINO) - https://arxiv.org/abs/2104.14294
"""
from __future__ import annotations

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.saliency import normalize_saliency
from ._shallow import shallow_copy
from .attention import tap_attention


@torch.no_grad()
def attention_saliency(
        vit: nn.Module,
        images: torch.Tensor,
        block: int = -1,
        queries: str = 'class',
) -> torch.Tensor:
    """Attention of the class token to the patches, averaged over the heads of one block; or what patches receive.

    Runs in eval mode and leaves the model as it was. A model of fixed size sees a resized copy of the images.

    Args:
        vit: A timm VisionTransformer, or a model built like one (DeiT, EVA, DINOv3), with a class token. A subpixel
            one will do where its placement is a lattice. Without a class token only for `queries='patches'`.
        images: (B, C, H, W), normalised as `vit` expects them.
        block: Index of the block, the last by default.
        queries: Whose attention: that of the 'class' token, or the mean over all 'patches'.

    Returns:
        Maps (B, H, W), float32, not negative, each summing to one: the attention at the patch centres, interpolated.

    Raises:
        TypeError: `vit` is no such model.
        ValueError: It has no class token, or no such block; `images` has the wrong shape; other queries.

    Example:
        >>> import timm, torch
        >>> vit = timm.create_model('vit_tiny_patch16_224')  # with weights: 'vit_small_patch16_224.dino'
        >>> attention_saliency(vit, torch.rand(2, 3, 96, 128)).shape
        torch.Size([2, 96, 128])
    """
    for name in ('patch_embed', 'blocks', 'forward_intermediates'):
        if not hasattr(vit, name):
            raise TypeError(f'vit must be a timm VisionTransformer, got {type(vit).__name__} without {name!r}.')
    if queries not in ('class', 'patches'):
        raise ValueError(f"queries={queries!r} must be 'class' or 'patches'.")
    if queries == 'class' and getattr(vit, 'cls_token', None) is None:
        raise ValueError(
            f"vit ({type(vit).__name__}) has no class token whose attention could be read: use a model with one, for "
            "example 'vit_small_patch16_224.dino', or queries='patches'.")
    if not -len(vit.blocks) <= block < len(vit.blocks):
        raise ValueError(f'block={block} does not exist, vit has {len(vit.blocks)} blocks.')
    if images.ndim != 4:
        raise ValueError(f'images must have shape (B, C, H, W), got {tuple(images.shape)}.')
    H, W = images.shape[-2:]
    images = F.interpolate(images, _input_size(vit, H, W), mode='bicubic', antialias=True)
    lattice = vit.lattice if hasattr(vit, 'lattice') else vit.patch_embed.dynamic_feat_size
    rows, columns = lattice(images.shape[-2:])

    attention = torch.stack(_read_attention(vit, images, block)).float().mean(dim=(0, 2))  # B L L
    received = attention[:, 0] if queries == 'class' else attention[:, -rows * columns:].mean(dim=1)
    maps = received[:, -rows * columns:].unflatten(1, (rows, columns))
    maps = F.interpolate(maps[:, None], (H, W), mode='bilinear')[:, 0]
    return normalize_saliency(maps)


def _input_size(vit: nn.Module, height: int, width: int) -> tuple[int, int]:
    """The size at which `vit` takes images of this size: its own, or the nearest whole number of patches."""
    embed = vit.patch_embed
    if getattr(embed, 'strict_img_size', False):
        return embed.img_size
    ky, kx = embed.patch_size
    return max(1, round(height / ky)) * ky, max(1, round(width / kx)) * kx


def _read_attention(vit: nn.Module, images: torch.Tensor, block: int) -> list[torch.Tensor]:
    """Attention (B, heads, L, L) of each attention layer of a block (one, but for some variants), in eval mode."""
    block %= len(vit.blocks)
    with ExitStack() as restore:
        for module in vit.modules():
            restore.callback(setattr, module, 'training', module.training)
        vit.eval()
        tapped, taps = tap_attention(vit.blocks[block])
        vit = shallow_copy(vit, blocks=shallow_copy(vit.blocks, **{str(block): tapped}))
        vit.forward_intermediates(
            images, indices=[block], stop_early=True, intermediates_only=True, output_fmt='NLC')
    return [tap.matrix for tap in taps]
