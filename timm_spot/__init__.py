"""Vision Transformers off the grid: importing this package registers subpixel ViTs with timm.

    import timm, timm_spot
    model = timm.create_model('spot_vit_base_patch16_mae', n_tokens=25, sampler='center')
"""
from typing import Any

from . import models as models
from .models.retrofit import retrofit as retrofit
from .ops import list_samplers as list_samplers
from .ops import register_sampler as register_sampler
from .ops import sample_positions as sample_positions
from .ops import sample_windows as sample_windows

__version__ = '0.1.0'

# Tasks load on first use, `import timm_spot` costs no more than `import timm`.
_TASKS = {'push_to_hub': 'hub'}


def __getattr__(name: str) -> Any:
    if name not in _TASKS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return getattr(import_module(f'.tasks.{_TASKS[name]}', __name__), name)
