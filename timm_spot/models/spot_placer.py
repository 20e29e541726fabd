"""A placement network for a subpixel ViT that is built already.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654
"""
from __future__ import annotations

from torch import nn

from ._timm import update_model_args
from .placement import get_placer
from .spot_vit import SubpixelVisionTransformer

__all__ = ['add_placer']


def add_placer(model: SubpixelVisionTransformer, name: str = 'density') -> SubpixelVisionTransformer:
    """Give a subpixel ViT another placer, with fresh weights; its budget, coverage and the like stay as they are.

    Args:
        model: Any subpixel ViT, which is changed.
        name: Of a registered placer, see `timm_spot.list_placers`; 'sampled' takes a network off again.

    Returns:
        The model. Saved, it is loaded with its placer.

    Raises:
        TypeError: The model is no subpixel ViT.
        ValueError: An unknown name.

    Example:
        >>> import timm, timm_spot, torch
        >>> model = timm.create_model('spot_vit_pico_patch8_64', pretrained=True, n_tokens=9)
        >>> model = timm_spot.add_placer(model, 'density')
        >>> model.placer.density(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 16, 16])
    """
    if not isinstance(model, SubpixelVisionTransformer):
        raise TypeError(f'model must be a subpixel ViT, got {type(model).__name__}: timm_spot.retrofit makes one.')
    old, weight = model.placer, model.patch_embed.proj.weight
    placer: nn.Module = get_placer(name)(old.train_prior, old.eval_prior).to(weight.device)
    model.placer = placer.train(model.training)
    update_model_args(model, placer=name)
    model.set_placement()  # whether its tokens form feature maps may have changed
    return model
