"""SPoT-MAE: a subpixel ViT pretrained by reconstructing the windows that it was not shown.

Papers: `Masked Autoencoders Are Scalable Vision Learners` - https://arxiv.org/abs/2111.06377
    `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

To drop a token is to leave its position out of the placement, so the encoder is an ordinary subpixel ViT at a smaller
budget. The decoder is told every position, kept or dropped, by the same position feature.
"""
from __future__ import annotations

from functools import partial
from typing import Any, Dict, NamedTuple, Optional, Set

import timm
import torch
from timm.layers import LayerNorm
from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.vision_transformer import Block
from torch import nn

from ..ops.windows import read_windows
from .download import prefer_file
from .loading import build_checked
from .spot_config import SpotPretrainedCfg

__all__ = ['Reconstruction', 'SubpixelMAE']

_SINGLE_PIXELS = 'the decoder reconstructs windows of single pixels, pretrain without coverage and add sizes later.'


class Reconstruction(NamedTuple):
    """What `SubpixelMAE` returns for B images of which M windows each were dropped.

    Attributes:
        loss: Mean squared error over the dropped windows, scalar.
        predicted: Normalised pixels (B, M, C k k) as the decoder has them.
        target: Those of the image: each window minus its mean, divided by its standard deviation.
        kept: Positions (B, N - M, 2) that the encoder saw.
        dropped: Positions (B, M, 2) to reconstruct.
    """

    loss: torch.Tensor
    predicted: torch.Tensor
    target: torch.Tensor
    kept: torch.Tensor
    dropped: torch.Tensor


