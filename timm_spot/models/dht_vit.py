"""Vision Transformer over regions that follow the image: a timm ViT with tokens of any shape.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652

The class, its registered names and their weights. The hierarchy of regions is in `timm_spot.ops`, the tokenizer in
`hierarchical_tokenizer.py`, the embedding in `hierarchical_embed.py`, the conversion of checkpoints in
`dht_checkpoint.py`.
"""
from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import (
    PretrainedCfg,
    checkpoint,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ._features import Intermediates, format_intermediates
from ._timm import feature_take_indices, update_model_args
from .dht_checkpoint import checkpoint_filter_fn
from .dht_embed import HierarchicalEmbed
from .dht_tokenizer import Regions
from .download import prefer_file
from .loading import build_checked

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
        stride: Pixels per cell of the map; a cell shows the token of its central pixel.

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
            img_size: Union[int, Tuple[int, int]] = 224,
            patch_size: Union[int, Tuple[int, int]] = 16,
            *,
            n_tokens: Optional[int] = None,
            strict: bool = True,
            pos_size: Optional[int] = None,
            pos_scale: Optional[int] = None,
            normalize_windows: bool = False,
            tokenizer: Optional[Dict[str, Any]] = None,
            drop_path_rate: float = 0.,
            **kwargs: Any,
    ) -> None:
        if kwargs.pop('pos_embed', 'none') not in ('', 'none'):
            raise ValueError("pos_embed must be 'none': a table has no rows for regions.")
        if kwargs.get('patch_drop_rate'):
            raise ValueError(f"patch_drop_rate={kwargs['patch_drop_rate']} must be 0: set n_tokens for fewer tokens.")
        kwargs.pop('dynamic_img_size', None)  # any size is
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            pos_embed='none',
            embed_layer=partial(
                HierarchicalEmbed,
                n_tokens=n_tokens,
                strict=strict,
                pos_size=pos_size,
                pos_scale=pos_scale,
                normalize_windows=normalize_windows,
                tokenizer=tokenizer,
            ),
            **kwargs,
        )
        if drop_path_rate:
            for block in self.blocks:
                block.drop_path1, block.drop_path2 = DropPath(drop_path_rate), DropPath(drop_path_rate)

    @property
    def n_tokens(self) -> int:
        """Budget: tokens of an image of the nominal size (prefix tokens do not count)."""
        return self.patch_embed.num_patches

    def set_placement(self, n_tokens: int) -> None:
        """Change the budget, by the name that subpixel ViTs have for it; a saved model keeps the change."""
        self.patch_embed.set_budget(n_tokens)
        update_model_args(self, n_tokens=n_tokens)

    def segment(self, images: torch.Tensor) -> Regions:
        """The regions that are the tokens of images (B, 3, H, W)."""
        embed = self.patch_embed
        return embed.tokenizer(images, embed.n_tokens, strict=embed.strict and embed.n_tokens is not None)

    def _embed(self, x: torch.Tensor) -> Tuple[TokenFeatures, Optional[torch.Tensor]]:
        """Embedded tokens, and the attention mask: None where there is no padding, which faster kernels like."""
        x, mask, regions = self.patch_embed(x)
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = self.norm_pre(self.pos_drop(torch.cat([*prefix, x], dim=1)))
        mask = torch.cat([mask.new_ones(len(x), self.num_prefix_tokens), mask], dim=1)
        full = int(regions.counts.min()) == int(regions.counts.max())
        return TokenFeatures(x, mask, regions), None if full else mask[:, None, None, :]

    def _run_block(self, block: nn.Module, x: torch.Tensor, attn_mask: Optional[torch.Tensor]) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(block, x, attn_mask)
        return block(x, attn_mask=attn_mask)

    def forward_features(self, x: torch.Tensor) -> TokenFeatures:
        """Images (B, 3, H, W) to all tokens after the last block, their mask, and the regions they are."""
        features, attn_mask = self._embed(x)
        x = features.tokens
        for block in self.blocks:
            x = self._run_block(block, x, attn_mask)
        return features._replace(tokens=self.norm(x))

    def pool(
            self,
            x: torch.Tensor,
            pool_type: Optional[str] = None,
            mask: Optional[torch.Tensor] = None,
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
            x: Union[TokenFeatures, torch.Tensor],
            pre_logits: bool = False,
            mask: Optional[torch.Tensor] = None,
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
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            stride: Optional[int] = None,
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
            stride: Pixels per cell of a map, `patch_size` by default.
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


def _from_timm(source: str) -> PretrainedCfg:
    """Config of the timm ViT whose weights are taken, safetensors from its Hub repository."""
    return dataclasses.replace(
        get_pretrained_cfg(source), url=None, custom_load=False, fixed_input_size=False, architecture=None, tag=None)


def _from_authors() -> PretrainedCfg:
    """Config of a classifier of the authors', none of which has been published so far."""
    return PretrainedCfg(
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        interpolation='bicubic',
        first_conv='patch_embed.proj',
        classifier='head',
        paper_ids='arXiv:2511.02652',
    )


default_cfgs = generate_default_cfgs({
    'dht_vit_small_patch16_in21k.augreg_in21k_ft_in1k': _from_timm('vit_small_patch16_224.augreg_in21k_ft_in1k'),
    'dht_vit_base_patch16_in21k.augreg2_in21k_ft_in1k': _from_timm('vit_base_patch16_224.augreg2_in21k_ft_in1k'),
    'dht_vit_small_patch16_in1k.augreg_in1k': _from_timm('vit_small_patch16_224.augreg_in1k'),
    'dht_vit_small_patch16_in1k.dht_in1k': _from_authors(),
    'dht_vit_base_patch16_in1k.augreg_in1k': _from_timm('vit_base_patch16_224.augreg_in1k'),
    'dht_vit_base_patch16_in1k.dht_in1k': _from_authors(),
    'dht_vit_pico_patch8_64': PretrainedCfg(
        input_size=(3, 64, 64), crop_pct=1.0, crop_mode='squash', mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
        first_conv='patch_embed.proj', classifier='head', num_classes=10),
})


def _create_dht_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> DhtVisionTransformer:
    defaults = dict(pre_norm=True, init_values=0.1, norm_layer=partial(nn.LayerNorm, eps=1e-5))
    cfg = resolve_pretrained_cfg(
        variant, kwargs.pop('pretrained_cfg', None), prefer_file(kwargs.pop('pretrained_cfg_overlay', None)))
    if pretrained:
        if not (cfg.has_weights or cfg.state_dict):
            name = f'{variant}.{cfg.tag}' if cfg.tag else variant
            raise RuntimeError(
                f'{name} has no pretrained weights (the authors have published no classifier): use pretrained=False, '
                'or pretrained_cfg_overlay=dict(file=PATH), on the command line --weights PATH.')
    out_indices = kwargs.pop('out_indices', 3)
    return build_checked(
        DhtVisionTransformer,
        variant,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **{**defaults, **kwargs},
    )


@register_model
def dht_vit_small_patch16_in21k(pretrained: bool = False, **kwargs: Any) -> DhtVisionTransformer:
    """dHT ViT-Small (dHT-S/16), class token; starts from ImageNet-21k fine-tuned on ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return _create_dht_vit('dht_vit_small_patch16_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dht_vit_base_patch16_in21k(pretrained: bool = False, **kwargs: Any) -> DhtVisionTransformer:
    """dHT ViT-Base (dHT-B/16), class token; starts from ImageNet-21k fine-tuned on ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
    return _create_dht_vit('dht_vit_base_patch16_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dht_vit_small_patch16_in1k(pretrained: bool = False, **kwargs: Any) -> DhtVisionTransformer:
    """dHT ViT-Small (dHT-S/16), class token; starts from ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return _create_dht_vit('dht_vit_small_patch16_in1k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dht_vit_base_patch16_in1k(pretrained: bool = False, **kwargs: Any) -> DhtVisionTransformer:
    """dHT ViT-Base (dHT-B/16), class token; starts from ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
    return _create_dht_vit('dht_vit_base_patch16_in1k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dht_vit_pico_patch8_64(pretrained: bool = False, **kwargs: Any) -> DhtVisionTransformer:
    """dHT ViT-Pico with windows of 8 px on 64 px images, class token; for tests and small experiments, no weights."""
    model_args = dict(img_size=64, patch_size=8, embed_dim=128, depth=5, num_heads=4)
    return _create_dht_vit('dht_vit_pico_patch8_64', pretrained=pretrained, **dict(model_args, **kwargs))
