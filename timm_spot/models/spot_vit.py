"""Subpixel Vision Transformer: a timm ViT whose tokens sit at continuous positions.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

The class, its registered names and their weights. Windows, samplers and the position feature are in `timm_spot.ops`,
the embedding in `subpixel_embed.py`, the conversion of checkpoints in `checkpoint.py`.
"""
# No postponed annotations in this file: scripting an FX graph of the model reads those of `forward` as types.
import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    checkpoint,
    checkpoint_seq,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from timm.models._pretrained import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..ops.samplers import lattice_shape
from ._features import Intermediates, format_intermediates
from .loading import build_checked
from .spot_checkpoint import checkpoint_filter_fn
from .subpixel_embed import Saliency, SubpixelEmbed

__all__ = ['SpotPretrainedCfg', 'SubpixelVisionTransformer']

PROJECT_PAGE = 'https://dsb-ifi.github.io/SPoT/'


class SubpixelVisionTransformer(VisionTransformer):
    """Vision Transformer over windows at continuous positions.

    Everything behind the tokens is timm's VisionTransformer. The position enters with each token, so there is no
    position table and the class token has no position.

    Args:
        img_size: Nominal image size; images of any size and aspect are accepted.
        patch_size: Side of a window in pixels.
        n_tokens: Budget; by default the count of whole patches in each image, as a ViT would have. (low, high) draws
            one for each training batch, the same in all processes; small budgets are as common as large ones.
        sampler: Spatial prior that places the tokens, see `timm_spot.list_samplers`.
        convention: Geometry of windows and position feature, 'patch' or 'spot' (see `timm_spot.sample_windows`).
        seed: Seed of the placement given to every image in eval mode, and of the random budgets.
        saliency: 'spectral_residual', a function from images to maps, or a map (H, W) or (B, H, W), for samplers
            that need one.
        pos_nodes: Nodes per axis of the position feature.
        eval_n_tokens: Budget in eval mode where it differs from training; by default the largest.
        eval_sampler: Prior in eval mode where it differs from training.
        **kwargs: Of timm's VisionTransformer.

    `timm.create_model` also takes `train_only`: 'position' freezes all but the position weights, 'head' all but the
    classifier.

    Raises:
        ValueError: An unknown sampler or convention, a sampler without the saliency it needs, a budget below 1 or a
            range out of order, a `pos_embed` table.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            patch_size: Union[int, Tuple[int, int]] = 16,
            *,
            n_tokens: Optional[Union[int, Sequence[int]]] = None,
            sampler: str = 'isotropic',
            convention: str = 'patch',
            seed: int = 0,
            saliency: Optional[Saliency] = None,
            pos_nodes: Optional[int] = None,
            eval_n_tokens: Optional[int] = None,
            eval_sampler: Optional[str] = None,
            **kwargs: Any,
    ) -> None:
        if kwargs.pop('pos_embed', 'none') not in ('', 'none'):
            raise ValueError("pos_embed must be 'none': a table has no rows for continuous positions.")
        # Any image size is dynamic here; timm's flag would only ask the embedding for a map instead of tokens.
        kwargs.pop('dynamic_img_size', None)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            pos_embed='none',
            embed_layer=partial(
                SubpixelEmbed,
                n_tokens=n_tokens,
                sampler=sampler,
                convention=convention,
                seed=seed,
                saliency=saliency,
                pos_nodes=pos_nodes,
                eval_n_tokens=eval_n_tokens,
                eval_sampler=eval_sampler,
            ),
            **kwargs,
        )

    __jit_unused_properties__ = ['n_tokens']

    @property
    def n_tokens(self) -> int:
        """Budget in eval mode: tokens of an image of the nominal size (prefix tokens do not count)."""
        return self.patch_embed.num_patches

    @torch.jit.ignore
    def place(self, images: torch.Tensor) -> torch.Tensor:
        """Placement (B, N, 2) of (y, x) that the model's own sampler uses for images (B, C, H, W).

        In train mode stochastic samplers draw anew for each image and call.
        """
        return self.patch_embed.place(images).clone()

    @torch.jit.ignore
    def set_placement(
            self,
            n_tokens: Optional[Union[int, Sequence[int]]] = None,
            sampler: Optional[str] = None,
            seed: Optional[int] = None,
            saliency: Optional[Saliency] = None,
            eval_n_tokens: Optional[int] = None,
            eval_sampler: Optional[str] = None,
    ) -> None:
        """Change the budget, the prior, its seed or its map; what is None stays.

        `n_tokens` and `sampler` set both modes, `eval_n_tokens` and `eval_sampler` eval mode alone. A saved model keeps
        the change.
        """
        changes = dict(
            n_tokens=n_tokens, sampler=sampler, seed=seed, saliency=saliency, eval_n_tokens=eval_n_tokens,
            eval_sampler=eval_sampler)
        self.patch_embed.set_placement(**changes)
        record = {k: v for k, v in changes.items() if v is not None}
        if n_tokens is not None:
            record['eval_n_tokens'] = eval_n_tokens  # what was set before no longer holds
        if sampler is not None:
            record['eval_sampler'] = eval_sampler
        update_model_args(self, **record)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        prefix = []
        if self.cls_token is not None:
            prefix.append(self.cls_token.expand(x.shape[0], -1, -1))
        if self.reg_token is not None:
            prefix.append(self.reg_token.expand(x.shape[0], -1, -1))
        return self.pos_drop(torch.cat(prefix + [x], dim=1))

    def _embed(self, x: torch.Tensor, positions: Optional[torch.Tensor] = None) -> torch.Tensor:
        x = self.patch_embed(x, positions)
        x = self._pos_embed(x)
        x = self.patch_drop(x)
        return self.norm_pre(x)

    def forward_features(
            self,
            x: torch.Tensor,
            positions: Optional[torch.Tensor] = None,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Images (B, C, H, W) to all tokens after the last block, (B, prefix + N, D).

        Args:
            x: Images, normalised, or uint8, which are normalised with the mean and std of the `pretrained_cfg`.
            positions: Placement (B, N, 2) or (N, 2) instead of the sampler's.
            attn_mask: Attention mask, as in timm.
            is_causal: Causal attention, as in timm.
        """
        x = self._embed(x, positions)
        if attn_mask is not None or is_causal:
            for blk in self.blocks:
                x = blk(x, attn_mask=attn_mask, is_causal=is_causal)
        elif self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward(
            self,
            x: torch.Tensor,
            positions: Optional[torch.Tensor] = None,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Images (B, C, H, W) to logits (B, num_classes), see `forward_features`; NaN in train mode is an error."""
        x = self.forward_features(x, positions, attn_mask=attn_mask, is_causal=is_causal)
        x = self.forward_head(x)
        if self.training:
            # timm's script would train on to the end; this works compiled and does not wait for a GPU.
            torch._assert_async(~x.isnan().any(), 'NaN in the logits: the images hold NaN, or training diverged.')
        return x

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
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
            positions: Optional[torch.Tensor] = None,
    ) -> Intermediates:
        """Features after chosen blocks, with timm's arguments and results.

        'NLC' gives tokens (B, N, D). 'NCHW' gives maps (B, D, rows, columns) of the lattice on which the tokens lie.

        Args:
            x: Images (B, C, H, W).
            indices: Take last n blocks if int, all if None, select matching indices if sequence.
            return_prefix_tokens: Return both prefix and image tokens.
            norm: Apply the final norm to all intermediates.
            stop_early: Stop after the last chosen block.
            output_fmt: 'NCHW' or 'NLC'.
            intermediates_only: Only return intermediate features.
            output_dict: Return a dictionary with 'image_features' and 'image_intermediates'.
            attn_mask: Attention mask, as in timm.
            is_causal: Causal attention, as in timm.
            positions: Placement (B, N, 2) or (N, 2) instead of the sampler's.

        Raises:
            ValueError: Maps are asked for and the placement is no lattice.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NLC'.")
        to_map = partial(_to_map, size=self._map_size(x, positions)) if output_fmt == 'NCHW' else None
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)

        x = self._embed(x, positions)
        taken = []
        for i, blk in enumerate(self.blocks[:max_index + 1] if stop_early else self.blocks):
            if attn_mask is not None or is_causal:
                x = blk(x, attn_mask=attn_mask, is_causal=is_causal)
            elif self.grad_checkpointing:
                x = checkpoint(blk, x)
            else:
                x = blk(x)
            if i in take_indices:
                taken.append(self.norm(x) if norm else x)

        last = None if intermediates_only else self.norm(x)
        return format_intermediates(taken, last, self.num_prefix_tokens, return_prefix_tokens, output_dict, to_map)

    def _map_size(self, images: torch.Tensor, positions: Optional[torch.Tensor]) -> Tuple[int, int]:
        """Rows and columns of the feature map that the placement forms."""
        if positions is None:
            return self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        shape = lattice_shape(positions if positions.ndim == 3 else positions[None])
        if shape is None:
            raise ValueError(
                f"positions of shape {tuple(positions.shape)} form no lattice, so their tokens form no feature map: "
                "use output_fmt='NLC'.")
        return shape


