"""Saliency from what a ViT's class token attends to.

Paper: `Emerging Properties in Self-Supervised Vision Transformers` (DINO) - https://arxiv.org/abs/2104.14294
"""
from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Iterator, List, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.saliency import normalize_saliency


@torch.no_grad()
def attention_saliency(vit: nn.Module, images: torch.Tensor, block: int = -1) -> torch.Tensor:
    """Attention of the class token to the patches, averaged over the heads of one block.

    Runs in eval mode and leaves the model as it was. A model of fixed size sees a resized copy of the images.

    Args:
        vit: A timm VisionTransformer, or a model built like one (DeiT, EVA, DINOv3), with a class token. A subpixel
            one will do where its placement is a lattice.
        images: (B, C, H, W), normalised as `vit` expects them.
        block: Index of the block, the last by default.

    Returns:
        Maps (B, H, W), float32, not negative, each summing to one: the attention at the patch centres, interpolated.

    Raises:
        TypeError: `vit` is no such model.
        ValueError: It has no class token, or no such block; `images` has the wrong shape.

    Example:
        >>> import timm, torch
        >>> vit = timm.create_model('vit_tiny_patch16_224')  # with weights: 'vit_small_patch16_224.dino'
        >>> attention_saliency(vit, torch.rand(2, 3, 96, 128)).shape
        torch.Size([2, 96, 128])
    """
    for name in ('patch_embed', 'blocks', 'forward_intermediates'):
        if not hasattr(vit, name):
            raise TypeError(f'vit must be a timm VisionTransformer, got {type(vit).__name__} without {name!r}.')
    if getattr(vit, 'cls_token', None) is None:
        raise ValueError(
            f"vit ({type(vit).__name__}) has no class token whose attention could be read: use a model with one, for "
            "example 'vit_small_patch16_224.dino'.")
    if not -len(vit.blocks) <= block < len(vit.blocks):
        raise ValueError(f'block={block} does not exist, vit has {len(vit.blocks)} blocks.')
    if images.ndim != 4:
        raise ValueError(f'images must have shape (B, C, H, W), got {tuple(images.shape)}.')
    H, W = images.shape[-2:]
    images = F.interpolate(images, _input_size(vit, H, W), mode='bicubic', antialias=True)
    lattice = vit.lattice if hasattr(vit, 'lattice') else vit.patch_embed.dynamic_feat_size
    rows, columns = lattice(images.shape[-2:])

    attention = torch.stack(_record_attention(vit, images, block)).float().mean(dim=(0, 2))  # B L L
    maps = attention[:, 0, -rows * columns:].unflatten(1, (rows, columns))
    maps = F.interpolate(maps[:, None], (H, W), mode='bilinear')[:, 0]
    return normalize_saliency(maps)


def _input_size(vit: nn.Module, height: int, width: int) -> Tuple[int, int]:
    """The size at which `vit` takes images of this size: its own, or the nearest whole number of patches."""
    embed = vit.patch_embed
    if getattr(embed, 'strict_img_size', False):
        return embed.img_size
    ky, kx = embed.patch_size
    return max(1, round(height / ky)) * ky, max(1, round(width / kx)) * kx


def _record_attention(vit: nn.Module, images: torch.Tensor, block: int) -> List[torch.Tensor]:
    training = {m: m.training for m in vit.modules()}
    with ExitStack() as restore:
        for module, mode in training.items():
            restore.callback(setattr, module, 'training', mode)
        recorded = restore.enter_context(recorded_attention(vit.blocks[block]))
        vit.eval()
        vit.forward_intermediates(
            images, indices=[block % len(vit.blocks)], stop_early=True, intermediates_only=True, output_fmt='NLC')
    return recorded


@contextmanager
def recorded_attention(block: nn.Module) -> Iterator[List[torch.Tensor]]:
    """Attention (B, heads, L, L) of each attention layer in a block (one, but for some variants), as it runs."""
    layers = [m for m in block.modules() if hasattr(m, 'fused_attn') and hasattr(m, 'attn_drop')]
    if not layers:
        raise TypeError(f'vit must be a timm VisionTransformer, its {type(block).__name__} has attention of its own.')
    recorded: List[torch.Tensor] = []
    with ExitStack() as restore:
        for layer in layers:
            # Fused attention never forms the matrix: this block computes it step by step, with the same result.
            restore.callback(setattr, layer, 'fused_attn', layer.fused_attn)
            layer.fused_attn = False
            hook = layer.attn_drop.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0]))
            restore.callback(hook.remove)
        yield recorded
