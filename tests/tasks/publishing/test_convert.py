"""convert: any checkpoint into a folder that timm loads, and nothing that is not a checkpoint."""
from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from toy_placer import NAME as TOY

import timm_spot
from timm_spot.tasks.kept import lock_output
from timm_spot.tasks.publishing import convert as convert_module
from timm_spot.tasks.publishing.convert import convert
from timm_spot.tasks.publishing.sources import recognise

TINY = dict(depth=1, img_size=64, num_classes=3)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def load(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()



@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model('vit_tiny_patch16_224', **TINY).eval()


def training_checkpoint(model, name, **kwargs):
    """What timm's train.py saves, with averaged weights that differ from the last ones."""
    averaged = {k: v + 1e-3 for k, v in model.state_dict().items()}
    return dict(
        epoch=3, arch=name, version=2, metric=71.5, state_dict=model.state_dict(), state_dict_ema=averaged,
        optimizer=dict(state={}, param_groups=[dict(lr=0.1)]),
        args=argparse.Namespace(
            model=name, model_kwargs=kwargs, gp=None, in_chans=None, dataset='torch/cifar10', img_size=None,
            input_size=None, mean=[0.1, 0.2, 0.3], std=None, interpolation='', crop_pct=None))


def test_authors_checkpoint(golden, tmp_path):
    # The authors' files are base models and hold no arguments; these make a small one of it.
    args = argparse.Namespace(model=golden['arch'], model_kwargs=SMALL)
    weights = dict(golden['authors'], **{'tokenizer.logprior': torch.ones(14, 14)})
    torch.save(dict(model=weights, args=args), tmp_path / 'authors.pth')
    done = convert(tmp_path / 'authors.pth', tmp_path / 'out')
    assert done.folded == {
        'embedder.emb.weight': ['patch_embed.proj.weight', 'patch_embed.pos_proj.weight'],
        'tokenizer._n_sigma': ['patch_embed.n_sigma']}
    assert done.dropped == ['tokenizer.logprior'] and done.added == []
    assert done.renamed['blocks.1.att.qkv.weight'] == 'blocks.1.attn.qkv.weight'
    assert done.mapped == len(golden['authors']) - 2  # all but the two that were folded
    assert done.difference == 0

    model = load(tmp_path / 'out')
    logits = torch.cat([
        model(image[None], positions) for image, positions in zip(golden['image'], golden['positions'])])
    torch.testing.assert_close(logits, golden['logits'], atol=1e-4, rtol=0)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['model_args']['convention'] == 'spot'
    assert config['pretrained_cfg']['mean'] == [0.485, 0.456, 0.406]  # the authors', not those of the default tag


def test_authors_checkpoint_names_itself_where_only_one_model_fits():
    tensors = {'embedder.emb.weight': torch.empty(768, 1024, device='meta'), 'blocks.11.norm1.weight': torch.ones(1)}
    pooled = dict(tensors, **{'fc_norm.weight': torch.ones(1)})
    assert recognise(pooled, 'x.pth') == 'spot_vit_base_patch16_mae.spot_in1k'
    with pytest.raises(ValueError, match=r'spot_vit_base_patch16_in21k\.spot_in21k_ft_in1k'):
        recognise(tensors, 'x.pth')


@pytest.mark.parametrize('suffix', ['pth.tar', 'safetensors'])
def test_checkpoint_of_a_vit(tmp_path, vit, suffix):
    file = tmp_path / f'weights.{suffix}'
    torch.save(vit.state_dict(), file) if suffix == 'pth.tar' else save_file(vit.state_dict(), file)
    with pytest.raises(ValueError, match=r'does not say whose weights it holds: .*--model'):
        convert(file, tmp_path / 'out')
    with pytest.raises(ValueError, match=r'are not those of vit_tiny_patch16_224'):  # 12 blocks of 224 px, here 1 of 64
        convert(file, tmp_path / 'out', model='vit_tiny_patch16_224')
    assert not (tmp_path / 'out').exists()


def test_training_checkpoint_of_a_vit_takes_averaged_weights_and_the_runs_arguments(tmp_path, vit):
    kwargs = dict(depth=1, img_size=64)
    torch.save(training_checkpoint(vit, 'vit_tiny_patch16_224', **kwargs), tmp_path / 'last.pth.tar')
    done = convert(tmp_path / 'last.pth.tar', tmp_path / 'out')
    assert done.entry == 'state_dict_ema' and done.architecture == 'spot_retrofit'
    assert done.folded == {'pos_embed': ['patch_embed.pos_proj.weight', 'cls_token']}
    assert done.added == ['patch_embed.n_sigma']
    assert done.mapped == len(vit.state_dict()) - 2 and done.difference < 2e-4
    assert set(done.dropped) == {'epoch', 'arch', 'version', 'metric', 'state_dict', 'optimizer'}
    assert 'state_dict_ema' in str(done) and 'pos_embed -> ' in str(done)

    vit.load_state_dict({k: v + 1e-3 for k, v in vit.state_dict().items()})
    model, images = load(tmp_path / 'out'), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), vit(images), rtol=2e-4, atol=1e-5)
    assert model.pretrained_cfg['mean'] == [0.1, 0.2, 0.3]
    assert 'torch/cifar10' in (tmp_path / 'out' / 'README.md').read_text()


