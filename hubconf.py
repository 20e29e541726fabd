"""Entrypoints of torch.hub: every model of timm_spot, by its name.

    torch.hub.load('OWNER/timm_spot', 'spot_vit_pico_patch8_64', pretrained=True, n_tokens=25)
"""
from __future__ import annotations

import typing as _typing

# torch.hub lists every public callable of this file, so what is no entrypoint has a leading underscore.
import timm as _timm
from torch import nn as _nn

import timm_spot as _  # noqa: F401  registers the models
from timm_spot.tasks.evaluation.families import name_patterns as _name_patterns

dependencies = ['torch', 'timm', 'scipy']


def _entrypoint(name: str) -> _typing.Callable[..., _nn.Module]:
    def create(pretrained: bool = False, **kwargs: _typing.Any) -> _nn.Module:
        return _timm.create_model(name, pretrained=pretrained, **kwargs)

    create.__name__ = name
    create.__doc__ = (
        f'{_timm.model_entrypoint(name).__doc__}\n\n'
        'Takes the keywords of timm.create_model: n_tokens=, sampler=, convention=, seed=, num_classes=, '
        "pretrained_cfg='TAG', ...")
    return create


def dht_ras2vec(pretrained: bool = True, **kwargs: _typing.Any) -> _nn.Module:
    """Raster to vector: `model(images)` gives a list of SVG files, as text, for images normalised as ImageNet's.

    Takes the keywords of timm_spot.vectorize: target=, smoothing=, tolerance=, longest_edge=, stroke=, patch_size=.
    """
    import timm_spot

    return timm_spot.RasterToVector(pretrained=pretrained, **kwargs)


globals().update({name: _entrypoint(name) for name in _timm.list_models(_name_patterns())})
dht_vit_base_16_in1k = _entrypoint('dht_vit_base_patch16_in1k')  # the name in the authors' README
