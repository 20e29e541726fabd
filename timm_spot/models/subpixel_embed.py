"""Windows around continuous positions to tokens, in the place of timm's PatchEmbed.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

    token = W_rgb . window + W_pos . phi(position) + W_size . psi(size) + b

The last columns are there only in models whose tokens have sizes.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed, to_2tuple
from timm.models import register_notrace_module
from torch import nn

from ..ops.normalization import Normalization
from ..ops.position_feature import position_feature
from ..ops.sizes import SIZE_NODES, size_feature
from ..ops.windows import (
    check_convention,
    check_images,
    check_placement,
    check_sized,
    gather_blocks,
    read_windows,
    split_placement,
)

DEFAULT_NODES = 16
SIZE_WEIGHT = 'patch_embed.size_proj.weight'  # in the state dict of a model


class WindowProjection(nn.Conv2d):
    """A patch convolution that is one matrix product on single windows: (M, C, k, k) to (M, embed_dim, 1, 1)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] != self.kernel_size:  # a whole image, from somebody else
            return super().forward(x)
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]


@register_notrace_module
class SubpixelEmbed(nn.Module):
    """Windows around continuous positions to tokens.

    Shapes: images (B, C, H, W) of any size of at least one window, placement (B, N, 2), with spacings (B, N, 3) or
    (B, N, 4), or the same without B, tokens (B, N, embed_dim). Images are normalised floats, or uint8, see
    `set_normalization`.

    Args:
        img_size: Nominal image size.
        patch_size: Side k of the (square) window.
        in_chans: Image channels.
        embed_dim: Token width.
        norm_layer: Normalisation of the projected window, before the position is added.
        bias: Whether the projection has one.
        dynamic_img_pad: Part of timm's call; windows need no padding.
        convention: 'patch' or 'spot', see `timm_spot.sample_windows`.
        pos_nodes: Nodes per axis of the position feature, 16 by default; fixed to k under `spot`.

    Raises:
        ValueError: A window that is not square, an unknown convention, too few nodes or, under `spot`, others than k.
    """

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            patch_size: int | tuple[int, int] = 16,
            in_chans: int = 3,
            embed_dim: int = 768,
            norm_layer: Callable[..., nn.Module] | None = None,
            bias: bool = True,
            dynamic_img_pad: bool = False,
            convention: str = 'patch',
            pos_nodes: int | None = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.window = square_window(patch_size)
        check_convention(convention, self.window)
        if convention == 'spot' and pos_nodes not in (None, self.window):
            raise ValueError(f"pos_nodes={pos_nodes} must equal the window ({self.window}) under convention='spot'.")
        nodes = self.window if convention == 'spot' else DEFAULT_NODES if pos_nodes is None else pos_nodes
        if nodes < 2:
            raise ValueError(f'pos_nodes={nodes} is too small, the position feature needs at least 2 nodes an axis.')
        self.convention = convention
        self.pos_nodes = nodes
        self.img_size = to_2tuple(img_size)
        self.in_chans = in_chans
        self.normalization: Normalization | None = None

        self.proj: nn.Module = WindowProjection(
            in_chans, embed_dim, kernel_size=self.window, stride=self.window, bias=bias, **dd)
        self.norm = norm_layer(embed_dim, **dd) if norm_layer else nn.Identity()
        self.pos_proj = nn.Linear(nodes * nodes, embed_dim, bias=False, **dd)
        self.register_module('size_proj', None)
        self.register_buffer('n_sigma', torch.empty((), **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the position columns the scale of a ViT's position table."""
        nn.init.trunc_normal_(self.pos_proj.weight, std=.02)
        nn.init.ones_(self.n_sigma)
        if self.size_proj is not None:
            nn.init.zeros_(self.size_proj.weight)

    def add_size_embed(self) -> None:
        """Let tokens be told their size, by weights that are 0 at first.

        Raises:
            ValueError: Windows have one size, under `spot`.
        """
        check_sized(self.convention, 'size_embed=True tells tokens their size')
        weight = self.pos_proj.weight
        self.size_proj = nn.Linear(
            2 * len(SIZE_NODES), weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.size_proj.weight)

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.window, self.window

    @property
    def grid_size(self) -> tuple[int, int]:
        """Whole patches in an image of the nominal size."""
        return self.img_size[0] // self.window, self.img_size[1] // self.window

    @property
    def num_patches(self) -> int:
        """Count of these patches, the default budget."""
        return self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> tuple[int, int] | int:
        """Pixels per patch, which timm states as the reduction of feature maps."""
        return self.window if as_scalar else self.patch_size

    def set_input_size(
            self,
            img_size: int | tuple[int, int] | None = None,
            patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the nominal image size, or the window by resampling the projection."""
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
        if patch_size is None or square_window(patch_size) == self.window:
            return
        window = square_window(patch_size)
        if self.convention == 'spot':
            raise ValueError(
                f"patch_size={patch_size} differs from the window ({self.window}): under convention='spot' the "
                "position feature is tied to it.")
        old = self.proj
        self.proj = WindowProjection(
            old.in_channels, old.out_channels, kernel_size=window, stride=window, bias=old.bias is not None,
            device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            self.proj.weight.copy_(resample_patch_embed(old.weight, [window, window]))
            if old.bias is not None:
                self.proj.bias.copy_(old.bias)
        for new_p, old_p in zip(self.proj.parameters(), old.parameters()):
            new_p.requires_grad_(old_p.requires_grad)
        self.proj.train(old.training)
        self.window = window

    def set_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Say what uint8 images are normalised with, of images in [0, 1]: one value a channel, else their average."""
        self.normalization = Normalization(tuple(mean), tuple(std)).for_channels(self.in_chans)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, C, H, W) as the model takes them, in float32; others as they are.

        Raises:
            TypeError: They are uint8, and nothing says how to normalise them.
        """
        if images.dtype != torch.uint8:
            return images
        if self.normalization is None:
            raise TypeError(
                'images are uint8, and this model was built without a pretrained_cfg that says how to normalise them: '
                'call patch_embed.set_normalization(mean, std), or give normalised float32 images.')
        return self.normalization(images)

    def forward(self, x: torch.Tensor, placement: torch.Tensor) -> torch.Tensor:
        check_images(x, self.window, self.in_chans)
        check_placement(placement, x)
        positions, spacing = split_placement(placement.expand(x.shape[0], -1, -1))
        if spacing is not None:
            check_sized(self.convention, f'positions of shape {tuple(placement.shape)} hold spacings')
        dtype = self.n_sigma.dtype  # that of the weights, which may be wrapped, quantised or elsewhere
        windows = self._read(x, positions, spacing).to(dtype)
        tokens = self.norm(self.proj(windows.flatten(0, 1)).view(*windows.shape[:2], -1))
        if positions.stride(0) == 0 and not positions.requires_grad:
            # All images share it: one feature.
            positions, spacing = positions[:1], None if spacing is None else spacing[:1]
        tokens = tokens + self.pos_proj(self.position_feature(positions, x.shape[-2], x.shape[-1]).to(dtype))
        if self.size_proj is not None:
            # Windows of single pixels have no size, but the weights are in every graph (DDP asks for that).
            spacing = torch.ones_like(positions[:1]) if spacing is None else spacing
            tokens = tokens + self.size_proj(size_feature(spacing).to(dtype))
        return tokens

    def _read(self, images: torch.Tensor, positions: torch.Tensor, spacing: torch.Tensor | None) -> torch.Tensor:
        """Windows (B, N, C, k, k); those of uint8 images are normalised before they are interpolated."""
        if images.dtype != torch.uint8 or spacing is not None:
            return read_windows(self.normalize(images), positions, self.window, self.convention, spacing)
        B, C, H, W = images.shape
        N, side = positions.shape[1], self.window + 2
        # Gathering a pixel costs about six times as much as converting it.
        if self.convention == 'spot' or side > min(H, W) or 6 * N * side ** 2 > H * W:
            return read_windows(self.normalize(images), positions, self.window, self.convention)
        blocks, inside = gather_blocks(images, positions, self.window)
        windows = read_windows(self.normalize(blocks), inside, self.window, self.convention)
        return windows.view(B, N, C, self.window, self.window)

    def position_feature(self, positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """phi of (B, N, 2) positions in images of height x width pixels, (B, N, pos_nodes ** 2)."""
        if self.convention == 'spot':
            sigma = self.n_sigma.float() * self.window / (height + width)
            return position_feature(positions, self.pos_nodes, sigma, scaled=True)
        return position_feature(positions, self.pos_nodes, patch_sigma(self.n_sigma.float(), self.pos_nodes))


def patch_sigma(n_sigma: torch.Tensor, pos_nodes: int) -> torch.Tensor:
    """Sigma under convention `patch`, for any image size; equals that of `spot` at 16 nodes, k = 16 and 224 px."""
    return n_sigma * (15. / 28.) / (pos_nodes - 1)


def square_window(patch_size: int | tuple[int, int]) -> int:
    """Side of a window in pixels.

    Raises:
        ValueError: The patch is not square, or smaller than a pixel.
    """
    height, width = to_2tuple(patch_size)
    if height != width or height < 1:
        raise ValueError(f'patch_size={patch_size} is no window: windows are square, of at least 1 pixel.')
    return height
