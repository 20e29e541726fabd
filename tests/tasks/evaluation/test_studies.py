from __future__ import annotations

import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import SMALL

from timm_spot.cli import main
from timm_spot.tasks.evaluation import studies
from timm_spot.tasks.evaluation.studies import Comparison, permutation_test, saliency_percentiles


@pytest.fixture
def models():
    """Two small models with random weights."""
    made = {}
    for seed in range(2):
        torch.manual_seed(seed)
        made[f'seed {seed}'] = timm.create_model('spot_vit_pico_patch8_64', **SMALL).eval()
    return made


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(studies, 'BUDGETS', (4, 9))
    monkeypatch.setattr(studies, '_SEARCH', dict(steps=1, lr=1e-2, record=False))
    return studies.draw_study_canvases(12)


def test_percentiles_by_hand():
    maps = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.5], [0.5, 0.5]]])
    assert saliency_percentiles(maps).tolist() == [[[12.5, 37.5], [62.5, 87.5]], [[50., 50.], [50., 50.]]]


def test_percentile_under_a_token():
    percentiles = torch.tensor([[[10., 20.], [30., 40.]]])
    positions = torch.tensor([[[0.25, 0.75], [0.75, 0.25], [1.2, 0.9]]])  # the last one has left the image
    assert studies._under(percentiles, positions).item() == pytest.approx((20 + 30 + 40) / 300)


def test_permutation_test():
    assert permutation_test(torch.ones(20)) == pytest.approx(1e-4, abs=2e-4)
    assert permutation_test(torch.tensor([1., -1.] * 10)) == 1.
    # All signs of (1, 2, 3): only +++ and --- reach the observed mean, 2 of 8.
    assert permutation_test(torch.tensor([1., 2., 3.])) == pytest.approx(0.25, abs=0.02)


def test_a_comparison_says_what_is_larger():
    assert Comparison('m', 'a - b', 9, 2., 1.).finding == 'a'
    assert Comparison('m', 'a - b', 9, -2., 1.).finding == 'b'
    assert Comparison('m', 'a - b', 9, 1., 1.).finding == 'neither'


def test_difference_and_interval_by_hand():
    scores = {'a': torch.tensor([1, 1, 1, 0]), 'b': torch.tensor([0, 0, 1, 0])}
    found = studies._compare('m', 'a - b', 9, scores)
    assert found.difference == 50.
    assert found.interval == pytest.approx(100 * 1.96 * (1 / 3) ** 0.5 / 2)


@pytest.mark.parametrize('name, count', [('grids', 4), ('priors', 4), ('saliency', 1), ('transfer', 2)])
def test_every_study_compares_each_model_at_each_budget(models, small, tmp_path, name, count):
    found = studies.STUDIES[name](models, small, tmp_path)
    assert len(found) == count * 2 * 2
    assert {(c.model, c.n_tokens) for c in found} == {(m, n) for m in models for n in (4, 9)}
    assert all(c.interval >= 0 for c in found)
    assert len(studies.format_study(found).splitlines()) == len(found) + 2


def test_a_model_transfers_to_itself(models, small, tmp_path):
    one = models['seed 0']
    found = studies.study_transfer({'one': one, 'twin': one}, small, tmp_path)
    assert {c.difference for c in found if c.what == "own oracle - other's oracle"} == {0.}


def test_transfer_needs_two_models(models, small, tmp_path):
    with pytest.raises(ValueError, match='needs a second, independently trained model'):
        studies.study_transfer({'one': models['seed 0']}, small, tmp_path)


def test_command(small, tmp_path):
    result = CliRunner().invoke(main, ['study', 'saliency', '--images', '5', '--out', str(tmp_path / 'out')])
    assert result.exit_code == 0, result.output
    assert '| shipped | after - before | 4 |' in result.output
    assert (tmp_path / 'out' / 'saliency.md').read_text() == result.output
    assert (tmp_path / 'out' / 'saliency.png').stat().st_size > 0
