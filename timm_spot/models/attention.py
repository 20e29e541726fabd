"""Reading the attention of a block: its matrix, its keys, and the block's output with some tokens masked as keys.

timm's attention layers hand their matrix, after the softmax, to their dropout, unless they use fused attention, which
never forms it. So a shallow copy of the block, of the same weights, runs step by step with an `AttentionTap` in place
of each dropout. The block itself stays as it is, and so does whatever hangs on its modules (hooks, adapters, pruning).
Keys are read in the same way, by a `KeyTap` in place of their norm; attention stays fused then.
"""
from __future__ import annotations

import torch
from torch import nn

from ._shallow import shallow_copy


class AttentionTap(nn.Module):
    """Stands in for the dropout of an attention layer: keeps the matrix that comes by, and masks keys in it.

    Args:
        dropout: The layer's own.
        keys: (B, L) of ones and zeros, see `mask_keys`.
    """

    def __init__(self, dropout: nn.Module, keys: torch.Tensor | None = None) -> None:
        super().__init__()
        self.dropout = dropout
        self.keys = keys
        self.matrix: torch.Tensor | None = None

    def forward(self, attention: torch.Tensor) -> torch.Tensor:
        """Attention (B, heads, L, L), after the softmax."""
        if self.keys is not None:
            attention = mask_keys(attention, self.keys)
        self.matrix = attention
        return self.dropout(attention)


def tap_attention(block: nn.Module, keys: torch.Tensor | None = None) -> tuple[nn.Module, list[AttentionTap]]:
    """A block of the same weights that shows its attention, and its taps: one for each attention layer.

    Args:
        block: With attention layers of timm's kind, those that can be fused (`Attention`, `AttentionRope`,
            `EvaAttention` and the like); nearly all blocks have one.
        keys: (B, L) of ones and zeros, see `mask_keys`.

    Raises:
        TypeError: It has no such layer.
    """
    taps: list[AttentionTap] = []
    tapped = _tap(block, keys, taps)
    if not taps:
        raise TypeError(f'{type(block).__name__} has attention of its own, which cannot be read.')
    return tapped, taps


def _tap(module: nn.Module, keys: torch.Tensor | None, taps: list[AttentionTap]) -> nn.Module:
    if hasattr(module, 'fused_attn') and hasattr(module, 'attn_drop'):
        tap = AttentionTap(module.attn_drop, keys)
        taps.append(tap)
        layer = shallow_copy(module, attn_drop=tap)
        layer.fused_attn = False
        return layer
    children = {}
    for name, child in module._modules.items():
        if child is not None:
            tapped = _tap(child, keys, taps)
            if tapped is not child:
                children[name] = tapped
    return shallow_copy(module, **children) if children else module


class KeyTap(nn.Module):
    """Stands in for the norm of an attention layer's keys, and keeps what it gives: the keys (B, heads, L, d).

    Args:
        norm: The layer's own.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.keys: torch.Tensor | None = None

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys (B, heads, L, d), normalised where the layer does so."""
        self.keys = self.norm(keys)
        return self.keys


def tap_keys(layer: nn.Module) -> tuple[nn.Module, KeyTap]:
    """A copy of one of timm's attention layers, of the same weights, that shows its keys, and their tap."""
    tap = KeyTap(layer.k_norm)
    return shallow_copy(layer, k_norm=tap), tap


def read_block(
        block: nn.Module,
        x: torch.Tensor,
        keys: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, L, D) of a block on tokens (B, L, D), and the attention (B, heads, L, L) of its first attention layer.

    With `keys` it is the output that the tokens kept would have without the others, see `mask_keys`; `attn_mask` is the
    block's own argument.
    """
    tapped, taps = tap_attention(block, keys)
    x = tapped(x) if attn_mask is None else tapped(x, attn_mask=attn_mask)
    return x, taps[0].matrix


def mask_keys(attention: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Attention in which some tokens are no keys: attention * keys, divided by its sum over the keys.

    Softmax over the keys left, since what they share is a factor of all of them; unlike a softmax of scores + log(keys)
    it has a gradient at a zero, which says what that token would have changed. Right as long as the keys left have more
    than 1e-30 of the attention; float32 at least, for the same reason.

    Args:
        attention: (B, heads, L, L), after the softmax.
        keys: (B, L) of ones and zeros, one at least.
    """
    weights = attention.to(torch.promote_types(attention.dtype, torch.float32)) * keys[:, None, None]
    return (weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30)).to(attention.dtype)
