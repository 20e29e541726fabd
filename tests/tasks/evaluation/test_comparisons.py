from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_spot.tasks.evaluation.comparisons import (
    Comparison,
    compare,
    correct_for_number,
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
    assert Comparison('m', 'a - b', 9, 2., 1., 0.5).finding == 'a'
    assert Comparison('m', 'a - b', 9, -2., 1., 0.5).finding == 'b'
    assert Comparison('m', 'a - b', 9, 1., 1., 0.5).finding == 'neither'


def test_difference_and_interval_by_hand():
    scores = {'a': torch.tensor([1, 1, 1, 0]), 'b': torch.tensor([0, 0, 1, 0])}
    found = compare('m', 'a - b', 9, scores)
    assert found.difference == 50.
    assert found.interval == pytest.approx(100 * 1.96 * (1 / 3) ** 0.5 / 2)


def test_a_table_line_for_each_comparison():
    table = format_study([Comparison('a|b', 'x - y', 9, 1.25, 0.5, 0.03), Comparison('m', 'x - y', 16, -2., 3., 0.01)])
    assert table.splitlines()[2:] == [
        '| a\\|b | x - y | 9 | +1.2 ± 0.5 | 0.0300 | x | x |',
        '| m | x - y | 16 | -2.0 ± 3.0 | 0.0100 | neither | y |']


def test_one_of_many_comparisons_needs_more():
    """p = 0.03 alone is a finding, as one of two of its size none: twice 0.03 is above 0.05."""
    line = Comparison('m', 'x - y', 9, 1., 0.5, 0.03)
    assert format_study([line]).endswith('| x | x |')
    assert format_study([line, line]).endswith('| x | neither |')


def test_correction_by_hand():
    assert correct_for_number([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3, then 2 times, then the last
    assert correct_for_number([0.9, 0.8]) == [1., 1.]
    assert correct_for_number([]) == []


@given(st.lists(st.floats(0., 1.), min_size=1, max_size=20))
def test_correction_keeps_the_order_and_lowers_nothing(p):
    corrected = correct_for_number(p)
    assert all(before <= after <= 1. for before, after in zip(p, corrected))
    assert all(corrected[i] <= corrected[j] for i in range(len(p)) for j in range(len(p)) if p[i] < p[j])


def test_a_dollar_in_a_name_is_a_letter(tmp_path):
    draw_study([Comparison('$a^$', '$x_$ - $y$', 9, 1., 0.5, 0.01)]).savefig(tmp_path / 'study.png')
    assert (tmp_path / 'study.png').stat().st_size > 0
