from __future__ import annotations

import pytest
import torch

from timm_spot.tasks.evaluation.comparisons import (
    Comparison,
    compare,
    draw_study,
    format_study,
    permutation_test,
    saliency_percentiles,
)


def test_percentiles_by_hand():
    maps = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.5], [0.5, 0.5]]])
    assert saliency_percentiles(maps).tolist() == [[[12.5, 37.5], [62.5, 87.5]], [[50., 50.], [50., 50.]]]


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
    found = compare('m', 'a - b', 9, scores)
    assert found.difference == 50.
    assert found.interval == pytest.approx(100 * 1.96 * (1 / 3) ** 0.5 / 2)


def test_a_table_line_for_each_comparison():
    table = format_study([Comparison('a|b', 'x - y', 9, 1.25, 0.5), Comparison('m', 'x - y', 16, -2., 3., 0.04)])
    assert table.splitlines()[2:] == [
        '| a\\|b | x - y | 9 | +1.2 ± 0.5 | x |', '| m | x - y | 16 | -2.0 ± 3.0 (p = 0.0400) | neither |']


def test_a_dollar_in_a_name_is_a_letter(tmp_path):
    draw_study([Comparison('$a^$', '$x_$ - $y$', 9, 1., 0.5)]).savefig(tmp_path / 'study.png')
    assert (tmp_path / 'study.png').stat().st_size > 0
