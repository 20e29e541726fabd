"""Vision Transformers off the grid: importing this package registers subpixel ViTs with timm.

    import timm, timm_spot
    model = timm.create_model('spot_vit_base_patch16_mae', n_tokens=25, sampler='center')
"""
from __future__ import annotations

import importlib
from typing import Any, List

from . import models as models
from .models.attention_saliency import attention_saliency as attention_saliency
from .models.dht_segmenter import DhtSegmenter as DhtSegmenter
from .models.hierarchical_tokenizer import HierarchicalTokenizer as HierarchicalTokenizer
from .models.hierarchical_tokenizer import Regions as Regions
from .models.retrofit import retrofit as retrofit
from .models.sparsify import sparsify as sparsify
from .ops import list_samplers as list_samplers
from .ops import register_sampler as register_sampler
from .ops import sample_positions as sample_positions
from .ops import sample_windows as sample_windows
from .ops import spectral_residual as spectral_residual

__version__ = '0.1.0'

# Tasks load on first use: importing this package costs no more than importing timm.
_TASKS = {
    'animate': 'draw_search',
    'draw_hierarchy': 'draw_regions',
    'draw_placement': 'draw',
    'draw_priors': 'draw',
    'draw_pruning': 'draw',
    'draw_reconstruction': 'draw',
    'draw_region_means': 'draw_regions',
    'draw_regions': 'draw_regions',
    'draw_seen': 'draw',
    'draw_trajectory': 'draw_search',
    'export_model': 'export',
    'load_saliency': 'saliency_maps',
    'OracleResult': 'oracle',
    'optimize_positions': 'oracle',
    'push_to_hub': 'hub',
    'RelevanceTask': 'relevance',
    'RasterToVector': 'vectorize',
    'vectorize': 'vectorize',
}


def __getattr__(name: str) -> Any:
    if name in _TASKS:
        return getattr(importlib.import_module(f'.tasks.{_TASKS[name]}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> List[str]:
    return sorted([*globals(), *_TASKS])
