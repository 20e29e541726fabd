"""The only door to what timm does not export; what it exports is imported from where it exports it.

When a new timm moves one of these, this file says so, and nothing else has to change. Seen on timm 1.0.31.
"""
from __future__ import annotations

from timm.models import PretrainedCfg, _builder
from timm.models._builder import _resolve_pretrained_source as resolve_pretrained_source
from timm.models._features import feature_take_indices as feature_take_indices
from timm.models._hub import _EXT_PRIORITY as FOLDER_SUFFIXES
from timm.models._hub import _PREFERRED_FILES as FOLDER_FILES
from timm.models._hub import HF_WEIGHTS_NAME as HF_WEIGHTS_NAME
from timm.models._hub import _get_safe_alternatives as get_safe_alternatives
from timm.models._hub import check_cached_file as check_cached_file
from timm.models._hub import download_cached_file as download_cached_file
from timm.models._hub import hf_split as hf_split
from timm.models._input import get_pretrained_grid_size as get_pretrained_grid_size
from timm.models._input import update_model_args as update_model_args

__all__ = [
    'FOLDER_FILES',
    'FOLDER_SUFFIXES',
    'HF_WEIGHTS_NAME',
    'check_cached_file',
    'download_cached_file',
    'feature_take_indices',
    'get_pretrained_grid_size',
    'get_safe_alternatives',
    'hf_split',
    'let_scripts_read',
    'resolve_pretrained_source',
    'update_model_args',
]


def let_scripts_read(cfg_class: type[PretrainedCfg]) -> None:
    """Let timm's scripts build the configs of `hf-hub:` and `local-dir:` models as a subclass with more fields.

    They do so before any entrypoint runs, and refuse a field that their own class lacks.
    """
    _builder.PretrainedCfg = cfg_class
