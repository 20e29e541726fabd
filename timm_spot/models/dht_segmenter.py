"""Segmentation with tokens that are regions: a class for each token, painted back on its pixels.

Paper: `Differentiable Hierarchical Visual Tokenization` (dHT) - https://arxiv.org/abs/2511.02652
"""
from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import nn

from ..ops.regions.loss import image_area_loss, token_focal_loss, token_targets
from .checkpoint_file import find_tensors
from .dht_checkpoint import checkpoint_filter_fn
from .dht_vit import DhtVisionTransformer, TokenFeatures


class DhtSegmenter(nn.Module):
    """A dHT ViT with a classifier on every token.

    Args:
        backbone: `DhtVisionTransformer`; its own norm and classifier are not used.
        num_classes: Classes n.
        last_blocks: Concatenate the outputs of so many last blocks.
        mlp: A hidden layer of four times the width before the classifier.

    Raises:
        TypeError: `backbone` is no dHT ViT.
        ValueError: It has not so many blocks.

    Example:
        >>> import timm, torch, timm_spot
        >>> model = timm_spot.DhtSegmenter(timm.create_model('dht_vit_pico_patch8_64'), num_classes=5)
        >>> model.eval()(torch.rand(1, 3, 48, 64)).shape
        torch.Size([1, 5, 48, 64])
    """

    def __init__(self, backbone: DhtVisionTransformer, num_classes: int, last_blocks: int = 1, mlp: bool = False):
        super().__init__()
        if not isinstance(backbone, DhtVisionTransformer):
            raise TypeError(f'backbone must be a DhtVisionTransformer, got {type(backbone).__name__}.')
        if not 1 <= last_blocks <= len(backbone.blocks):
            raise ValueError(f'last_blocks={last_blocks} must lie in 1..{len(backbone.blocks)}.')
        self.last_blocks = last_blocks
        self.num_classes = num_classes
        self.backbone = backbone
        backbone.norm = nn.Identity()
        backbone.fc_norm = nn.Identity()
        backbone.reset_classifier(0)
        width = last_blocks * backbone.embed_dim
        self.norm = nn.LayerNorm(width, eps=1e-5)
        classifier = nn.Linear(width, num_classes)
        self.head = nn.Sequential(Mlp(width, 4 * width), classifier) if mlp else classifier

    def load_authors(self, state_dict: dict[str, torch.Tensor]) -> DhtSegmenter:
        """Load a dense model's weights under the authors' names; returns self.

        Raises:
            ValueError: The weights are damaged or do not suit this model; names what does not.
        """
        state_dict = find_tensors(state_dict, 'state_dict')[0]
        own = {k: v for k, v in state_dict.items() if k.startswith(('norm.', 'head.'))}
        rest = checkpoint_filter_fn({k: v for k, v in state_dict.items() if k not in own}, self.backbone)
        try:
            self.load_state_dict({**{f'backbone.{k}': v for k, v in rest.items()}, **own})
        except RuntimeError as e:
            raise ValueError(f'these weights do not suit this model: {e}') from e
        return self

    def forward_features(self, images: torch.Tensor) -> TokenFeatures:
        """Images to normed tokens (B, prefix + max, last_blocks * D), their mask and their regions."""
        features, taken = self.backbone.forward_intermediates(
            images, indices=self.last_blocks, output_fmt='NLC', return_prefix_tokens=True)
        if self.backbone.num_prefix_tokens:
            taken = [torch.cat([prefix, tokens], dim=1) for tokens, prefix in taken]
        return features._replace(tokens=self.norm(torch.cat(taken, dim=2)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) to logits (B, n, H, W)."""
        features = self.forward_features(images)
        return self.region_logits(features)[features.regions.segmentation].permute(0, 3, 1, 2)

    def region_logits(self, features: TokenFeatures) -> torch.Tensor:
        """Logits (N, n) of all regions of a batch."""
        prefix = self.backbone.num_prefix_tokens
        return self.head(features.tokens[:, prefix:][features.mask[:, prefix:]])

    def loss(
            self,
            images: torch.Tensor,
            labels: torch.Tensor,
            gamma: int = 4,
            ignored_class: int | None = None,
    ) -> torch.Tensor:
        """Focal loss of the tokens, plus that of the class token against the areas of the classes where there is one.

        Args:
            images: (B, 3, H, W).
            labels: Classes (B, H, W); pixels outside 0..n - 1 are skipped.
            gamma: See `token_focal_loss`.
            ignored_class: Class without weight.
        """
        features = self.forward_features(images)
        regions = features.regions
        targets = token_targets(regions.segmentation, labels, regions.sizes, regions.image, self.num_classes)
        loss = token_focal_loss(self.region_logits(features), targets, gamma, ignored_class)
        if self.backbone.has_class_token:
            loss = loss + image_area_loss(self.head(features.tokens[:, 0]), labels, ignored_class)
        return loss