def _to_map(tokens: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Tokens (B, N, D) of a lattice of `size` rows and columns to a map (B, D, rows, columns)."""
    return tokens.transpose(1, 2).unflatten(2, size).contiguous()


@dataclasses.dataclass
class SpotPretrainedCfg(PretrainedCfg):
    """timm's PretrainedCfg with the placement that the weights are meant for; None leaves it to the model."""

    n_tokens: Optional[Union[int, Sequence[int]]] = None
    sampler: Optional[str] = None
    convention: Optional[str] = None
    seed: Optional[int] = None
    saliency: Optional[Saliency] = None
    pos_nodes: Optional[int] = None
    eval_n_tokens: Optional[int] = None
    eval_sampler: Optional[str] = None


_TIMM_FIELDS = tuple(f.name for f in dataclasses.fields(PretrainedCfg))
_PLACEMENT_FIELDS = tuple(f.name for f in dataclasses.fields(SpotPretrainedCfg) if f.name not in _TIMM_FIELDS)


def _from_timm(source: str, **changes: Any) -> SpotPretrainedCfg:
    """Config of the timm ViT whose weights are taken, safetensors from its Hub repository."""
    cfg = get_pretrained_cfg(source)
    fields = {name: getattr(cfg, name) for name in _TIMM_FIELDS}
    fields.update(url=None, custom_load=False, fixed_input_size=False, architecture=None, tag=None)
    return SpotPretrainedCfg(**{**fields, **changes})


def _from_authors() -> SpotPretrainedCfg:
    """Config of a released SPoT checkpoint; its file is not hosted anywhere that can be downloaded from here."""
    return SpotPretrainedCfg(
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        interpolation='bicubic',
        crop_pct=0.875,
        crop_mode='squash',
        first_conv='patch_embed.proj',
        classifier='head',
        origin_url=PROJECT_PAGE,
        paper_ids='arXiv:2507.01654',
        convention='spot',
    )


def _from_package(file: str, **fields: Any) -> SpotPretrainedCfg:
    """Config of weights that the package itself holds."""
    path = Path(__file__).parent.parent / 'weights' / file
    return SpotPretrainedCfg(file=str(path), first_conv='patch_embed.proj', classifier='head', **fields)


default_cfgs = generate_default_cfgs({
    'spot_vit_base_patch16_mae.mae': _from_timm('vit_base_patch16_224.mae', num_classes=1000),
    'spot_vit_base_patch16_mae.spot_in1k': _from_authors(),
    'spot_vit_base_patch16_in21k.augreg2_in21k_ft_in1k': _from_timm('vit_base_patch16_224.augreg2_in21k_ft_in1k'),
    'spot_vit_base_patch16_in21k.spot_in21k_ft_in1k': _from_authors(),
    'spot_vit_base_patch16_in1k.augreg_in1k': _from_timm('vit_base_patch16_224.augreg_in1k'),
    'spot_vit_base_patch16_in1k.spot_in1k': _from_authors(),
    'spot_vit_tiny_patch16_in21k.augreg_in21k_ft_in1k': _from_timm('vit_tiny_patch16_224.augreg_in21k_ft_in1k'),
    'spot_vit_small_patch16_in21k.augreg_in21k_ft_in1k': _from_timm('vit_small_patch16_224.augreg_in21k_ft_in1k'),
    'spot_vit_large_patch16_in21k.augreg_in21k_ft_in1k': _from_timm('vit_large_patch16_224.augreg_in21k_ft_in1k'),
    'spot_vit_base_patch32_in21k.augreg_in21k_ft_in1k': _from_timm('vit_base_patch32_224.augreg_in21k_ft_in1k'),
    'spot_vit_large_patch16_mae.mae': _from_timm('vit_large_patch16_224.mae', num_classes=1000),
    'spot_vit_pico_patch8_64.digits': _from_package(
        'spot_vit_pico_patch8_64.digits.safetensors',
        input_size=(3, 64, 64),
        crop_pct=1.0,
        crop_mode='squash',
        mean=(0.1, 0.1, 0.1),  # a canvas is mostly empty
        std=(0.25, 0.25, 0.25),
        num_classes=10,
        label_names=tuple('0123456789'),
        license='apache-2.0',
        description='Trained on scanned handwritten digits (UCI, scikit-learn) on 64 x 64 canvases.',
    ),
})


def _resolve_cfg(
        variant: str,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]],
        overlay: Optional[Dict[str, Any]],
) -> SpotPretrainedCfg:
    """`timm.models.resolve_pretrained_cfg` that knows the placement fields."""
    if isinstance(pretrained_cfg, dict):
        pretrained_cfg = SpotPretrainedCfg(**pretrained_cfg)
    elif isinstance(pretrained_cfg, PretrainedCfg) and not isinstance(pretrained_cfg, SpotPretrainedCfg):
        pretrained_cfg = SpotPretrainedCfg(**vars(pretrained_cfg))
    return resolve_pretrained_cfg(variant, pretrained_cfg, overlay)