def test_training_checkpoint_of_a_subpixel_model(tmp_path, pico):
    content = training_checkpoint(pico, 'spot_vit_pico_patch8_64', n_tokens=9, sampler='sobol')
    content['state_dict_ema'] = {f'module.{k}': v for k, v in content['state_dict_ema'].items()}
    torch.save(content, tmp_path / 'last.pth.tar')
    done = convert(tmp_path / 'last.pth.tar', tmp_path / 'out')
    assert (done.folded, done.added, done.renamed, done.difference) == ({}, [], {}, 0)
    model = load(tmp_path / 'out')
    assert model.place(torch.zeros(1, 3, 64, 64)).shape == (1, 9, 2)
    assert torch.equal(model.cls_token, pico.cls_token + 1e-3)


def test_folder_of_a_vit_and_its_weights_in_half_precision(tmp_path, vit):
    save_for_hf(vit.half(), str(tmp_path / 'vit'), safe_serialization=True)
    done = convert(tmp_path / 'vit', tmp_path / 'out')
    assert done.architecture == 'spot_retrofit' and done.difference < 2e-4
    assert load(tmp_path / 'out').num_classes == 3


def test_names_with_spaces_and_unicode(tmp_path, pico):
    folder = tmp_path / 'жёлтый дом #1 @x'
    folder.mkdir()
    torch.save(training_checkpoint(pico, 'spot_vit_pico_patch8_64'), folder / 'poids é.pth.tar')
    convert(folder / 'poids é.pth.tar', folder / 'sortie 猫')
    assert torch.equal(load(folder / 'sortie 猫').cls_token, pico.cls_token + 1e-3)


