"""What a training checkpoint says of its own run: settings that give the model its shape, and nothing more.

The `args` in a file come from whoever made it. Only these keywords pass, each within its range, so that no file can
name a repository, another file, or a model larger than its own weights.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from timm.models import is_model, split_model_name_tag

MAX_TOKENS = 10_000  # what the check of a conversion can run in reasonable time
Rule = tuple[Callable[[Any], bool], str]


def _whole(low: int, high: int) -> Rule:
    return (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
        f'a whole number from {low} to {high}')


def _one_or_more(low: int, high: int, most: int) -> Rule:
    fits, rule = _whole(low, high)
    return (
        lambda v: fits(v) or (isinstance(v, (list, tuple)) and 0 < len(v) <= most and all(fits(x) for x in v)),
        f'{rule}, or up to {most} of them')


def _number(low: float, high: float) -> Rule:
    return (
        lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and low <= v <= high,  # NaN is in no range
        f'a number from {low:g} to {high:g}')


_YES_OR_NO: Rule = (lambda v: isinstance(v, bool), 'true or false')
_WORD: Rule = (lambda v: isinstance(v, str) and re.fullmatch(r'[\w-]{0,64}', v) is not None, 'a word')
_SAMPLER: Rule = (lambda v: isinstance(v, str) and re.fullmatch(r'(coarse\+)?[\w-]{0,64}', v) is not None, 'a word')
_COVERAGE = _number(0, 1)
_COVERAGES: Rule = (
    lambda v: _COVERAGE[0](v) or (isinstance(v, (list, tuple)) and len(v) == 2 and all(map(_COVERAGE[0], v))),
    f'{_COVERAGE[1]}, or two of them')
_MODEL: Rule = (lambda v: isinstance(v, str) and is_plain_name(v), 'a name that timm knows')
_STATISTICS: Rule = (
    lambda v: isinstance(v, (list, tuple)) and 0 < len(v) <= 1024 and all(
        isinstance(x, (int, float)) and math.isfinite(x) for x in v),
    'a list of finite numbers')

KEYWORDS: dict[str, Rule] = {
    **dict.fromkeys(('img_size', 'patch_size'), _one_or_more(1, 10_000, 2)),
    **dict.fromkeys(('in_chans', 'num_heads', 'depth'), _whole(1, 1024)),
    **dict.fromkeys(('embed_dim',), _whole(1, 65_536)),
    **dict.fromkeys(('reg_tokens',), _whole(0, 1024)),
    **dict.fromkeys(('pos_nodes',), _whole(2, 256)),
    **dict.fromkeys(('n_tokens', 'eval_n_tokens'), _one_or_more(1, MAX_TOKENS, 2)),
    **dict.fromkeys(('n_coarse',), _whole(1, MAX_TOKENS)),
    **dict.fromkeys(('coverage',), _COVERAGES),
    **dict.fromkeys(('eval_coverage',), _COVERAGE),
    **dict.fromkeys(('seed', 'scorer_seed'), _whole(0, 2**63 - 1)),
    **dict.fromkeys(('stages',), _one_or_more(0, 1024, 1024)),
    **dict.fromkeys(('r',), _one_or_more(0, MAX_TOKENS, 1024)),
    **dict.fromkeys(('mlp_ratio', 'init_values'), _number(0, 1000)),
    **dict.fromkeys(('keep_rate',), _number(0, 1)),
    **dict.fromkeys(('similarity',), _number(-1, 1)),
    **dict.fromkeys((
        'class_token', 'no_embed_class', 'pre_norm', 'final_norm', 'fc_norm', 'qkv_bias', 'qk_norm', 'proj_bias',
        'scale_attn_norm', 'scale_mlp_norm', 'pool_include_prefix', 'size_embed'), _YES_OR_NO),
    **dict.fromkeys((
        'global_pool', 'act_layer', 'norm_layer', 'embed_norm_layer', 'convention', 'saliency', 'placer', 'scorer',
        'read'), _WORD),
    **dict.fromkeys(('sampler', 'eval_sampler'), _SAMPLER),
    'backbone': _MODEL,
}
# What only matters to training, or to timm's own position table.
_TRAINING = frozenset((
    'drop_rate', 'pos_drop_rate', 'patch_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'drop_path_rate',
    'weight_init', 'fix_init', 'dynamic_img_size', 'dynamic_img_pad', 'train_only', 'num_classes'))
_PREPROCESSING: dict[str, Rule] = {
    **dict.fromkeys(('img_size', 'in_chans', 'chans'), _whole(1, 10_000)),
    'input_size': _one_or_more(1, 10_000, 3),
    **dict.fromkeys(('mean', 'std'), _STATISTICS),
    **dict.fromkeys(('interpolation', 'crop_mode'), _WORD),
    'crop_pct': _number(0, 10),
}


def is_plain_name(name: str) -> bool:
    """Whether timm knows a model of this name, with a tag or not, by itself: no repository, no folder."""
    return re.fullmatch(r'[\w.-]+', name) is not None and is_model(split_model_name_tag(name)[0])


def model_name(args: dict[str, Any], where: str) -> str | None:
    """Name of the model that the run trained, without the tag of the weights from which it started.

    Raises:
        ValueError: It is nothing that timm knows by itself.
    """
    name = args.get('model')
    if name is None:
        return None
    _check('model', name, _MODEL, where)
    return split_model_name_tag(name)[0]


def model_keywords(args: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Keywords that give the model its shape, and the names of others in `model_kwargs` that were left out.

    Raises:
        ValueError: One of them is out of its range.
    """
    given = args.get('model_kwargs') or {}
    if not isinstance(given, dict):
        raise ValueError(f'{where}: model_kwargs={given!r:.60} in its args must be a dict. {_REMEDY}')
    keywords = {k: v for k, v in given.items() if k in KEYWORDS and v is not None}
    keywords.update({k: args[arg] for k, arg in (('global_pool', 'gp'), ('in_chans', 'in_chans')) if args.get(arg)})
    for name, value in keywords.items():
        _check(name, value, KEYWORDS[name], where)
    left_out = [str(k) for k in given if k not in KEYWORDS and k not in _TRAINING]
    return keywords, [f'args.model_kwargs.{name}' for name in left_out]


def preprocessing(args: dict[str, Any], where: str) -> dict[str, Any]:
    """The run's settings for images, in the words of `timm.data.resolve_data_config`.

    Raises:
        ValueError: One of them is out of its range.
    """
    settings = {k: args[k] for k in _PREPROCESSING if args.get(k) not in (None, '')}
    for name, value in settings.items():
        _check(name, value, _PREPROCESSING[name], where)
    if any(v <= 0 for v in settings.get('std', [])):
        raise ValueError(f"{where}: std={settings['std']!r:.60} in its args must be positive. {_REMEDY}")
    return settings


def dataset_name(args: dict[str, Any]) -> str | None:
    """What the run was trained on, as one plain line for a model card."""
    name = args.get('dataset')
    return ' '.join(re.sub(r'[^\w./:+-]+', ' ', name).split())[:100] or None if isinstance(name, str) else None


_REMEDY = 'Give the weights alone, and whose they are as model= (--model).'


def _check(name: str, value: Any, rule: Rule, where: str) -> None:
    fits, text = rule
    if not fits(value):
        raise ValueError(f'{where}: {name}={value!r:.60} in its args must be {text}. {_REMEDY}')