class SubpixelMAE(nn.Module):
    """Masked autoencoder over windows at continuous positions.

    Args:
        encoder: Registered name of the subpixel ViT to pretrain, one that pools the mean of its tokens.
        decoder_dim: Width of the decoder.
        decoder_depth: Its blocks.
        decoder_num_heads: Its attention heads.
        mask_ratio: Share of the tokens that is dropped, in (0, 1).
        in_chans: Image channels.
        **kwargs: Of the encoder. By default it places its tokens uniformly at random, as many as a patch grid has.

    Raises:
        ValueError: `mask_ratio` leaves no token to see or none to reconstruct; the encoder pools no mean, or its tokens
            have sizes.
    """

    def __init__(
            self,
            encoder: str,
            decoder_dim: int = 512,
            decoder_depth: int = 8,
            decoder_num_heads: int = 16,
            mask_ratio: float = 0.75,
            in_chans: int = 3,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            **kwargs: Any,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if not 0. < mask_ratio < 1.:
            raise ValueError(f'mask_ratio={mask_ratio} must lie between 0 and 1.')
        kwargs.setdefault('sampler', 'uniform')
        self.encoder = timm.create_model(encoder, num_classes=0, in_chans=in_chans, **dd, **kwargs)
        if self.encoder.global_pool != 'avg':
            raise ValueError(
                f"encoder={encoder!r} pools {self.encoder.global_pool!r}: only the image tokens are trained here, "
                'use a model that pools their mean.')
        self._check_sizes()
        self.mask_ratio = mask_ratio
        embed = self.encoder.patch_embed
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, decoder_dim, **dd)
        self.decoder_pos_proj = nn.Linear(embed.pos_nodes ** 2, decoder_dim, bias=False, **dd)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim, **dd))
        norm_layer = partial(LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.Sequential(*[
            Block(decoder_dim, decoder_num_heads, qkv_bias=True, norm_layer=norm_layer, **dd)
            for _ in range(decoder_depth)])
        self.decoder_norm = norm_layer(decoder_dim, **dd)
        self.decoder_pred = nn.Linear(decoder_dim, in_chans * embed.window ** 2, **dd)
        nn.init.normal_(self.mask_token, std=.02)
        nn.init.trunc_normal_(self.decoder_pos_proj.weight, std=.02)

    def no_weight_decay(self) -> Set[str]:
        """Parameters that should not use weight decay."""
        return {'mask_token', *(f'encoder.{name}' for name in self.encoder.no_weight_decay())}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's blocks in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)

    def encoder_state_dict(self) -> Dict[str, torch.Tensor]:
        """Weights for the model that `encoder` names, built with `num_classes=0` (else with a fresh head)."""
        return self.encoder.state_dict()

    def forward(self, x: torch.Tensor, positions: Optional[torch.Tensor] = None) -> Reconstruction:
        """Drop windows of images (B, C, H, W) and reconstruct them.

        Which tokens are dropped is drawn for each image in train mode; in eval mode it is one draw for all images.

        Args:
            x: Images.
            positions: Placement (B, N, 2) of all windows instead of the sampler's.

        Raises:
            ValueError: A budget so small that all tokens, or none, would be dropped; positions with sizes.
        """
        if positions is None:
            self._check_sizes()
            positions = self.encoder.place(x)
        elif positions.shape[-1] != 2:
            raise ValueError(f'positions of shape {tuple(positions.shape)} must be (y, x) alone: {_SINGLE_PIXELS}')
        positions = positions.expand(x.shape[0], -1, -1)
        B, N, _ = positions.shape
        n_kept = int(N * (1. - self.mask_ratio))
        if not 0 < n_kept < N:
            raise ValueError(f'mask_ratio={self.mask_ratio} keeps {n_kept} of {N} tokens: use a larger budget.')
        order = self._order(B, N).to(x.device)
        positions = positions.gather(1, order[..., None].expand(-1, -1, 2))
        kept, dropped = positions[:, :n_kept], positions[:, n_kept:]

        tokens = self.encoder.forward_features(x, kept)[:, self.encoder.num_prefix_tokens:]
        predicted = self._decode(self.encoder.fc_norm(tokens), positions, x)
        target = self._target(x, dropped)
        loss = (predicted.float() - target).square().mean()
        return Reconstruction(loss, predicted, target, kept, dropped)

    def _check_sizes(self) -> None:
        placer = self.encoder.placer
        for prior in (placer.train_prior, placer.eval_prior):
            if prior.has_sizes:
                raise ValueError(
                    f'sampler={prior.sampler!r} at coverage={prior.coverage} asks for sizes: {_SINGLE_PIXELS}')

    def _order(self, batch_size: int, n_tokens: int) -> torch.Tensor:
        if self.training:
            return torch.rand(batch_size, n_tokens).argsort(dim=1)
        generator = torch.Generator().manual_seed(self.encoder.placer.eval_prior.seed)
        return torch.randperm(n_tokens, generator=generator).expand(batch_size, -1)

    def _decode(self, tokens: torch.Tensor, positions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        x = self.decoder_embed(tokens)
        n_dropped = positions.shape[1] - x.shape[1]
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(x.shape[0], n_dropped, -1)], dim=1)
        feature = self.encoder.patch_embed.position_feature(positions, images.shape[-2], images.shape[-1])
        x = x + self.decoder_pos_proj(feature.to(self.mask_token.dtype))
        x = self.decoder_norm(self.decoder_blocks(x))
        return self.decoder_pred(x[:, -n_dropped:])

    @torch.no_grad()
    def _target(self, images: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        embed = self.encoder.patch_embed
        windows = read_windows(images, positions, embed.window, embed.convention).flatten(2).float()
        mean, var = windows.mean(dim=-1, keepdim=True), windows.var(dim=-1, keepdim=True)
        return (windows - mean) / (var + 1e-6).sqrt()


default_cfgs = generate_default_cfgs({
    'spot_mae_vit_base_patch16': SpotPretrainedCfg(first_conv='encoder.patch_embed.proj', num_classes=0),
    'spot_mae_vit_large_patch16': SpotPretrainedCfg(first_conv='encoder.patch_embed.proj', num_classes=0),
    'spot_mae_vit_pico_patch8_64': SpotPretrainedCfg(
        first_conv='encoder.patch_embed.proj', num_classes=0, input_size=(3, 64, 64), crop_pct=1.0,
        mean=(0.1, 0.1, 0.1), std=(0.25, 0.25, 0.25)),
})


def _create_spot_mae(variant: str, pretrained: bool = False, **kwargs: Any) -> SubpixelMAE:
    cfg = resolve_pretrained_cfg(
        variant, kwargs.pop('pretrained_cfg', None), prefer_file(kwargs.pop('pretrained_cfg_overlay', None)))
    return build_checked(
        SubpixelMAE,
        variant,
        pretrained,
        pretrained_cfg=cfg,
        kwargs_filter=('num_classes', 'global_pool'),
        **kwargs,
    )


@register_model
def spot_mae_vit_base_patch16(pretrained: bool = False, **kwargs: Any) -> SubpixelMAE:
    """SPoT-MAE ViT-Base with the decoder of MAE: 8 blocks of width 512."""
    model_args = dict(encoder='spot_vit_base_patch16_mae', decoder_dim=512, decoder_depth=8, decoder_num_heads=16)
    return _create_spot_mae('spot_mae_vit_base_patch16', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_mae_vit_large_patch16(pretrained: bool = False, **kwargs: Any) -> SubpixelMAE:
    """SPoT-MAE ViT-Large with the decoder of MAE: 8 blocks of width 512."""
    model_args = dict(encoder='spot_vit_large_patch16_mae', decoder_dim=512, decoder_depth=8, decoder_num_heads=16)
    return _create_spot_mae('spot_mae_vit_large_patch16', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_mae_vit_pico_patch8_64(pretrained: bool = False, **kwargs: Any) -> SubpixelMAE:
    """SPoT-MAE ViT-Pico for 64 px images, decoder of 2 blocks of width 64."""
    model_args = dict(encoder='spot_vit_pico_patch8_64', decoder_dim=64, decoder_depth=2, decoder_num_heads=4)
    return _create_spot_mae('spot_mae_vit_pico_patch8_64', pretrained=pretrained, **dict(model_args, **kwargs))