def _create_spot_vit(
        variant: str,
        pretrained: bool = False,
        model_cls: Callable[..., SubpixelVisionTransformer] = SubpixelVisionTransformer,
        filter_fn: Callable[..., Dict[str, torch.Tensor]] = checkpoint_filter_fn,
        **kwargs: Any,
) -> SubpixelVisionTransformer:
    overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
    train_only = kwargs.pop('train_only', None)
    cfg = _resolve_cfg(variant, kwargs.pop('pretrained_cfg', None), overlay)
    if pretrained:
        org = os.environ.get('TIMM_SPOT_HUB_ORG')
        if org and cfg.tag and cfg.convention == 'spot' and not (cfg.has_weights or cfg.state_dict):
            cfg = dataclasses.replace(cfg, hf_hub_id=f'{org}/{variant}.{cfg.tag}')
        if not (cfg.has_weights or cfg.state_dict):
            raise RuntimeError(_no_weights_message(variant, cfg))

    # Lowest to highest: the config, the model arguments saved beside it, the overlay, keywords.
    saved = kwargs.get('pretrained_model_args') or {}
    given = {name: kwargs.pop(name) for name in _PLACEMENT_FIELDS if name in kwargs}
    from_saved = {name: value for name, value in given.items() if name in saved and value is saved[name]}
    keywords = {name: value for name, value in given.items() if name not in from_saved}
    placement: Dict[str, Any] = {}
    for source in (vars(cfg), from_saved, overlay, keywords):
        values = {name: source[name] for name in _PLACEMENT_FIELDS if source.get(name) is not None}
        for name in ('n_tokens', 'sampler'):
            if name in values:
                placement.pop(f'eval_{name}', None)  # one of lower priority
        placement.update(values)
    kwargs.update(placement)

    out_indices = kwargs.pop('out_indices', 3)
    model = build_checked(
        model_cls,
        variant,
        pretrained,
        # timm's loaders of saved configs know no fields but their own: the placement is saved as model arguments.
        pretrained_cfg=PretrainedCfg(**{name: getattr(cfg, name) for name in _TIMM_FIELDS}),
        pretrained_filter_fn=filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )
    update_model_args(model, **placement)
    inner = getattr(model, 'model', model)  # features_only=True wraps it
    inner.patch_embed.set_normalization(cfg.mean, cfg.std)
    if train_only is not None:
        _freeze(model, train_only)
    return model


