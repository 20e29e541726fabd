from __future__ import annotations

import pytest
import timm
import torch
from conftest import SMALL
from PIL import Image

from timm_spot.tasks.evaluation.plan import plan_rows
from timm_spot.tasks.evaluation.request import Knn, Request
from timm_spot.tasks.pictures.datasets import Pictures


@pytest.fixture
def folder(tmp_path):
    for label in range(10):
        (tmp_path / 'data' / str(label)).mkdir(parents=True)
        Image.effect_noise((64, 64), 20 + 9 * label).save(tmp_path / 'data' / str(label) / '0.png')
    return tmp_path / 'data'


def plan(model, data, **request):
    return plan_rows({'model': model}, Pictures(str(data)), Request(**request))


def test_what_determines_a_row_is_in_its_key(folder):
    def planned(**keywords):
        torch.manual_seed(0)
        model = timm.create_model('spot_vit_pico_patch8_64', **SMALL, **keywords).eval()
        return plan(model, folder, samplers=('isotropic',), budgets=(4,))[0].row

    base = planned()
    assert planned() == base
    other = planned(act_layer='relu')
    assert other.weights == base.weights and other != base
    spot = planned(convention='spot')
    assert spot != base


def test_sizes_are_part_of_the_key(folder):
    model = timm.create_model('spot_vit_pico_patch8_64', sampler='coarse+center', **SMALL).eval()
    asked = dict(samplers=('coarse+center',), budgets=(9,))
    seen = [plan(model, folder, **asked)[0].row]
    for changes in (dict(n_coarse=2), dict(coverage=0.5), dict(eval_coverage=1.)):
        model.set_placement(**changes)
        seen.append(plan(model, folder, **asked)[0].row)
    assert len(set(seen)) == 4 and [row.coverage for row in seen] == [None, None, 0.5, 1.]
    assert {row.coverage for row in (p.row for p in plan(model, folder, coverages=(0., 1.), **asked))} == {None, 1.}


@pytest.mark.parametrize('asked', [
    dict(coverages=(1.,)), dict(samplers=('coarse+center',)), dict(samplers=(), oracle='coarse+center'),
    dict(samplers=(), oracle='isotropic', coverages=(0.5,))])
def test_sizes_are_refused_under_one_size(folder, asked):
    model = timm.create_model('spot_vit_pico_patch8_64', convention='spot', **SMALL).eval()
    with pytest.raises(ValueError, match="asks for sizes, but under convention='spot' windows have one size"):
        plan(model, folder, **{**dict(samplers=('isotropic',), budgets=(4,)), **asked})


def test_a_local_model_of_another_convention_has_rows_of_its_own(folder):
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', pos_nodes=8, **SMALL).eval()
    first, = plan(model, folder, samplers=('grid',), budgets=(4,))
    model.patch_embed.convention = 'spot'
    second, = plan(model, folder, samplers=('grid',), budgets=(4,))
    assert first.row.weights == second.row.weights and first.row != second.row


def test_maps_in_a_folder_are_part_of_the_key(folder, tmp_path, pico):
    maps = tmp_path / 'maps'
    maps.mkdir()
    Image.new('L', (8, 8), 255).save(maps / '0.png')
    asked = dict(samplers=('salient', 'grid'), budgets=(4,), saliency=str(maps))
    salient, grid = plan(pico, folder, **asked)
    Image.new('L', (9, 9), 255).save(maps / '0.png')
    changed, same = plan(pico, folder, **asked)
    assert changed.row != salient.row and same.row == grid.row


def test_a_row_asked_for_twice_is_one_row(folder, pico):
    assert len(plan(pico, folder, samplers=('grid', 'grid'), budgets=(4, 4))) == 1


@pytest.mark.parametrize('asked, says', [
    (dict(samplers=('isotopic',)), "did you mean 'isotropic'"),
    (dict(oracle='isotopic'), "did you mean 'isotropic'"),
    (dict(baselines=('drop',)), "baselines=drop has the unknown 'drop': patch-drop, low-res, top-k"),
    (dict(budgets=(0,)), 'n_tokens=0'),
    (dict(budgets=(4097,), samplers=('uniform',)), 'n_tokens=4097 exceeds the 64 x 64 pixels of an image of model'),
    (dict(seeds=()), 'seeds is empty'),
    (dict(seeds=(0, 2 ** 31)), 'seeds=0,2147483648: 2147483648 must lie between 0 and'),
])
def test_what_cannot_be_is_refused_before_any_work(folder, pico, asked, says):
    with pytest.raises(ValueError, match=says):
        plan(pico, folder, **{**dict(samplers=('grid',), budgets=(4,)), **asked})


@pytest.mark.parametrize('knn, says', [
    (dict(k=11), 'k=11 must lie between 1 and the 10 images'), (dict(temperature=float('nan')), 'temperature=nan'),
    (dict(temperature=0.), r'temperature=0\.0')])
def test_neighbours_that_cannot_be_asked_are_refused(folder, pico, knn, says):
    with pytest.raises(ValueError, match=says):
        plan(pico, folder, samplers=('grid',), budgets=(4,), knn=Knn(Pictures(str(folder)), **knn))


def test_rows_of_a_request_in_order(folder, pico):
    planned = plan(
        pico, folder, samplers=('grid', 'uniform'), budgets=(4, 9), oracle='sobol', baselines=('patch-drop',),
        seeds=(1, 0, 1))
    assert [(p.row.kind, p.row.sampler, p.row.n_tokens, p.row.seeds) for p in planned] == [
        ('sampler', 'grid', 4, ()), ('sampler', 'grid', 9, ()),
        ('sampler', 'uniform', 4, (1, 0)), ('sampler', 'uniform', 9, (1, 0)),
        ('oracle', 'oracle sobol', 4, (1, 0)), ('oracle', 'oracle sobol', 9, (1, 0)),
        ('baseline', 'patch-drop', 4, (1, 0)), ('baseline', 'patch-drop', 9, (1, 0))]
    assert [p.seeds for p in planned[:3]] == [(0,), (0,), (1, 0)]


def test_a_name_that_is_no_utf_8_can_be_written(folder, pico):
    planned = plan_rows({'a\udcffb\nc': pico}, Pictures(str(folder)), Request(samplers=('grid',), budgets=(4,)))
    assert planned[0].row.model == 'a\\udcffb\\nc'
    planned[0].row.model.encode()


def test_neighbours_of_other_classes_are_refused(folder, pico, tmp_path):
    for label in range(10):
        (tmp_path / 'bank' / f'{label + 1}').mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'bank' / f'{label + 1}' / '0.png')
    with pytest.raises(ValueError, match=r"number 0 is '0' and '1'.*labels would be wrong"):
        plan(pico, folder, samplers=('grid',), budgets=(4,), knn=Knn(Pictures(str(tmp_path / 'bank')), k=1))


def test_weights_of_an_attention_saliency_are_part_of_the_key(folder, pico, tmp_path):
    seen = set()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        vit = timm.create_model('vit_tiny_patch16_224', depth=1, img_size=32, embed_dim=12, num_heads=1, num_classes=2)
        timm.models.save_for_hf(vit, tmp_path / 'vit', model_args=dict(depth=1, img_size=32, embed_dim=12, num_heads=1))
        seen.add(plan(
            pico, folder, samplers=('salient',), budgets=(4,), saliency=f'attention:local-dir:{tmp_path}/vit')[0].row)
    assert len(seen) == 2
