"""What the models are compared with: the straightforward tokenizer, the bare encoder, ViTs that save tokens otherwise.

Paper: `Token Merging: Your ViT but Faster` (ToMe) - https://arxiv.org/abs/2210.09461
"""
from __future__ import annotations

import sys

import timm
import torch
import torch.nn.functional as F
from torch import nn

BASE = 'spot_vit_base_patch16_mae'


class StraightforwardTokenizer:
    """Windows by advanced indexing, the position map concatenated as a fourth channel, one linear map.

    The same function as `SubpixelEmbed` under `patch`, written as it first comes to mind.
    """

    def __init__(self, embed: nn.Module) -> None:
        self.window, self.nodes = embed.window, embed.pos_nodes
        self.sigma = (15 / 28) / (self.nodes - 1)
        self.weight = torch.cat([embed.proj.weight.flatten(1), embed.pos_proj.weight], dim=1)
        self.bias = embed.proj.bias

    def __call__(self, images: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        windows = index_windows(images, positions, self.window)
        nodes = torch.linspace(0, 1, self.nodes, device=images.device)
        y, x = positions[:, :, 0, None, None], positions[:, :, 1, None, None]
        position_map = torch.exp(-((y - nodes[:, None]) ** 2 + (x - nodes) ** 2) / (2 * self.sigma ** 2))
        return F.linear(torch.cat([windows, position_map[:, :, None]], dim=2).flatten(2), self.weight, self.bias)


def index_windows(images: torch.Tensor, positions: torch.Tensor, window: int) -> torch.Tensor:
    """Windows (B, N, C, k, k) under convention `patch`, by four advanced indexings."""
    B, _, H, W = images.shape
    offsets = torch.arange(window, device=images.device) - (window - 1) / 2
    y = positions[:, :, 0:1] * H - 0.5 + offsets
    x = positions[:, :, 1:2] * W - 0.5 + offsets
    y0, x0 = y.floor(), x.floor()
    image = torch.arange(B, device=images.device)[:, None, None, None]
    windows = 0
    for down in (0, 1):
        for right in (0, 1):
            row, column = (y0 + down).long(), (x0 + right).long()
            inside = ((row >= 0) & (row < H))[:, :, :, None] & ((column >= 0) & (column < W))[:, :, None, :]
            weight = (1 - (y - row).abs())[:, :, :, None] * (1 - (x - column).abs())[:, :, None, :] * inside
            row, column = row.clamp(0, H - 1)[:, :, :, None], column.clamp(0, W - 1)[:, :, None, :]
            windows = windows + images[image, :, row, column] * weight[..., None]  # B N k k C
    return windows.permute(0, 1, 4, 2, 3)


class BareEncoder(nn.Module):
    """The model behind its tokenizer, fed ready tokens (B, N, D)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.model.norm_pre(self.model.patch_drop(self.model._pos_embed(tokens)))
        return self.model.forward_head(self.model.norm(self.model.blocks(x)))


class DroppedPatches(nn.Module):
    """timm's ViT that embeds all patches, keeps n of them at random and runs the blocks on those."""

    def __init__(self, vit: nn.Module, n_tokens: int) -> None:
        super().__init__()
        self.vit, self.n_tokens = vit, n_tokens

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(images))
        prefix = self.vit.num_prefix_tokens
        kept = torch.rand(len(x), x.shape[1] - prefix, device=x.device).argsort(dim=1)[:, :self.n_tokens]
        patches = x[:, prefix:].gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))
        x = self.vit.norm_pre(torch.cat([x[:, :prefix], patches], dim=1))
        return self.vit.forward_head(self.vit.norm(self.vit.blocks(x)))


def tome_vit(folder: str, r: int, **model_args: int) -> nn.Module:
    """timm's ViT-B/16 with ToMe from a clone of its repository: r tokens merged in each block."""
    if folder not in sys.path:
        sys.path.append(folder)
    from tome.patch.timm import apply_patch

    vit = timm.create_model('vit_base_patch16_224', **model_args).eval()
    apply_patch(vit)
    vit.r = r
    return vit
