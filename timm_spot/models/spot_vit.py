"""Subpixel Vision Transformer: a timm ViT whose tokens sit at continuous positions.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

The class. Where tokens lie is decided in `placement.py`, windows become tokens in `subpixel_embed.py`; registered names
and their weights are in `spot_zoo.py`, settings in `spot_config.py`, the conversion of checkpoints in
`spot_checkpoint.py`.
"""
from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.models import VisionTransformer, checkpoint, checkpoint_seq

from ..ops.normalization import Normalization
from ..ops.samplers import lattice_shape
from ..ops.windows import check_sized
from ._features import Intermediates, format_intermediates, tokens_to_map
from ._timm import feature_take_indices, update_model_args
from .placement import SAMPLED, Placer, get_placer
from .placing import place_drawn, place_images
from .prior import Prior
from .spot_config import BOTH_MODES, PLACEMENT_FIELDS, make_priors, merge_settings
from .subpixel_embed import SubpixelEmbed

__all__ = ['SubpixelVisionTransformer']


class SubpixelVisionTransformer(VisionTransformer):
    """Vision Transformer over windows at continuous positions.

    Everything behind the tokens is timm's VisionTransformer. The position enters with each token, so there is no
    position table and the class token has no position.

    Args:
        img_size: Nominal image size; images of any size and aspect are accepted.
        patch_size: Side of a window in pixels.
        convention: Geometry of windows and position feature, 'patch' or 'spot' (see `timm_spot.sample_windows`).
        pos_nodes: Nodes per axis of the position feature.
        placer: Who places the tokens: 'sampled' (a registered sampler), or a network under the name that
            `timm_spot.register_placer` gave it.
        **kwargs: Of timm's VisionTransformer, and the settings of the placement:
            n_tokens: Budget; by default the count of whole patches in each image, as a ViT would have. (low, high)
                draws one for each training batch, the same in all processes; small budgets are as common as large ones.
            sampler: Spatial prior, 'isotropic' by default, see `timm_spot.list_samplers`.
            seed: Of the placement given to every image in eval mode, and of the random budgets.
            saliency: 'spectral_residual', 'energy', a function from images to maps, or a map (H, W) or (B, H, W), for
                samplers that need one.
            eval_n_tokens: Budget in eval mode where it differs from training; by default the largest.
            eval_sampler: Prior in eval mode where it differs from training.
            coverage: How much of its cell a window covers, from 0 (the default: one pixel a sample) to 1 (windows tile
                the picture), see `timm_spot.ops.sizes`; (low, high) draws one for each training batch.
            eval_coverage: Coverage in eval mode where it differs from training; by default the largest.
            n_coarse: Coarse tokens of sampler 'coarse+NAME'.
            size_embed: Whether tokens are told their size, by columns that start at 0; by default where a `coverage`
                is given, or placements have sizes by another setting ('coarse+NAME', `eval_coverage`).

    `timm.create_model` also takes `train_only`: 'position' freezes all but the weights of position and size, 'head' all
    but the classifier, 'placer' all but the network that places the tokens.

    Attributes:
        placer: The `Placer`.

    Raises:
        ValueError: An unknown sampler, placer or convention, a sampler without the saliency it needs, a budget below 1
            or a range out of order, a `pos_embed` table.
    """

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            patch_size: int | tuple[int, int] = 16,
            *,
            convention: str = 'patch',
            pos_nodes: int | None = None,
            placer: str | None = None,
            **kwargs: Any,
    ) -> None:
        if kwargs.pop('pos_embed', 'none') not in ('', 'none'):
            raise ValueError("pos_embed must be 'none': a table has no rows for continuous positions.")
        # Any image size is dynamic here; timm's flag would only ask the embedding for a map instead of tokens.
        kwargs.pop('dynamic_img_size', None)
        settings = {name: kwargs.pop(name) for name in PLACEMENT_FIELDS if name in kwargs}
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            pos_embed='none',
            embed_layer=partial(SubpixelEmbed, convention=convention, pos_nodes=pos_nodes),
            **kwargs,
        )
        self.init_placer(placer, settings, kwargs.get('device'))

    def init_placer(self, placer: str | None, settings: dict[str, Any], device: Any = None) -> None:
        """What the constructor adds to a ViT over windows; on its own, on one that is built already."""
        settings = {name: value for name, value in settings.items() if value is not None}
        size_embed = settings.pop('size_embed', None)
        self._settings = settings
        priors = self._priors(settings)
        if size_embed is None:
            size_embed = any(prior.has_sizes for prior in priors) or (
                'coverage' in settings and self.patch_embed.convention == 'patch')
        if size_embed:
            self.patch_embed.add_size_embed()
        with torch.device(device) if device is not None else nullcontext():
            self.placer: Placer = get_placer(SAMPLED if placer is None else placer)(*priors)
        self._state_reductions()

    def _priors(self, settings: dict[str, Any]) -> tuple[Prior, Prior]:
        priors = make_priors(self.patch_embed.window, **settings)
        for prior in priors:
            if prior.has_sizes:
                check_sized(
                    self.patch_embed.convention,
                    f'sampler={prior.sampler!r} at coverage={prior.coverage} asks for sizes')
        return priors

    @property
    def n_tokens(self) -> int:
        """Budget in eval mode: tokens of an image of the nominal size (prefix tokens do not count)."""
        return self.placer.eval_prior.budgets(self.patch_embed.img_size)[1]

    @property
    def normalization(self) -> Normalization | None:
        """What uint8 images are normalised with."""
        return self.patch_embed.normalization

    def place(self, images: torch.Tensor) -> torch.Tensor:
        """Placement that the model's own placer gives images (B, C, H, W).

        (B, N, 2) of positions (y, x); with sizes (B, N, 4), the spacings (y, x) of windows in pixels behind them.

        In train mode stochastic samplers draw anew for each image and call, and random budgets for each call.
        """
        return self._place(images).clone()

    def set_placement(self, **changes: Any) -> None:
        """Change the budget, the prior, its seed or its map: what is given changes, None restores the default.

        A saved model keeps the change.

        Args:
            **changes: Any of `n_tokens`, `sampler` and `coverage`, which set both modes; the same with `eval_` in
                front, for eval mode alone; `seed`, `saliency`, `n_coarse`.

        Raises:
            TypeError, ValueError: Another keyword, or as the constructor; the model is then as it was.

        Example:
            >>> import timm, timm_spot
            >>> model = timm.create_model('spot_vit_pico_patch8_64', n_tokens=25)
            >>> model.set_placement(n_tokens=9, sampler='center')
            >>> model.n_tokens
            9
            >>> model.set_placement(n_tokens=None)  # as many as there are patches
            >>> model.n_tokens
            64
        """
        settings = merge_settings(self._settings, changes)
        priors = self._priors(settings)
        self.placer.set_priors(*priors)
        self._settings = {name: value for name, value in settings.items() if value is not None}
        record = dict(changes)
        for name in BOTH_MODES:
            if name in changes:
                record[f'eval_{name}'] = changes.get(f'eval_{name}')  # what was set before no longer holds
        told = self.patch_embed.size_proj is not None
        if told or any(prior.has_sizes for prior in priors):
            record['size_embed'] = told  # not what the new settings would ask for: weights are as they were built
        update_model_args(self, **record)
        self._state_reductions()

    def set_input_size(
            self,
            img_size: tuple[int, int] | None = None,
            patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change the nominal image size, or the window by resampling the projection."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        self.placer.set_priors(*self._priors(self._settings))
        self._state_reductions()

    def _state_reductions(self) -> None:
        """Say in `feature_info` how many pixels apart the tokens of a feature map lie, at the nominal image size."""
        placer, size = self.placer.replaced(), self.patch_embed.img_size
        placer.training = False
        lattice = placer.lattice(size)
        if lattice is not None:
            pixels = size[0] / lattice[0]
            self.feature_info = [
                dict(info, reduction=int(pixels) if pixels.is_integer() else pixels) for info in self.feature_info]

    def _place(self, images: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """The given placement, or the placer's."""
        if isinstance(images, torch.fx.Proxy):  # whether one is given shows when the traced graph runs
            return given_or(positions, self.placer(images))
        if positions is not None:
            return positions
        prior = self.placer.train_prior
        place = place_drawn if self.training and (prior.draws_budget or prior.draws_coverage) else place_images
        return place(self.placer, self.patch_embed, images)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        prefix = []
        if self.cls_token is not None:
            prefix.append(self.cls_token.expand(x.shape[0], -1, -1))
        if self.reg_token is not None:
            prefix.append(self.reg_token.expand(x.shape[0], -1, -1))
        return self.pos_drop(torch.cat(prefix + [x], dim=1))

    def _embed(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        x = self.patch_embed(x, self._place(x, positions))
        x = self._pos_embed(x)
        x = self.patch_drop(x)
        return self.norm_pre(x)

    def forward_features(
            self,
            x: torch.Tensor,
            positions: torch.Tensor | None = None,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Images (B, C, H, W) to all tokens after the last block, (B, prefix + N, D).

        Args:
            x: Images, normalised, or uint8, which are normalised with the mean and std of the `pretrained_cfg`.
            positions: Placement instead of the placer's: (B, N, 2) of (y, x); (B, N, 3) or (B, N, 4) with the spacing
                of windows in pixels, one or along (y, x); or the same without B.
            attn_mask, is_causal: As in timm.
        """
        x = self._embed(x, positions)
        if attn_mask is not None or is_causal:
            for blk in self.blocks:
                x = blk(x, attn_mask=attn_mask, is_causal=is_causal)
        elif self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward(
            self,
            x: torch.Tensor,
            positions: torch.Tensor | None = None,
            attn_mask: torch.Tensor | None = None,
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
            indices: int | list[int] | None = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
            positions: torch.Tensor | None = None,
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
            attn_mask, is_causal: As in timm.
            positions: Placement instead of the placer's, see `forward_features`.

        Raises:
            ValueError: Maps are asked for and the placement is no lattice.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NLC'.")
        to_map = partial(tokens_to_map, size=self._map_size(x, positions)) if output_fmt == 'NCHW' else None
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

    def lattice(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the lattice on which the tokens of images of (H, W) pixels lie.

        Raises:
            ValueError: They lie on none.
        """
        placer = self.placer
        if self.training and placer.train_prior.draws_budget:
            raise ValueError(
                f"n_tokens={placer.train_prior.n_tokens} draws a budget for each training batch, no feature map is "
                "known before: use output_fmt='NLC'.")
        shape = placer.lattice(image_size)
        if shape is None:
            raise ValueError(
                f"{placer.source} places {placer.budget(image_size)} tokens on no lattice of an image of "
                f"{image_size[0]} x {image_size[1]} px, so they form no feature map: use output_fmt='NLC'.")
        return shape

    def _map_size(self, images: torch.Tensor, positions: torch.Tensor | None) -> tuple[int, int]:
        """Rows and columns of the feature map that the placement forms."""
        if positions is None:
            return self.lattice((images.shape[-2], images.shape[-1]))
        shape = lattice_shape((positions if positions.ndim == 3 else positions[None])[..., :2])
        if shape is None:
            raise ValueError(
                f"positions of shape {tuple(positions.shape)} form no lattice, so their tokens form no feature map: "
                "use output_fmt='NLC'.")
        return shape


def given_or(positions: torch.Tensor | None, placed: torch.Tensor) -> torch.Tensor:
    return placed if positions is None else positions


torch.fx.wrap('given_or')  # a leaf of an FX graph, where it is not known what is given
