"""Vision Transformers off the grid: importing this package registers subpixel ViTs with timm.

    import timm, timm_spot
    model = timm.create_model('spot_vit_base_patch16_mae', n_tokens=25, sampler='center')
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, List

from . import models as models
from .models.attention_saliency import attention_saliency as attention_saliency
from .models.dht_segmenter import DhtSegmenter as DhtSegmenter
from .models.dht_tokenizer import HierarchicalTokenizer as HierarchicalTokenizer
from .models.dht_tokenizer import Regions as Regions
from .models.placement import Placer as Placer
from .models.placement import list_placers as list_placers
from .models.placement import register_placer as register_placer
from .models.prior import Prior as Prior
from .models.pruning_vit import sparsify as sparsify
from .models.spot_placer import add_placer as add_placer
from .models.spot_retrofit import retrofit as retrofit
from .ops.placements import sample_positions as sample_positions
from .ops.saliency import spectral_residual as spectral_residual
from .ops.samplers import list_samplers as list_samplers
from .ops.samplers import register_sampler as register_sampler
from .ops.windows import sample_windows as sample_windows

if TYPE_CHECKING:  # what an editor follows; at run time these load on first use, see `_TASKS`
    from .tasks.deploy.compiled import compile as compile
    from .tasks.deploy.onnx_model import OnnxModel as OnnxModel
    from .tasks.drawing.placements import draw_placement as draw_placement
    from .tasks.drawing.placements import draw_priors as draw_priors
    from .tasks.drawing.placements import draw_seen as draw_seen
    from .tasks.drawing.pruning import draw_pruning as draw_pruning
    from .tasks.drawing.reconstruction import draw_reconstruction as draw_reconstruction
    from .tasks.drawing.regions import draw_hierarchy as draw_hierarchy
    from .tasks.drawing.regions import draw_region_means as draw_region_means
    from .tasks.drawing.regions import draw_regions as draw_regions
    from .tasks.drawing.search import animate as animate
    from .tasks.drawing.search import draw_trajectory as draw_trajectory
    from .tasks.pictures.saliency_maps import load_saliency as load_saliency
    from .tasks.pruning_task import RelevanceTask as RelevanceTask
    from .tasks.publishing.export import export_model as export_model
    from .tasks.publishing.hub import push_to_hub as push_to_hub
    from .tasks.search.optimize import optimize_positions as optimize_positions
    from .tasks.search.result import OracleResult as OracleResult
    from .tasks.vectorize import RasterToVector as RasterToVector
    from .tasks.vectorize import vectorize as vectorize

__version__ = '0.2.0'

# Tasks load on first use: importing this package costs no more than importing timm.
_TASKS = {
    'animate': 'drawing.search',
    'compile': 'deploy.compiled',
    'draw_hierarchy': 'drawing.regions',
    'draw_placement': 'drawing.placements',
    'draw_priors': 'drawing.placements',
    'draw_pruning': 'drawing.pruning',
    'draw_reconstruction': 'drawing.reconstruction',
    'draw_region_means': 'drawing.regions',
    'draw_regions': 'drawing.regions',
    'draw_seen': 'drawing.placements',
    'draw_trajectory': 'drawing.search',
    'export_model': 'publishing.export',
    'load_saliency': 'pictures.saliency_maps',
    'OnnxModel': 'deploy.onnx_model',
    'OracleResult': 'search.result',
    'optimize_positions': 'search.optimize',
    'push_to_hub': 'publishing.hub',
    'RelevanceTask': 'pruning_task',
    'RasterToVector': 'vectorize',
    'vectorize': 'vectorize',
}


def __getattr__(name: str) -> Any:
    if name in _TASKS:
        return getattr(importlib.import_module(f'.tasks.{_TASKS[name]}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> List[str]:
    return sorted([*globals(), *_TASKS])
