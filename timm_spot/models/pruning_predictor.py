"""Token relevance: the predictor, and attention that shows its matrix and can be masked.

Paper: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488
"""
from __future__ import annotations

import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn

SCORERS = ('relevance', 'random', 'norm', 'cls-attention', 'received-attention')


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
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
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

    def forward(self, x: torch.Tensor, statistics: torch.Tensor, keep: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Relevance (B, N); tokens with a zero in `keep` (B, N) do not count in the mean."""
        # Statistics reach from zero to the count of tokens and its square.
        x = torch.cat([self.proj(self.norm(x)), statistics.log1p().to(x.dtype)], dim=-1)
        if keep is None:
            mean = x.mean(dim=1, keepdim=True)
        else:
            weights = (keep / keep.sum(dim=1, keepdim=True)).to(x.dtype)
            mean = weights[:, None] @ x
        return self.head(self.act(self.local(x) + self.context(mean))).squeeze(-1)


def attend(attn: Attention, x: torch.Tensor, keep: Optional[torch.Tensor] = None) -> Tuple[torch.Tensor, torch.Tensor]:
    """Output (B, L, D) of a timm attention layer on x (B, L, D), and its matrix (B, heads, L, L).

    Args:
        attn: The layer, whose own weights are used.
        x: Tokens.
        keep: (B, L) of ones and zeros; a token with a zero is no key, so that the others' output is what it would be
            without the token. Differentiable: its gradient at a zero says what that token would have changed.
    """
    B, L, _ = x.shape
    q, k, v = attn.qkv(x).reshape(B, L, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (attn.q_norm(q) * attn.scale) @ attn.k_norm(k).transpose(-2, -1)
    attention = scores.softmax(dim=-1) if keep is None else masked_softmax(scores, keep[:, None, None]).to(v.dtype)
    output = (attn.attn_drop(attention) @ v).transpose(1, 2).reshape(B, L, attn.attn_dim)
    output = attn.norm(output)
    if attn.gate is not None:
        output = output * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(output)), attention


def masked_softmax(scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """exp(scores) * keep, divided by its sum over the last dimension; float32 at least.

    Not a softmax of scores + log(keep): this one has a gradient where `keep` is zero.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    largest = scores.detach().masked_fill(keep == 0, -torch.inf).amax(dim=-1, keepdim=True)
    # A masked score may exceed the largest kept one by far: its weight is zero, and must not be infinity times zero.
    weights = (scores - largest).clamp(max=20.).exp() * keep
    return weights / weights.sum(dim=-1, keepdim=True)


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