@pytest.mark.parametrize('name', ['bomb.pth', 'bomb.pth.tar', 'bomb.bin'])
@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle', 'pickle protocol 2'])
def test_pickle_bombs_are_refused_by_name_and_never_run(tmp_path, name, form):
    bomb, file = Bomb(tmp_path / 'exploded'), tmp_path / name
    if form.startswith('pickle'):
        file.write_bytes(pickle.dumps(dict(model=bomb), protocol=2 if '2' in form else 4))
    else:
        torch.save(dict(model=dict(a=torch.ones(1)), x=bomb), file, _use_new_zipfile_serialization=form == 'zip')
    with pytest.raises(ValueError, match=r'holds objects that are no weights: posix\.system'):
        convert(file, tmp_path / 'out', model='spot_vit_pico_patch8_64')
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_damaged_files_are_named_and_leave_nothing(tmp_path):
    for name, content in (('x.pth', b''), ('x.pth.tar', b'<html>'), ('x.safetensors', b'\0' * 20)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            convert(tmp_path / name, tmp_path / 'out', model='spot_vit_pico_patch8_64')
        (tmp_path / name).unlink()
    assert not list(tmp_path.iterdir())


def test_missing_source_and_wrong_destination(tmp_path, pico):
    file = tmp_path / 'pico.safetensors'
    save_file(pico.state_dict(), file)
    for missing in (tmp_path / 'no.pth', 'folder/no.pth', 'no.pth'):
        with pytest.raises(FileNotFoundError, match=r'no.pth is no file'):
            convert(missing, tmp_path / 'out')
    with pytest.raises(FileExistsError, match='give a new or an empty folder'):
        convert(file, tmp_path, model='spot_vit_pico_patch8_64')
    with pytest.raises(FileExistsError):
        convert(file, file, model='spot_vit_pico_patch8_64')
    with pytest.raises(FileNotFoundError, match='in which out is to be made'):
        convert(file, tmp_path / 'no' / 'out', model='spot_vit_pico_patch8_64')
    (tmp_path / 'empty').mkdir()
    convert(file, tmp_path / 'empty', model='spot_vit_pico_patch8_64')
    assert load(tmp_path / 'empty').num_classes == 10


def test_models_that_cannot_be_retrofitted_are_refused(tmp_path):
    save_file({'a': torch.ones(1)}, tmp_path / 'x.safetensors')
    with pytest.raises(ValueError, match='resnet18 cannot be retrofitted'):
        convert(tmp_path / 'x.safetensors', tmp_path / 'out', model='resnet18')


def test_full_disk_leaves_nothing_behind(tmp_path, pico):
    file = tmp_path / 'pico.safetensors'
    save_file(pico.state_dict(), file)
    code = (
        'import resource, sys\n'
        'from timm_spot.tasks.publishing.convert import convert\n'
        'resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n'
        'try:\n'
        "    convert(sys.argv[1], sys.argv[2], model='spot_vit_pico_patch8_64')\n"
        'except OSError as e:\n'
        '    print(e)\n')
    result = subprocess.run(
        [sys.executable, '-c', code, str(file), str(tmp_path / 'out')], capture_output=True, text=True, timeout=300,
        env=dict(os.environ, PYTHONPATH=str(Path(timm_spot.__file__).parent.parent)))
    assert 'out cannot be written' in result.stdout and 'File too large' in result.stdout, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['pico.safetensors']


def test_a_model_that_loads_back_otherwise_is_not_kept(tmp_path, pico, monkeypatch):
    file = tmp_path / 'pico.safetensors'
    save_file(pico.state_dict(), file)
    save_folder = convert_module.save_folder

    def save_another(model, folder, *args):
        save_folder(model, folder, *args)
        weights = load_file(folder / 'model.safetensors')
        weights['head.weight'] = weights['head.weight'] * 1.01
        save_file(weights, folder / 'model.safetensors')

    monkeypatch.setattr(convert_module, 'save_folder', save_another)
    with pytest.raises(RuntimeError, match=r'gives other logits .* Nothing was kept'):
        convert(file, tmp_path / 'out', model='spot_vit_pico_patch8_64')
    assert [p.name for p in tmp_path.iterdir()] == ['pico.safetensors']


def test_base_model_in_two_gigabytes(tmp_path):
    code = (
        'import re, sys\n'
        'from timm_spot.tasks.publishing.convert import convert\n'
        'print(convert(sys.argv[1], sys.argv[2]).difference)\n'
        # Not ru_maxrss: a child begins with that of the test process.
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n")
    vit = timm.create_model('vit_base_patch16_224')
    torch.save(training_checkpoint(vit, 'vit_base_patch16_224'), tmp_path / 'last.pth.tar')
    del vit
    result = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'last.pth.tar'), str(tmp_path / 'out')], capture_output=True,
        text=True, timeout=600, env=dict(os.environ, PYTHONPATH=str(Path(timm_spot.__file__).parent.parent)))
    assert result.returncode == 0, result.stderr
    difference, kibibytes = map(float, result.stdout.split())
    assert difference < 2e-4 and kibibytes * 1024 < 2e9


