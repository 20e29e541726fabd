"""Token relevance: the predictor, and the random masks by which it is trained.

Paper: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class RelevancePredictor(nn.Module):
    """Relevance of each token, from its embedding, its attention statistics and the mean of both over the tokens.

    Shapes: tokens (B, N, dim), statistics (B, N, num_statistics), relevance (B, N).

    Args:
        dim: Token width.
        num_statistics: Of each token, see `timm_spot.ops.attention_statistics`.
    """

    def __init__(
            self,
            dim: int,
            num_statistics: int,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        features, hidden = dim // 4 + num_statistics, dim // 16
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)  # the projection has weights enough
        self.proj = nn.Linear(dim, dim // 4, **dd)
        self.local = nn.Linear(features, hidden, **dd)
        # The mean over tokens is the same for all of them: it is multiplied once, not with each token.
        self.context = nn.Linear(features, hidden, bias=False, **dd)
        self.act = nn.GELU()
        self.head = nn.Linear(hidden, 1, **dd)

    def forward(self, x: torch.Tensor, statistics: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Relevance (B, N); tokens with a zero in `keep` (B, N) do not count in the mean."""
        # Statistics reach from zero to the count of tokens and its square.
        x = torch.cat([self.proj(self.norm(x)), statistics.log1p().to(x.dtype)], dim=-1)
        if keep is None:
            mean = x.mean(dim=1, keepdim=True)
        else:
            weights = (keep / keep.sum(dim=1, keepdim=True)).to(x.dtype)
            mean = weights[:, None] @ x
        return self.head(self.act(self.local(x) + self.context(mean))).squeeze(-1)


def sample_mask(relevance: torch.Tensor, keep: torch.Tensor, keep_rate: float) -> torch.Tensor:
    """Random mask (B, N) for training, ones and zeros, by a straight-through Gumbel-softmax.

    A token of relevance zero stays with probability `keep_rate`, so that one predictor serves every rate. Tokens that
    `keep` (B, N) has dropped stay dropped; the most relevant one of each image always stays.

    Paper: `Categorical Reparameterization with Gumbel-Softmax` - https://arxiv.org/abs/1611.01144
    """
    relevance = relevance.float()
    logits = relevance + math.log(keep_rate / (1. - keep_rate))
    mask = F.gumbel_softmax(torch.stack([logits, torch.zeros_like(logits)], dim=-1), hard=True)[..., 0] * keep
    best = relevance.detach().masked_fill(keep == 0, -torch.inf).argmax(dim=1, keepdim=True)
    return mask + (1. - mask.detach()) * torch.zeros_like(mask).scatter(1, best, 1.)
