from __future__ import annotations

import pytest

from timm_spot.tasks.publishing.run_arguments import (
    dataset_name,
    is_plain_name,
    model_keywords,
    model_name,
    preprocessing,
)


def test_shape_giving_keywords_pass_and_others_are_named():
    args = dict(
        gp='avg', in_chans=1, model_kwargs=dict(
            depth=3, n_tokens=[9, 64], sampler='center', drop_path_rate=0.1, checkpoint_path='/etc/passwd', depth2=1))
    assert model_keywords(args, 'f.pth') == (
        dict(depth=3, n_tokens=[9, 64], sampler='center', global_pool='avg', in_chans=1),
        ['args.model_kwargs.checkpoint_path', 'args.model_kwargs.depth2'])


@pytest.mark.parametrize('given', [
    dict(coverage=0.5, eval_coverage=1., size_embed=True), dict(coverage=[0., 1.], size_embed=False),
    dict(sampler='coarse+center', eval_sampler='coarse+sobol', n_coarse=16)])
def test_sizes_pass(given):
    assert model_keywords(dict(model_kwargs=given), 'f.pth') == (given, [])


@pytest.mark.parametrize('name, value, rule', [
    ('coverage', 1.5, 'a number from 0 to 1, or two of them'),
    ('coverage', [0., 0.5, 1.], 'a number from 0 to 1, or two of them'),
    ('eval_coverage', [0., 1.], 'a number from 0 to 1'),
    ('n_coarse', 0, 'a whole number from 1 to 10000'),
    ('sampler', 'fine+center', 'a word'),
    ('n_tokens', 10 ** 12, 'a whole number from 1 to 10000'),
    ('n_tokens', True, 'a whole number from 1 to 10000'),
    ('depth', 0, 'a whole number from 1 to 1024'),
    ('mlp_ratio', float('nan'), 'a number from 0 to 1000'),
    ('backbone', 'hf-hub:evil/model', 'a name that timm knows'),
    ('saliency', 'http://evil', 'a word'),
    ('class_token', 1, 'true or false'),
    ('stages', [], 'or up to 1024 of them'),
])
def test_values_out_of_range_are_named_with_the_file_and_the_rule(name, value, rule):
    with pytest.raises(ValueError, match=rf'f\.pth: {name}=.* in its args must be .*{rule}'):
        model_keywords(dict(model_kwargs={name: value}), 'f.pth')
    with pytest.raises(ValueError, match=r'f\.pth: model_kwargs=3 in its args must be a dict'):
        model_keywords(dict(model_kwargs=3), 'f.pth')


def test_names_of_models():
    assert model_name({}, 'f.pth') is None
    assert model_name(dict(model='vit_tiny_patch16_224.augreg_in21k'), 'f.pth') == 'vit_tiny_patch16_224'
    assert is_plain_name('vit_tiny_patch16_224') and not is_plain_name('hf-hub:a/b') and not is_plain_name('no_such')
    with pytest.raises(ValueError, match="model='local-dir:/tmp' in its args must be a name that timm knows"):
        model_name(dict(model='local-dir:/tmp'), 'f.pth')


def test_preprocessing_of_the_run():
    args = dict(mean=[0.5], std=(0.25,), crop_pct=0.9, img_size=None, interpolation='', lr=0.1)
    assert preprocessing(args, 'f.pth') == dict(mean=[0.5], std=(0.25,), crop_pct=0.9)
    with pytest.raises(ValueError, match=r'std=\(0\.0,\) in its args must be positive'):
        preprocessing(dict(std=(0.,)), 'f.pth')
    with pytest.raises(ValueError, match=r'mean=.* must be a list of finite numbers'):
        preprocessing(dict(mean=[float('inf')]), 'f.pth')


def test_data_set_in_one_plain_line():
    assert dataset_name(dict(dataset='hfds/imagenet-1k')) == 'hfds/imagenet-1k'
    assert dataset_name(dict(dataset='a\n# <b>')) == 'a b'
    assert dataset_name(dict(dataset=3)) is None and dataset_name(dict(dataset='')) is None
