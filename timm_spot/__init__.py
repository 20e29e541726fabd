"""Vision Transformers off the grid: importing this package registers subpixel ViTs with timm.

    import timm, timm_spot
    model = timm.create_model('spot_vit_base_patch16_mae', n_tokens=25, sampler='center')
"""
from . import models as models
from .models import retrofit as retrofit
from .ops import list_samplers as list_samplers
from .ops import register_sampler as register_sampler
from .ops import sample_positions as sample_positions
from .ops import sample_windows as sample_windows

__version__ = '0.1.0'
