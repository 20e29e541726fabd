from __future__ import annotations

import json

import pytest
import timm
import torch
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st

import timm_spot  # noqa: F401  registers the models
from timm_spot.models import SpotPretrainedCfg
from timm_spot.models.prior import Prior
from timm_spot.models.spot_config import (
    PLACEMENT_FIELDS,
    make_priors,
    merge_settings,
    pop_placement,
    resolve_cfg,
    resolve_placement,
    timm_cfg,
)

PICO = 'spot_vit_pico_patch8_64'


def create(name=PICO, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs})


def placement_of(model):
    return model.n_tokens, model.placer.eval_prior.sampler


def test_priority_of_the_sources(tmp_path):
    timm.models.save_for_hf(create(n_tokens=5, sampler='uniform'), tmp_path)
    saved = f'local-dir:{tmp_path}'
    overlay = dict(n_tokens=7, sampler='sobol')
    cfg = dict(input_size=(3, 64, 64), num_classes=10, n_tokens=6, sampler='gaussian')

    def built(name=PICO, **kwargs):
        return placement_of(timm.create_model(name, **kwargs))

    assert built() == (64, 'isotropic')
    assert built(pretrained_cfg=cfg, **SMALL) == (6, 'gaussian')
    assert built(pretrained_cfg=SpotPretrainedCfg(**cfg), **SMALL) == (6, 'gaussian')
    assert built(pretrained_cfg=cfg, pretrained_cfg_overlay=overlay) == (7, 'sobol')
    assert built(pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, n_tokens=8) == (8, 'sobol')
    assert built(saved) == (5, 'uniform')
    assert built(saved, pretrained_cfg_overlay=overlay) == (7, 'sobol')
    assert built(saved, pretrained_cfg_overlay=overlay, n_tokens=8, sampler='center') == (8, 'center')
    assert built(saved, sampler='center') == (5, 'center')

    config = json.loads((tmp_path / 'config.json').read_text())
    for name in ('n_tokens', 'sampler'):
        del config['model_args'][name]
    config['pretrained_cfg'].update(n_tokens=4, sampler='center')
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert built(saved) == (4, 'center')
    assert built(saved, pretrained_cfg_overlay=dict(n_tokens=7)) == (7, 'center')


def test_each_source_beats_those_before_it():
    layers = [dict(n_tokens=1), dict(n_tokens=2), dict(n_tokens=3), dict(n_tokens=4)]
    for i in range(4):
        given_ = [layer if j <= i else {} for j, layer in enumerate(layers)]
        assert resolve_placement(*given_) == dict(n_tokens=i + 1)


def test_a_saved_argument_that_timm_repeats_as_a_keyword_is_beaten_by_the_overlay():
    saved = dict(n_tokens=[4, 16], sampler='uniform', depth=3)
    keywords = dict(n_tokens=[4, 16], sampler='uniform')  # equal, though not the same objects
    assert resolve_placement({}, saved, dict(n_tokens=9), keywords) == dict(sampler='uniform', n_tokens=9)
    assert resolve_placement({}, saved, dict(n_tokens=9), dict(keywords, n_tokens=25)) == dict(
        sampler='uniform', n_tokens=25)


def test_none_sets_nothing():
    assert resolve_placement(dict(n_tokens=9, sampler=None), {}, dict(n_tokens=None), {}) == dict(n_tokens=9)


@given(st.lists(st.dictionaries(
    st.sampled_from(['n_tokens', 'sampler', 'seed', 'eval_n_tokens', 'eval_sampler']), st.integers(1, 9)), max_size=5))
def test_merged_settings_are_those_of_the_last_layer_that_has_a_say(layers):
    merged = merge_settings(*layers)
    for name in ('n_tokens', 'sampler', 'seed', 'eval_n_tokens', 'eval_sampler'):
        expected = None
        for layer in layers:
            if name.startswith('eval_') and name.removeprefix('eval_') in layer:
                expected = None
            expected = layer.get(name, expected)
        assert merged.get(name) == expected


def test_priors_of_both_modes():
    assert make_priors(8) == (Prior(window=8), Prior(window=8))
    train, evaluation = make_priors(8, n_tokens=[4, 16], sampler='sobol', seed=3, eval_sampler='isotropic')
    assert train == Prior('sobol', (4, 16), 3, window=8) and evaluation == Prior('isotropic', 16, 3, window=8)
    assert make_priors(8, n_tokens=(4, 16), eval_n_tokens=9)[1].n_tokens == 9
    with pytest.raises(TypeError, match=r'eval_n_tokens=\(4, 16\) must be one budget'):
        make_priors(8, eval_n_tokens=(4, 16))
    with pytest.raises(ValueError, match='n_tokens=0 is not a budget'):
        make_priors(8, eval_n_tokens=0)


def test_configs_for_timm_lose_the_placement_and_nothing_else():
    cfg = resolve_cfg(PICO, dict(num_classes=10, n_tokens=9, sampler='center'), dict(n_tokens=4))
    assert (cfg.n_tokens, cfg.sampler, cfg.num_classes) == (4, 'center', 10)
    plain = timm_cfg(cfg)
    assert type(plain) is not SpotPretrainedCfg and plain.num_classes == 10 and not hasattr(plain, 'n_tokens')


def test_placement_keywords_are_taken_out():
    keywords = dict.fromkeys(PLACEMENT_FIELDS, 1) | dict(depth=3)
    assert set(pop_placement(keywords)) == set(PLACEMENT_FIELDS) and keywords == dict(depth=3)
