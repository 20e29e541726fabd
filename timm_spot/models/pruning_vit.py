"""Any timm ViT, a subpixel one too, turned into one that drops the image tokens that matter least, or merges some.

Paper: `SPOT: SParsification with attentiOn dynamics via Token relevance in Vision Transformers` -
https://arxiv.org/abs/2511.10488

Placement decides where tokens lie, relevance which of them survive: a subpixel ViT can be pruned like any other.
"""
from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ._timm import update_model_args
from .loading import create_checked
from .pruning import TokenPruning, check_no_mask
from .spot_vit import SubpixelVisionTransformer

torch.fx.wrap('check_no_mask')  # a leaf of an FX graph, where the arguments are not known


class RelevanceVisionTransformer(TokenPruning, VisionTransformer):
    """timm's VisionTransformer that drops tokens, see `TokenPruning`."""

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def token_map_size(self, x: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of images (B, C, H, W)."""
        return self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))

    def place_tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Where the patches of images (B, C, H, W) lie, (N, 2) in pixels, and what `_embed` is to be told of it."""
        axes = [
            step * torch.arange(n, device=x.device, dtype=torch.float32)
            for step, n in zip(self.patch_embed.patch_size, self.token_map_size(x))]
        return torch.cartesian_prod(*axes), {}

    def forward_features(
            self,
            x: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Images (B, C, H, W) to the tokens left after the last block, (B, prefix + count, D)."""
        if not self.reduces:
            return self.join_predictors(super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal))
        check_no_mask(attn_mask, is_causal)
        return self.forward_dropped(self._embed(x))

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        if self.masks:
            check_no_mask(attn_mask, is_causal)
            return self.forward_masked(x).logits
        if self.merges:
            check_no_mask(attn_mask, is_causal)
            return self.forward_head(self.forward_sized(x))
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))


class RelevanceSubpixelVisionTransformer(TokenPruning, SubpixelVisionTransformer):
    """Subpixel ViT that drops tokens, see `TokenPruning`."""

    def token_map_size(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> tuple[int, int]:
        """Rows and columns of the lattice on which the tokens of images (B, C, H, W) lie.

        Raises:
            ValueError: They lie on none.
        """
        return self._map_size(x, positions)

    def place_tokens(
            self,
            x: torch.Tensor,
            positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Where the tokens of images (B, C, H, W) lie, in pixels, and what `_embed` is to be told of it."""
        placed = self._place(x, positions)
        size = torch.tensor(x.shape[-2:], device=placed.device)
        return placed[..., :2] * size, dict(positions=placed)

    def forward_features(
            self,
            x: torch.Tensor,
            positions: torch.Tensor | None = None,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Images (B, C, H, W), placed as `positions` say, to the tokens left after the last block."""
        if not self.reduces:
            features = super().forward_features(x, positions, attn_mask=attn_mask, is_causal=is_causal)
            return self.join_predictors(features)
        check_no_mask(attn_mask, is_causal)
        return self.forward_dropped(self._embed(x, positions))

    def forward(
            self,
            x: torch.Tensor,
            positions: torch.Tensor | None = None,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Images (B, C, H, W), placed as `positions` say, to logits (B, num_classes)."""
        if self.masks:
            check_no_mask(attn_mask, is_causal)
            return self.forward_masked(x, positions=positions).logits
        if self.merges:
            check_no_mask(attn_mask, is_causal)
            return self.forward_head(self.forward_sized(x, positions=positions))
        return self.forward_head(self.forward_features(x, positions, attn_mask, is_causal))


_CLASSES = {
    VisionTransformer: RelevanceVisionTransformer,
    SubpixelVisionTransformer: RelevanceSubpixelVisionTransformer,
}


def sparsify(
        vit: str | VisionTransformer,
        keep_rate: float = 0.7,
        stages: Sequence[int] | None = None,
        scorer: str = 'relevance',
        read: str = 'last',
        scorer_seed: int = 0,
        r: int | Sequence[int] | None = None,
        similarity: float | None = None,
        **model_keywords: Any,
) -> RelevanceVisionTransformer | RelevanceSubpixelVisionTransformer:
    """Turn any timm VisionTransformer, or a subpixel one, into one that drops the tokens that matter least.

    In front of the block of stage s (counted from 1) the keep_rate ** s * N most relevant of N image tokens stay.
    The predictors of scorer='relevance' are fresh and have to be trained; the other scorers are ready. With
    scorer='merge' tokens that are alike are merged instead, with `r` beside another scorer, as well.

    Args:
        vit: Name of a timm model, or an instance, which is not changed.
        keep_rate: Share of the tokens that each stage keeps, in (0, 1]; at 1 the result gives `vit`'s logits.
        stages: Indices of the blocks in front of which tokens fall; by default a quarter, a half and three quarters of
            the depth (3, 6, 9 of 12).
        scorer: 'relevance', 'cls-attention', 'received-attention', 'norm', 'random' or 'merge', see `TokenPruning`.
        read: Whose attention the predictors see: that of the 'last' block before the stage, or of 'all' since the
            previous one. A block that is read leaves fused attention.
        scorer_seed: Of the scorer 'random'.
        r: How many tokens each block merges, or a list of one for each; else scorer='merge' goes by the keep rate.
        similarity: In place of `r`, for scorer='merge': the least cosine of keys that are merged, image by image.
        **model_keywords: For a name, what `timm.create_model` takes, such as `pretrained=True`.

    Returns:
        The model, in the mode (train, eval), on the device and in the dtype of the source.

    Raises:
        ValueError: A model that is no such ViT (the message says why); a setting that `TokenPruning` refuses.
        TypeError: A keyword that an instance cannot take any more.

    Example:
        >>> import timm_spot, torch
        >>> model = timm_spot.sparsify('vit_tiny_patch16_224', keep_rate=0.5, scorer='cls-attention').eval()
        >>> [index.shape[1] for index in model.kept_tokens(torch.rand(1, 3, 224, 224))]
        [98, 49, 25]
        >>> model = timm_spot.sparsify('vit_tiny_patch16_224', scorer='merge', r=8).eval()
        >>> model.forward_features(torch.rand(1, 3, 224, 224)).shape  # a class token, and 8 fewer from 12 blocks
        torch.Size([1, 101, 192])
    """
    if isinstance(vit, str):
        vit = create_checked(vit, **model_keywords)
    elif not isinstance(vit, nn.Module):
        raise TypeError(f'vit must be the name of a timm model or an instance, got {type(vit).__name__}.')
    elif model_keywords:
        raise TypeError(f"a model that is already built takes no {', '.join(model_keywords)}: give a name instead.")
    else:
        _check_backbone(vit)
        vit = copy.deepcopy(vit)
    return sparsify_in_place(
        vit, keep_rate=keep_rate, stages=stages, scorer=scorer, read=read, scorer_seed=scorer_seed, r=r,
        similarity=similarity)


def _check_backbone(vit: nn.Module) -> None:
    if type(vit) in _CLASSES:
        return
    kind = type(vit).__name__
    name = getattr(vit, 'pretrained_cfg', {}).get('architecture') or kind
    if isinstance(vit, TokenPruning):
        raise ValueError(f'{name} drops tokens already: set_keep_rate changes how many.')
    if hasattr(vit, 'dist_token'):
        raise ValueError(f'{name} cannot be sparsified: it has a distillation token with a head of its own.')
    raise ValueError(f'{name} cannot be sparsified: it is a {kind}, not a timm VisionTransformer.')


def sparsify_in_place(
        vit: VisionTransformer,
        **pruning: Any,
) -> RelevanceVisionTransformer | RelevanceSubpixelVisionTransformer:
    _check_backbone(vit)
    source = type(vit)
    vit.__class__ = _CLASSES[source]
    try:
        vit.init_pruning(**pruning)
    except (TypeError, ValueError):
        vit.__class__ = source
        raise
    vit.predictors.train(vit.training)
    if hasattr(vit, 'pretrained_cfg'):  # built by timm: say how it can be built again
        backbone = vit.pretrained_cfg['architecture']
        vit.pretrained_cfg = dict(vit.pretrained_cfg, architecture='relevance_vit')
        vit.default_cfg = vit.pretrained_cfg
        update_model_args(vit, **_describe(vit, backbone), **pruning)
    return vit


def _describe(vit: VisionTransformer, backbone: str) -> dict[str, Any]:
    """Keywords of `relevance_vit` for a backbone; one that has a backbone itself (a retrofit) keeps it apart."""
    inner = getattr(vit, '_model_args', {}).get('backbone')
    return dict(backbone=backbone, **(dict(backbone_args=dict(backbone=inner)) if inner else {}))
