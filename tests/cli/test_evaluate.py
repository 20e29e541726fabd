from __future__ import annotations

import pytest
import timm
import torch
from click.testing import CliRunner
from commands import run
from conftest import SMALL
from PIL import Image

from timm_spot.cli import main
from timm_spot.tasks.evaluation import studies
from timm_spot.tasks.evaluation.results import read_results

ARGUMENTS = ('--samplers', 'grid,uniform', '--budgets', '4,9', '--batch-size', '7')


@pytest.fixture
def folder(tmp_path):
    for label in range(10):
        (tmp_path / 'data' / str(label)).mkdir(parents=True)
        for i in range(3):
            Image.effect_noise((64, 64), 20 + 9 * label).save(tmp_path / 'data' / str(label) / f'{i}.png')
    return tmp_path / 'data'


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model('spot_vit_pico_patch8_64', **SMALL), tmp_path / 'saved')
    return f'local-dir:{tmp_path}/saved'


def evaluate(data, model, out, *arguments):
    return CliRunner().invoke(
        main, ['evaluate', str(data), '--model', model, '--out', str(out), *map(str, arguments)])


@pytest.mark.parametrize('scorers, model', [
    ('relevance,cls-attention,random', 'relevance_spot_vit_pico_patch8_64'),
    ('random', 'spot_vit_pico_patch8_64'),
])
def test_the_default_model_has_the_scorer(tmp_path, monkeypatch, scorers, model):
    def stop(name):
        raise ValueError(f'asked for {name}')

    monkeypatch.setattr('timm_spot.cli.evaluate.create_any_model', stop)
    result = CliRunner().invoke(main, ['evaluate', '--scorers', scorers, '--out', str(tmp_path)])
    assert f'asked for {model}\n' in result.output


@pytest.mark.parametrize('arguments, says', [
    (['--budgets', '9,x'], 'budgets=x must be a whole number of at least 1'),
    (['--budgets', '9,4097', '--samplers', 'uniform'], 'n_tokens=4097 exceeds the 64 x 64 pixels'),
    (['--seeds', '0,-1'], 'seeds=-1 must be a whole number of at least 0'),
    (['--device', 'cuda:99'], "device='cuda:99'"),
    (['--oracle', 'isotopic'], "did you mean 'isotropic'"),
    (['--knn', '{data}', '--knn-k', '31'], 'k=31 must lie between 1 and the 30 images'),
    (['--baselines', 'drop'], "unknown 'drop'"),
    (['--baselines', 'low-res', '--budgets', '24'], 'n_tokens=24 is no patch grid'),
    (['--budgets', '9,100'], "n_tokens=100 exceeds the 8 x 8 patches that sampler 'grid' finds"),
    (['--samplers', 'isotopic'], "did you mean 'isotropic'"),
    (['--model', 'resnet1'], 'unknown model resnet1'),
    (['--saliency', 'nowhere'], "saliency='nowhere'"),
    (['--scorers', 'norm,cls'], "scorers=norm,cls has the unknown 'cls': relevance, random, norm"),
    (['--scorers', 'norm', '--keep-rates', '0.5,0'], 'keep_rates=0 must be a number above 0 and at most 1'),
    (['--scorers', 'norm', '--keep-rates', '0.5,half'], 'keep_rates=half must be a number'),
    (['--scorers', 'relevance'], "'relevance' needs trained predictors"),
    (['--keep-rates', '0.5'], 'keep_rates=0.5 need scorers'),
])
def test_errors_come_before_any_work(folder, saved, tmp_path, arguments, says):
    result = evaluate(folder, saved, tmp_path / 'out', *(a.format(data=folder) for a in arguments))
    assert result.exit_code != 0 and says in result.output, result.output
    assert not (tmp_path / 'out').exists()


def test_a_folder_that_cannot_be_written(folder, saved, tmp_path):
    (tmp_path / 'file').write_text('')
    result = evaluate(folder, saved, tmp_path / 'file' / 'out', *ARGUMENTS)
    assert result.exit_code == 1 and 'file' in result.output and 'Traceback' not in result.output