def test_a_model_whose_head_is_zero_is_compared_by_its_features(tmp_path, pico, monkeypatch):
    torch.nn.init.zeros_(pico.head.weight)
    torch.nn.init.zeros_(pico.head.bias)
    save_for_hf(pico, str(tmp_path / 'source'), safe_serialization=True)
    done = convert(tmp_path / 'source', tmp_path / 'out')
    assert done.difference == 0 and 'features and logits' in str(done)
    assert not load(tmp_path / 'out').head.weight.any()

    save_folder = convert_module.save_folder

    def save_another(model, folder, *args):
        save_folder(model, folder, *args)
        weights = load_file(folder / 'model.safetensors')
        weights['fc_norm.weight'] = weights['fc_norm.weight'] * 1.01
        save_file(weights, folder / 'model.safetensors')

    monkeypatch.setattr(convert_module, 'save_folder', save_another)
    with pytest.raises(RuntimeError, match=r'other logits than .*, or other features'):  # all logits are zero
        convert(tmp_path / 'source', tmp_path / 'other')


def test_weights_in_eight_bits_are_refused(tmp_path, pico):
    weights = dict(pico.state_dict(), **{'head.weight': torch.ones(10, 128, dtype=torch.int8)})
    torch.save(weights, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r'weights as int8, which must be floating point: head\.weight'):
        convert(tmp_path / 'x.pth', tmp_path / 'out', model='spot_vit_pico_patch8_64')


@pytest.mark.parametrize('name, says', [
    ('hf-hub:lab/elsewhere', 'must be a name that timm knows'),
    ('local-dir:/etc', 'must be a name that timm knows'),
    ('../vit', 'must be a name that timm knows'),
    (3, 'must be a name that timm knows'),
])
def test_a_file_cannot_name_a_model_elsewhere(tmp_path, pico, monkeypatch, name, says):
    monkeypatch.setattr('timm_spot.models.download.hf_hub_download', None)  # an error, were it called
    torch.save(dict(training_checkpoint(pico, name)), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=rf'x\.pth: model=.* in its args {says}.*model= \(--model\)'):
        convert(tmp_path / 'x.pth', tmp_path / 'out')
    convert(tmp_path / 'x.pth', tmp_path / 'out', model='spot_vit_pico_patch8_64')


@pytest.mark.parametrize('keyword, value', [
    ('n_tokens', 10 ** 12), ('n_tokens', [1, 10 ** 12]), ('n_tokens', 0), ('n_tokens', True), ('n_tokens', 'many'),
    ('depth', 10 ** 9), ('embed_dim', -1), ('img_size', 10 ** 6), ('img_size', [64, 64, 64]),
    ('mlp_ratio', float('nan')), ('pos_nodes', 10 ** 5), ('sampler', '../salient'), ('saliency', ['a']),
    ('class_token', 'no'), ('seed', 2 ** 70),
    ('backbone', 'hf-hub:lab/elsewhere'), ('global_pool', 7),
])
def test_settings_in_a_file_are_held_to_their_ranges(tmp_path, pico, keyword, value):
    torch.save(training_checkpoint(pico, 'spot_vit_pico_patch8_64', **{keyword: value}), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=rf'x\.pth: {keyword}=.* in its args must be '):
        convert(tmp_path / 'x.pth', tmp_path / 'out')
    assert [p.name for p in tmp_path.iterdir()] == ['x.pth']


@pytest.mark.parametrize('kwargs', [dict(depth=1000), dict(img_size=9999), dict(embed_dim=65536)])
def test_settings_in_a_file_make_no_model_larger_than_its_weights(tmp_path, pico, kwargs):
    torch.save(training_checkpoint(pico, 'spot_vit_pico_patch8_64', **kwargs), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r'numbers for a model of|tokens, as .*x\.pth says; at most'):
        convert(tmp_path / 'x.pth', tmp_path / 'out')


