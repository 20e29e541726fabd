"""Image to tokens of any shape, in the place of timm's PatchEmbed.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652

    token = W_rgb . masked window + W_pos . position histogram [+ W_grad . gradient histogram] + b
"""
from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import nn

from ..ops.regions.features import gradient_histogram, position_histogram, region_windows
from .dht_tokenizer import HierarchicalTokenizer, Regions, check_budget
from .subpixel_embed import WindowProjection


def pad_tokens(
        tokens: torch.Tensor,
        counts: torch.Tensor,
        image: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (N, D) of all images to rows (B, max, D) padded with zeros, and the mask (B, max) of what is real."""
    length = int(counts.max())
    mask = torch.arange(length, device=counts.device) < counts[:, None]
    rows = torch.arange(len(tokens), device=counts.device) + (
        torch.arange(len(counts), device=counts.device) * length - (counts.cumsum(0) - counts))[image]
    padded = tokens.new_zeros(len(counts) * length, tokens.shape[1]).index_copy(0, rows, tokens)
    return padded.view(len(counts), length, -1), mask


class HierarchicalEmbed(nn.Module):
    """Regions of images to tokens.

    Shapes: images (B, 3, H, W) of any size; tokens (B, max, embed_dim), padded with zeros, their mask (B, max), True
    where a token is real, and `Regions`.

    Args:
        img_size: Nominal image size, from which only the default budget that timm reads is derived.
        patch_size: Side of the window to which a region's bounding box is resampled.
        in_chans: Image channels, 3.
        embed_dim: Token width.
        n_tokens: Budget; None takes round(sqrt(H * W) / 0.56) in eval and round(sqrt(H * W)) in train mode, and
            usually a few more.
        strict: Keep to `n_tokens` exactly, instead of leaving a few more. An image with fewer regions has fewer.
        pos_size: Cells per axis of the position histogram; `patch_size` by default.
        pos_scale: Cells that its values are scaled for; `pos_size` by default, the old one where it was resized.
        normalize_windows: Scale a window up by the share of it that its region covers.
        tokenizer: Settings of `HierarchicalTokenizer`; with `compute_grad` a token has a histogram of gradients too.
    """

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            patch_size: int | tuple[int, int] = 16,
            in_chans: int = 3,
            embed_dim: int = 768,
            n_tokens: int | None = None,
            strict: bool = True,
            pos_size: int | None = None,
            pos_scale: int | None = None,
            normalize_windows: bool = False,
            tokenizer: dict[str, Any] | None = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.patch_size = to_2tuple(patch_size)
        side, width = self.patch_size
        if side != width or side < 1:
            raise ValueError(f'patch_size={patch_size} is no window: windows are square, of at least 1 pixel.')
        self.img_size = to_2tuple(img_size)
        self.pos_size = side if pos_size is None else pos_size
        self.pos_scale = self.pos_size if pos_scale is None else pos_scale
        if self.pos_size < 1 or not 0 < self.pos_scale < math.inf:
            raise ValueError(f'pos_size={pos_size} must be at least 1, pos_scale={pos_scale} positive and finite.')
        self.normalize_windows = normalize_windows
        self.strict = strict
        self.set_budget(n_tokens)

        self.tokenizer = HierarchicalTokenizer(in_chans=in_chans, device=device, **(tokenizer or {}))
        self.mix = nn.Parameter(torch.empty(1, **dd))
        self.pixel_token = nn.Parameter(torch.empty(in_chans, side, side, **dd))
        self.proj = WindowProjection(in_chans, embed_dim, kernel_size=side, stride=side, **dd)
        self.pos_proj = nn.Linear(self.pos_size ** 2, embed_dim, bias=False, **dd)
        has_gradient = self.tokenizer.gradact is not None
        self.grad_proj = nn.Linear(side ** 2, embed_dim, bias=False, **dd) if has_gradient else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give what stands in for pixels outside a region a small random start, and the histograms that of a table."""
        nn.init.constant_(self.mix, 0.01)
        nn.init.normal_(self.pixel_token, std=0.1)
        nn.init.trunc_normal_(self.pos_proj.weight, std=.02)
        if self.grad_proj is not None:
            nn.init.trunc_normal_(self.grad_proj.weight, std=.02)

    def set_budget(self, n_tokens: int | None) -> None:
        """Tokens of each image; None for the default by image size.

        Raises:
            ValueError: `n_tokens` is no whole number of at least 1.
        """
        if n_tokens is not None:
            check_budget('n_tokens', n_tokens)
        self.n_tokens = n_tokens

    @property
    def num_patches(self) -> int:
        """Tokens of an image of the nominal size in eval mode."""
        if self.n_tokens is not None:
            return self.n_tokens
        return self.tokenizer.default_target(*self.img_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Whole patches in an image of the nominal size."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> tuple[int, int] | int:
        """Pixels of the image for each of a painted feature map, which timm states as its reduction."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def set_input_size(
            self,
            img_size: int | tuple[int, int] | None = None,
            patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the nominal image size; windows keep theirs."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f'patch_size={patch_size} differs from the window, {self.patch_size}, of a built model.')
        if img_size is not None:
            self.img_size = to_2tuple(img_size)

    def region_vectors(self, regions: Regions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What tokens are made of, for all N: windows (N, 3, p, p), position and gradient histograms (N, cells)."""
        side = self.patch_size[0]
        windows, masks = region_windows(regions.injected, regions.segmentation, regions.boxes, regions.image, side)
        if self.normalize_windows:
            windows = windows * (side ** 2 / (masks.sum((1, 2), keepdim=True) + 1e-5))[:, None]
        # Outside its region a window is mostly the learned pixel token, and a little the image.
        outside = (1. - masks) * (1. - torch.sigmoid(self.mix.to(masks.dtype)))
        windows = torch.lerp(windows, self.pixel_token.to(windows.dtype), outside[:, None])
        position = position_histogram(
            regions.segmentation, regions.sizes, self.pos_size, self.pos_scale, windows.dtype).flatten(1)
        if self.grad_proj is None:
            return windows, position, None
        gradient = gradient_histogram(regions.segmentation, regions.sizes, regions.gradient, side)
        return windows, position, gradient.flatten(1)

    def embed(self, regions: Regions) -> torch.Tensor:
        """Tokens (N, embed_dim) of all regions of a batch."""
        windows, position, gradient = self.region_vectors(regions)
        dtype = self.mix.dtype  # that of the model; a wrapped or quantised layer need not say its own
        tokens = self.proj(windows.to(dtype)).flatten(1)
        tokens = tokens + self.pos_proj(position.to(dtype))
        if gradient is not None:
            tokens = tokens + self.grad_proj(gradient.to(dtype))
        return tokens

    def find_regions(self, x: torch.Tensor, n_tokens: int | None = None) -> Regions:
        """The regions of images (B, 3, H, W); `n_tokens` overrides the budget for this call."""
        n_tokens = self.n_tokens if n_tokens is None else n_tokens
        return self.tokenizer(x, n_tokens, strict=self.strict and n_tokens is not None)

    def forward(
            self,
            x: torch.Tensor,
            n_tokens: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Regions]:
        regions = self.find_regions(x, n_tokens)
        tokens, mask = pad_tokens(self.embed(regions), regions.counts, regions.image)
        return tokens, mask, regions