def study(*arguments):
    return CliRunner().invoke(main, ['study', *map(str, arguments)])


def test_study(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, 'SEARCH', dict(steps=1, lr=1e-2, record=False))
    result = study('saliency', '--images', 5, '--budgets', '4', '--out', tmp_path / 'out')
    assert result.exit_code == 0, result.output
    assert '| shipped | after - before | 4 |' in result.output
    assert (tmp_path / 'out' / 'saliency.md').read_text() == result.output
    assert (tmp_path / 'out' / 'saliency.png').stat().st_size > 0


def test_study_of_a_folder_with_a_model_of_ones_own(folder, saved, tmp_path):
    result = study('priors', folder, '--model', saved, '--budgets', '4', '--images', 10, '--out', tmp_path / 'out')
    assert result.exit_code == 0, result.output
    assert f'| {saved} | center - isotropic | 4 |' in result.output


@pytest.mark.parametrize('arguments, says', [
    (['nothing'], "name='nothing' is no study"),
    (['priors', 'no/folder'], 'no/folder'),
    (['priors', '--device', 'cuda:99'], "device='cuda:99'"),
])
def test_study_says_what_is_wrong(tmp_path, arguments, says):
    result = study(*arguments, '--out', tmp_path / 'out')
    assert result.exit_code != 0 and says in result.output and 'Traceback' not in result.output
    assert not (tmp_path / 'out').exists()


def test_a_row_for_each_coverage_computed_once(folder, saved, tmp_path):
    arguments = ('--samplers', 'isotropic,coarse+center', '--budgets', '4', '--oracle', 'isotropic')
    result = evaluate(folder, saved, tmp_path / 'out', *arguments, '--coverages', '0,1')
    assert result.exit_code == 0 and '6 rows computed, 0 found' in result.output, result.output
    for part in ('isotropic, coverage 1', 'coarse+center, coverage 1', 'oracle isotropic, coverage 1'):
        assert part in result.output
    result = evaluate(folder, saved, tmp_path / 'out', *arguments, '--coverages', '1,0.5')
    assert result.exit_code == 0 and '3 rows computed, 3 found' in result.output, result.output
    # The model's own coverage, which is 0.
    assert '0 rows computed, 3 found' in evaluate(folder, saved, tmp_path / 'out', *arguments).output


def test_an_exported_file_stands_in_the_same_tables(folder, saved, tmp_path):
    assert run('export', saved, tmp_path / 'm.onnx').exit_code == 0
    result = evaluate(
        folder, saved, tmp_path / 'out', '--model', tmp_path / 'm.onnx', '--samplers', 'isotropic', '--budgets', '4,9')
    assert result.exit_code == 0 and '4 rows computed' in result.output, result.output
    results, problems = read_results(tmp_path / 'out')
    assert problems == [] and {r.row.model for r in results} == {saved, str(tmp_path / 'm.onnx')}
    for n in (4, 9):
        one, other = (r for r in results if r.row.n_tokens == n)
        assert (one.gflops, one.row.sampler, one.row.kind) == (other.gflops, other.row.sampler, other.row.kind)
        assert one.estimates['top1'] == other.estimates['top1']
    result = evaluate(folder, saved, tmp_path / 'out', '--model', tmp_path / 'm.onnx', '--samplers', 'isotropic',
                      '--budgets', '4')
    assert '0 rows computed, 2 found' in result.output, result.output


def test_one_value_is_given_as_to_other_commands(folder, saved, tmp_path):
    arguments = ('evaluate', folder, '--model', saved)
    run(*arguments, '--samplers', 'uniform', '--budgets', '4', '--seeds', '3', '--out', tmp_path / 'list')
    result = run(*arguments, '--sampler', 'uniform', '--n-tokens', 4, '--seed', 3, '--out', tmp_path / 'one')
    assert result.exit_code == 0, result.output
    assert [r.row for r in read_results(tmp_path / 'one')[0]] == [r.row for r in read_results(tmp_path / 'list')[0]]
