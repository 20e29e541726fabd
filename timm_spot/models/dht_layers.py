"""Learned layers of the hierarchical tokenizer, which answer for an image whatever is beside it.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.regions.graph import sum_channels


class RowwiseLinear(nn.modules.linear.NonDynamicallyQuantizableLinear):
    """nn.Linear of rows (n, C), each on its own: a matrix product rounds differently for other numbers of rows.

    Quantisation passes it by: a few dozen weights save nothing, and the regions would move.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Channels first, as the values of vertices lie: the transposes move nothing.
        return (sum_channels(self.weight.T[:, :, None] * x.T[:, None]) + self.bias[:, None]).T


class PixelFeatures(nn.Module):
    """Per-pixel features: a pointwise branch and one of two strided convolutions, (B, 3, H, W) to (B, C, H, W)."""

    def __init__(self, in_chans: int, hid_ch: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.ds = nn.Sequential(nn.Conv2d(in_chans, hid_ch, 1, device=device), nn.BatchNorm2d(hid_ch, device=device))
        self.cv = nn.Sequential(
            nn.Conv2d(in_chans, 4 * hid_ch, 2, stride=2, device=device),
            nn.BatchNorm2d(4 * hid_ch, device=device),
            nn.SiLU(),
            nn.Conv2d(4 * hid_ch, hid_ch, 2, stride=2, device=device),
            nn.BatchNorm2d(hid_ch, device=device),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self._features(x)
        # The algorithm of a convolution, and with it the last bit, depends on the batch size: take images one by one.
        return torch.cat([self._features(image) for image in x.split(1)])

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        H, W = x.shape[-2:]
        padded = F.pad(x, (0, -W % 4, 0, -H % 4), mode='replicate')
        coarse = F.interpolate(self.cv(padded), scale_factor=4, mode='bilinear', align_corners=True)
        return F.silu(self.ds(x) + coarse[..., :H, :W])


class GradientActivation(nn.Module):
    """Bends gradients by one number per axis: asinh above zero, sinh below, nothing at zero."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.lmbda = nn.Parameter(torch.zeros(2, 1, 1, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            bend = self.lmbda.to(x.dtype)
            safe = torch.where(bend == 0, torch.ones_like(bend), bend)
            bent = torch.where(safe > 0, (safe * x).asinh() / safe.abs().asinh(), (x * safe.asinh()).sinh() / safe)
            return torch.where(bend == 0, x, bent)
