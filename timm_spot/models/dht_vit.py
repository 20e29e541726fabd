"""Vision Transformer over regions that follow the image: a timm ViT with tokens of any shape.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652

The class. The hierarchy of regions is in `timm_spot.ops.regions`, the tokenizer in `dht_tokenizer.py`, the embedding in
`dht_embed.py`, names and weights in `dht_zoo.py`, the conversion of checkpoints in `dht_checkpoint.py`.
"""
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from timm.models import checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ._features import Intermediates, format_intermediates
from ._timm import feature_take_indices, update_model_args
from .dht_embed import HierarchicalEmbed
from .dht_tokenizer import Regions

__all__ = ['DhtVisionTransformer', 'TokenFeatures']


class TokenFeatures(NamedTuple):
    """Tokens of a batch with what says which of them are real."""
    tokens: torch.Tensor  # (B, prefix + max, D); what padding rows hold means nothing
    mask: torch.Tensor  # (B, prefix + max), True where a token is real
    regions: Regions


def paint_tokens(tokens: torch.Tensor, segmentation: torch.Tensor, counts: torch.Tensor, stride: int) -> torch.Tensor:
    """Paint tokens back through the segmentation.

    Args:
        tokens: (B, max, D), without prefix tokens.
        segmentation: (B, H, W), ids running across the batch.
        counts: Tokens of each image, (B,).
        stride: Pixels of the image, along each axis, for each of the map, which shows the token of the central one.

    Returns:
        (B, D, max(1, H // stride), max(1, W // stride)).
    """
    B, H, W = segmentation.shape
    rows, columns = max(1, H // stride), max(1, W // stride)
    y = ((torch.arange(rows, device=tokens.device) + 0.5) * H / rows).long()
    x = ((torch.arange(columns, device=tokens.device) + 0.5) * W / columns).long()
    start = (counts.cumsum(0) - counts)[:, None, None]
    index = (segmentation[:, y[:, None], x] - start).flatten(1)
    maps = tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
    return maps.transpose(1, 2).reshape(B, -1, rows, columns)


class DhtVisionTransformer(VisionTransformer):
    """Vision Transformer over regions of any shape.

    Images of a batch have different numbers of tokens: rows are padded and masked, and an image's logits do not depend
    on its neighbours. Everything behind the tokens is timm's VisionTransformer; positions enter with each token.

    Args:
        img_size: Nominal image size; images of any size and aspect are accepted.
        patch_size: Side of the window to which a region's bounding box is resampled.
        n_tokens: Budget, the tokens of each image that has enough regions; by default it goes with the image size, see
            `HierarchicalEmbed`.
        strict: Keep to `n_tokens` exactly; otherwise usually a few more, as the authors' code does.
        pos_size: Cells per axis of the position histogram.
        pos_scale: Cells that its values are scaled for.
        normalize_windows: Scale windows by the share that their region covers.
        tokenizer: Settings of `HierarchicalTokenizer`, a dict.
        drop_path_rate: Stochastic depth, the same in every block.
        **kwargs: Of timm's VisionTransformer.

    Raises:
        ValueError: An unknown criterion, a budget below 1, a `pos_embed` table, a `patch_drop_rate`, other than 3
            channels.
    """

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            patch_size: int | tuple[int, int] = 16,
            *,
            n_tokens: int | None = None,
            strict: bool = True,
            pos_size: int | None = None,
            pos_scale: int | None = None,
            normalize_windows: bool = False,
            tokenizer: dict[str, Any] | None = None,
            drop_path_rate: float = 0.,
            **kwargs: Any,
    ) -> None:
        if kwargs.pop('pos_embed', 'none') not in ('', 'none'):
            raise ValueError("pos_embed must be 'none': a table has no rows for regions.")
        if kwargs.get('patch_drop_rate'):
            raise ValueError(f"patch_drop_rate={kwargs['patch_drop_rate']} must be 0: set n_tokens for fewer tokens.")
        kwargs.pop('dynamic_img_size', None)  # any size is

        def embed_layer(bias: bool, dynamic_img_pad: bool, **timms: Any) -> HierarchicalEmbed:
            # timm turns the bias off with pre_norm; here it is always there, and regions need no padding.
            return HierarchicalEmbed(
                n_tokens=n_tokens, strict=strict, pos_size=pos_size, pos_scale=pos_scale,
                normalize_windows=normalize_windows, tokenizer=tokenizer, **timms)

        super().__init__(
            img_size=img_size, patch_size=patch_size, pos_embed='none', embed_layer=embed_layer, **kwargs)
        if drop_path_rate:
            for block in self.blocks:
                block.drop_path1, block.drop_path2 = DropPath(drop_path_rate), DropPath(drop_path_rate)

    @property
    def n_tokens(self) -> int:
        """Budget: tokens of an image of the nominal size (prefix tokens do not count)."""
        return self.patch_embed.num_patches

    def set_budget(self, n_tokens: int | None) -> None:
        """Change the budget; None for the default by image size. A saved model keeps the change."""
        self.patch_embed.set_budget(n_tokens)
        update_model_args(self, n_tokens=n_tokens)

    def segment(self, images: torch.Tensor, n_tokens: int | None = None) -> Regions:
        """The regions that are the tokens of images (B, 3, H, W); `n_tokens` overrides the budget for this call."""
        return self.patch_embed.find_regions(images, n_tokens)

    def _embed(self, x: torch.Tensor, n_tokens: int | None = None) -> tuple[TokenFeatures, torch.Tensor | None]:
        """Embedded tokens, and the attention mask: None where there is no padding, which faster kernels like."""
        x, mask, regions = self.patch_embed(x, n_tokens)
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = self.norm_pre(self.pos_drop(torch.cat([*prefix, x], dim=1)))
        mask = torch.cat([mask.new_ones(len(x), self.num_prefix_tokens), mask], dim=1)
        full = int(regions.counts.min()) == int(regions.counts.max())
        return TokenFeatures(x, mask, regions), None if full else mask[:, None, None, :]

    def _run_block(self, block: nn.Module, x: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor:
        if self.grad_checkpointing:
            return checkpoint(block, x, attn_mask)
        return block(x, attn_mask=attn_mask)

    def forward_features(self, x: torch.Tensor, n_tokens: int | None = None) -> TokenFeatures:
        """Images (B, 3, H, W) to all tokens after the last block, their mask, and the regions they are.

        Args:
            x: Images.
            n_tokens: Budget for this call, in the place of the model's.
        """
        features, attn_mask = self._embed(x, n_tokens)
        x = features.tokens
        for block in self.blocks:
            x = self._run_block(block, x, attn_mask)
        return features._replace(tokens=self.norm(x))

    def pool(
            self,
            x: torch.Tensor,
            pool_type: str | None = None,
            mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pool tokens (B, prefix + max, D) to (B, D), leaving padding out.

        Args:
            x: Tokens.
            pool_type: Override of the model's pooling.
            mask: (B, prefix + max), True where a token is real.

        Raises:
            ValueError: The pooling needs the mask and has none.
        """
        pool_type = self.global_pool if pool_type is None else pool_type
        if self.attn_pool is None and pool_type in ('', 'token'):
            return x[:, 0] if pool_type else x
        if mask is None:
            raise ValueError(
                f'global_pool={pool_type!r} needs to know which tokens are padding: pass mask=, as in '
                'forward_head(features.tokens, mask=features.mask), or forward_head(features).')
        if not self.pool_include_prefix:
            x, mask = x[:, self.num_prefix_tokens:], mask[:, self.num_prefix_tokens:]
        if self.attn_pool is not None:
            return self.attn_pool(x, attn_mask=mask[:, None, None, :])
        real = mask[:, :, None]
        mean = torch.where(real, x, 0.).sum(1) / real.sum(1)
        largest = torch.where(real, x, -torch.inf).amax(1)
        return {'avg': mean, 'max': largest, 'avgmax': 0.5 * (mean + largest)}[pool_type]

    def forward_head(
            self,
            x: TokenFeatures | torch.Tensor,
            pre_logits: bool = False,
            mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `forward_features` gave, or its tokens and mask, to logits (B, num_classes)."""
        if isinstance(x, TokenFeatures):
            x, mask = x.tokens, x.mask
        x = self.head_drop(self.fc_norm(self.pool(x, mask=mask)))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            stride: int | None = None,
    ) -> Intermediates:
        """Features after chosen blocks, with timm's arguments and results.

        'NCHW' paints tokens back on the image: maps (B, D, H // stride, W // stride). 'NLC' gives tokens (B, max, D),
        of which `regions.counts`, with the final features, says how many are real.

        Args:
            x: Images (B, 3, H, W).
            indices: Take last n blocks if int, all if None, select matching indices if sequence.
            return_prefix_tokens: Return both prefix and image tokens.
            norm: Apply the final norm to all intermediates.
            stop_early: Stop after the last chosen block.
            output_fmt: 'NCHW' or 'NLC'.
            intermediates_only: Only return intermediate features.
            output_dict: Return a dictionary with 'image_features' and 'image_intermediates'.
            stride: Pixels of the image, along each axis, for each of a map; `patch_size` by default.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NLC'.")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        features, attn_mask = self._embed(x)
        x, regions = features.tokens, features.regions
        taken = []
        for i, block in enumerate(self.blocks[:max_index + 1] if stop_early else self.blocks):
            x = self._run_block(block, x, attn_mask)
            if i in take_indices:
                taken.append(self.norm(x) if norm else x)

        to_map = None
        if output_fmt == 'NCHW':
            stride = self.patch_embed.feat_ratio() if stride is None else stride
            to_map = partial(
                paint_tokens, segmentation=regions.segmentation, counts=regions.counts, stride=stride)
        last = None if intermediates_only else features._replace(tokens=self.norm(x))
        return format_intermediates(taken, last, self.num_prefix_tokens, return_prefix_tokens, output_dict, to_map)