_TRAIN_ONLY = {'position': 'patch_embed.pos_proj.', 'head': 'head.'}


def _freeze(model: nn.Module, train_only: str) -> None:
    """Freeze all parameters but the position columns (the paper's first stage) or the head."""
    if train_only not in _TRAIN_ONLY:
        raise ValueError(f"train_only={train_only!r} must be {' or '.join(map(repr, _TRAIN_ONLY))}.")
    trained = [p for name, p in model.named_parameters() if name.startswith(_TRAIN_ONLY[train_only])]
    if not trained:
        raise ValueError(f'train_only={train_only!r} leaves nothing to train: this model has no {train_only}.')
    model.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)


def _no_weights_message(variant: str, cfg: SpotPretrainedCfg) -> str:
    name = f'{variant}.{cfg.tag}' if cfg.tag else variant
    if cfg.convention == 'spot':
        return (
            f'the weights of {name} are hosted by their authors only. Download the file from the links at '
            f'{PROJECT_PAGE} and load it as it is: timm.create_model({name!r}, pretrained=True, '
            "pretrained_cfg_overlay=dict(file=PATH)). Or convert it once ('timm-spot convert'), push it to "
            f"ORG/{name} on the Hugging Face Hub ('timm-spot push') and set TIMM_SPOT_HUB_ORG=ORG.")
    return f'{name} has no pretrained weights: use pretrained=False, or pretrained_cfg_overlay=dict(file=PATH).'