def test_other_settings_in_a_file_are_left_out_by_name(tmp_path, pico):
    (tmp_path / 'other.pth').write_bytes(b'not to be opened')
    content = training_checkpoint(
        pico, 'spot_vit_pico_patch8_64', checkpoint_path=str(tmp_path / 'other.pth'), pretrained=True,
        pretrained_cfg_overlay=dict(file='/etc/passwd'), drop_path_rate=0.1, n_tokens=9)
    content['args'].dataset = '](http://x) <b>photos</b>\n# of mine'
    torch.save(content, tmp_path / 'x.pth')
    done = convert(tmp_path / 'x.pth', tmp_path / 'out')
    left_out = [name for name in done.dropped if name.startswith('args.')]
    assert left_out == [f'args.model_kwargs.{k}' for k in ('checkpoint_path', 'pretrained', 'pretrained_cfg_overlay')]
    assert load(tmp_path / 'out').n_tokens == 9
    assert '* **Training data**: http://x b photos /b of mine\n' in (tmp_path / 'out' / 'README.md').read_text()


def test_a_name_without_a_tag_claims_nothing_of_its_default_weights(tmp_path, pico):
    save_file(pico.state_dict(), tmp_path / 'x.safetensors')
    convert(tmp_path / 'x.safetensors', tmp_path / 'plain', model='spot_vit_pico_patch8_64')
    card = (tmp_path / 'plain' / 'README.md').read_text()
    cfg = json.loads((tmp_path / 'plain' / 'config.json').read_text())['pretrained_cfg']
    assert 'license: unknown' in card and '**Training data**: unknown' in card and '# spot_vit_pico_patch8_64\n' in card
    assert not {'tag', 'license', 'label_names', 'description', 'origin_url'} & set(cfg)
    assert cfg['mean'] == [0.1, 0.1, 0.1]  # the preprocessing goes with the architecture
    convert(tmp_path / 'x.safetensors', tmp_path / 'tagged', model='spot_vit_pico_patch8_64.digits')
    card = (tmp_path / 'tagged' / 'README.md').read_text()
    assert 'license: apache-2.0' in card and 'UCI' in card and '# spot_vit_pico_patch8_64.digits\n' in card


def test_what_a_killed_conversion_left_goes_at_the_next(tmp_path, pico):
    save_file(pico.state_dict(), tmp_path / 'x.safetensors')
    for name in ('.out.123.tmp', '.other.123.tmp'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'model.safetensors').write_bytes(b'half')
    convert(tmp_path / 'x.safetensors', tmp_path / 'out', model='spot_vit_pico_patch8_64')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.other.123.tmp', 'out', 'x.safetensors']


def test_two_conversions_into_one_folder(tmp_path, pico):
    save_file(pico.state_dict(), tmp_path / 'x.safetensors')
    with lock_output(tmp_path / 'out'), pytest.raises(BlockingIOError, match='another run writes to'):
        convert(tmp_path / 'x.safetensors', tmp_path / 'out', model='spot_vit_pico_patch8_64')


@pytest.mark.parametrize('source', ['folder', 'training checkpoint'])
def test_a_placement_network_is_kept(tmp_path, source):
    model = timm.create_model('spot_vit_pico_patch8_64', depth=1, placer=TOY, n_tokens=9).eval()
    if source == 'folder':
        save_for_hf(model, str(tmp_path / 'source'), safe_serialization=True)
    else:
        torch.save(
            training_checkpoint(model, 'spot_vit_pico_patch8_64', placer=TOY, n_tokens=9, depth=1), tmp_path / 'source')
        model.load_state_dict({k: v + 1e-3 for k, v in model.state_dict().items()})
    done = convert(tmp_path / 'source', tmp_path / 'out')
    assert done.difference == 0 and done.added == []
    again, images = load(tmp_path / 'out'), torch.rand(2, 3, 64, 64)
    assert type(again.placer) is type(model.placer)
    assert torch.equal(again.place(images), model.place(images)) and again.place(images).shape == (2, 9, 2)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['model_args']['placer'] == TOY
    assert f'placer `{TOY}`' in (tmp_path / 'out' / 'README.md').read_text()


def test_a_folder_whose_name_is_no_utf8_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match='lies under a name that is no UTF-8'):
        convert(tmp_path / 'there is none.pth', tmp_path / 'caf\udce9')
    assert not any(tmp_path.iterdir())
