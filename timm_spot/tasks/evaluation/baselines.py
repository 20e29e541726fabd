"""Other ways to spend fewer tokens, on the weights of any timm VisionTransformer, subpixel ones included.

A baseline is a function from normalised images (B, C, H, W) to the tokens after the last norm (B, L, D), which
`vit.forward_head` takes.
"""
from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from ...models.merging import Carried
from ...models.pruning_passes import drop_tokens, make_plan
from ...models.subpixel_embed import SubpixelEmbed
from ...ops.attention import gather_tokens
from ...ops.placements import sample_positions


def patch_drop(vit: nn.Module, images: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Some of the patches, as when a ViT drops the others at its input.

    Args:
        vit: A timm VisionTransformer.
        images: (B, C, H, W).
        kept: (B, n), for each image the numbers of its patches, see `random_patches`.
    """
    x = embed_patches(vit, images)
    return vit.norm(vit.blocks(gather_tokens(x, kept.to(x.device), vit.num_prefix_tokens)))


def random_patches(n_patches: int, n_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of `n_tokens` of the patches, each set of them equally likely, (n_tokens,).

    Raises:
        ValueError: There are fewer patches.
    """
    _check_budget(n_tokens, n_patches)
    return torch.randperm(n_patches, generator=generator)[:n_tokens]


def top_k(vit: nn.Module, images: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """The patches to which the class token attends most in an early block; those after it see only these.

    This is pruning by `cls-attention` at one stage. The block is the one a quarter of the depth in, where EViT drops
    tokens for the first time.

    Paper: `EViT: Expediting Vision Transformers via Token Reorganizations` - https://arxiv.org/abs/2202.07800

    Raises:
        ValueError: There are fewer patches, or no class token.
    """
    if vit.cls_token is None:
        raise ValueError('top-k needs a class token, whose attention says which patches to keep; this model has none.')
    x = embed_patches(vit, images)
    _check_budget(n_tokens, x.shape[1] - vit.num_prefix_tokens)
    depth = len(vit.blocks)
    plan = make_plan(depth, stages=(depth // 4 + 1,), scorer='cls-attention')
    return vit.norm(drop_tokens(vit, Carried(x), plan, counts=(n_tokens,)).last.tokens)


class LowRes:
    """The image shrunk until its patch grid has n tokens; a position table is resampled to that grid, as timm does.

    Args:
        vit: A timm VisionTransformer; it stays as it is.
    """

    def __init__(self, vit: nn.Module) -> None:
        self.vit = vit
        self.resized: dict[tuple[int, int], nn.Module] = {}

    def __call__(self, images: torch.Tensor, n_tokens: int) -> torch.Tensor:
        rows, columns = shrunk_grid(tuple(images.shape[-2:]), n_tokens)
        height, width = self.vit.patch_embed.patch_size
        size = (rows * height, columns * width)
        images = F.interpolate(images, size, mode='bicubic', antialias=True)
        if isinstance(self.vit.patch_embed, SubpixelEmbed):
            vit = self.vit
        else:
            if size not in self.resized:
                self.resized[size] = copy.deepcopy(self.vit)
                self.resized[size].set_input_size(img_size=size)
            vit = self.resized[size]
        return vit.norm(vit.blocks(embed_patches(vit, images)))


def shrunk_grid(image_size: tuple[int, int], n_tokens: int) -> tuple[int, int]:
    """Rows and columns of the grid of n tokens on a smaller copy of an image of (H, W) pixels.

    Raises:
        ValueError: No grid of about the image's aspect has that count.
    """
    height, width = image_size
    rows = max(1, round(math.sqrt(n_tokens * height / width)))
    columns = max(1, round(rows * width / height))
    if rows * columns != n_tokens:
        raise ValueError(
            f'n_tokens={n_tokens} is no patch grid of a smaller copy of images of {height} x {width} px (the nearest, '
            f'{rows} x {columns}, has {rows * columns}): low-res takes square numbers for square images.')
    return rows, columns


def embed_patches(vit: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Tokens of all patches in front of the first block, (B, prefix + N, D)."""
    embed = vit.patch_embed
    if isinstance(embed, SubpixelEmbed):
        size = tuple(images.shape[-2:])
        n_patches = (size[0] // embed.window) * (size[1] // embed.window)
        x = embed(images, sample_positions('grid', n_patches, size, window=embed.window)[0].to(images.device))
    else:
        x = embed(images)
    return vit.norm_pre(vit._pos_embed(x))


def _check_budget(n_tokens: int, n_patches: int) -> None:
    if n_tokens > n_patches:
        raise ValueError(f'n_tokens={n_tokens} exceeds the {n_patches} patches of the image.')