@register_model
def spot_vit_base_patch16_mae(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Base (SPoT-B/16), mean of the image tokens; starts from a masked autoencoder."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, init_values=1.0, global_pool='avg')
    return _create_spot_vit('spot_vit_base_patch16_mae', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_base_patch16_in21k(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Base (SPoT-B/16), class token; starts from ImageNet-21k fine-tuned on ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, init_values=1.0)
    return _create_spot_vit('spot_vit_base_patch16_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_base_patch16_in1k(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Base (SPoT-B/16), class token; starts from ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, init_values=1.0)
    return _create_spot_vit('spot_vit_base_patch16_in1k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_tiny_patch16_in21k(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Tiny (SPoT-Ti/16), class token; starts from ImageNet-21k fine-tuned on ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3, init_values=1.0)
    return _create_spot_vit('spot_vit_tiny_patch16_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_small_patch16_in21k(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Small (SPoT-S/16), class token; starts from ImageNet-21k fine-tuned on ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6, init_values=1.0)
    return _create_spot_vit('spot_vit_small_patch16_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_large_patch16_in21k(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Large (SPoT-L/16), class token; starts from ImageNet-21k fine-tuned on ImageNet-1k."""
    model_args = dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16, init_values=1.0)
    return _create_spot_vit('spot_vit_large_patch16_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_base_patch32_in21k(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Base with windows of 32 px (SPoT-B/32), class token; starts from ImageNet-21k fine-tuned on 1k."""
    model_args = dict(patch_size=32, embed_dim=768, depth=12, num_heads=12, init_values=1.0)
    return _create_spot_vit('spot_vit_base_patch32_in21k', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_large_patch16_mae(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Large (SPoT-L/16), mean of the image tokens; starts from a masked autoencoder."""
    model_args = dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16, init_values=1.0, global_pool='avg')
    return _create_spot_vit('spot_vit_large_patch16_mae', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def spot_vit_pico_patch8_64(pretrained: bool = False, **kwargs: Any) -> SubpixelVisionTransformer:
    """SPoT ViT-Pico with windows of 8 px on 64 px images, mean of the image tokens; its digit weights are inside."""
    model_args = dict(
        img_size=64, patch_size=8, embed_dim=128, depth=5, num_heads=4, init_values=1.0, global_pool='avg')
    return _create_spot_vit('spot_vit_pico_patch8_64', pretrained=pretrained, **dict(model_args, **kwargs))
