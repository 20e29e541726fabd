from __future__ import annotations

from timm_spot.tasks.evaluation.metrics import Estimate
from timm_spot.tasks.evaluation.report.tables import (
    BY_BUDGET,
    BY_KEEP_RATE,
    gap_closed,
    groups,
    html_details,
    html_table,
    label,
    markdown_table,
)
from timm_spot.tasks.evaluation.rows import Result, Row


def result(sampler, n_tokens=9, top1=50., kind='sampler', knn=None, **fields):
    row = Row(kind, 'digits', 'f6ce', 'validation', 'pico', '7fc4', sampler, n_tokens, **fields)
    estimates = {} if top1 is None else {'top1': Estimate(top1, 1.5, None)}
    if knn is not None:
        estimates['knn_top1'] = Estimate(knn, 0.25, 0.125)
    return Result(row, 30, 0, 0.021, estimates, 10.)


def test_a_table_by_hand():
    results = [
        result('grid', 9, 50.), result('grid', 25, 60.), result('sobol', 9, 55.04, knn=40.),
        result('oracle grid', 9, 99., kind='oracle'), result('sobol', 25, None)]
    assert markdown_table(results, BY_BUDGET).splitlines() == [
        '| placement | 9: top-1 | 9: kNN | 25: top-1 |',
        '| --- | --- | --- | --- |',
        '| grid | 50.0 ± 1.5 |  | **60.0** ± 1.5 |',
        '| sobol | **55.0** ± 1.5 | **40.0** ± 0.2 |  |',
        '| oracle grid | 99.0 ± 1.5 |  |  |']  # it sees the labels, and does not compete


def test_an_oracle_as_good_as_the_best_is_not_bold():
    results = [result('grid', 9, 60.), result('oracle grid', 9, 60., kind='oracle')]
    assert markdown_table(results, BY_BUDGET).splitlines()[2:] == [
        '| grid | **60.0** ± 1.5 |', '| oracle grid | 60.0 ± 1.5 |']


def test_the_share_of_the_oracle_gap_stands_beside_the_budget():
    results = [
        result('isotropic', 9, 60.), result('salient', 9, 70.), result('density', 9, 90., kind='placer'),
        result('oracle isotropic', 9, 100., kind='oracle'), result('isotropic', 25, 90.), result('salient', 25, 80.)]
    assert markdown_table(results, BY_BUDGET).splitlines() == [
        '| placement | 9: top-1 | 9: of the oracle gap | 25: top-1 |',
        '| --- | --- | --- | --- |',
        '| isotropic | 60.0 ± 1.5 | 0 % | **90.0** ± 1.5 |',
        '| salient | 70.0 ± 1.5 | 25 % | 80.0 ± 1.5 |',
        '| density | **90.0** ± 1.5 | 75 % |  |',
        '| oracle isotropic | 100.0 ± 1.5 | 100 % |  |']
    other = result('oracle isotropic', 9, 100., kind='oracle', coverage=1.)  # another way to go
    assert gap_closed(results[1], [results[0], other]) is None
    for best in (50., 60.):  # no better than the lattice
        assert gap_closed(results[1], [results[0], result('oracle isotropic', 9, best, kind='oracle')]) is None


def test_rows_are_told_by_their_kind_not_by_their_name():
    # A sampler may have any name.
    best = result('oracle of Delphi', 9, 70.)
    assert '| oracle of Delphi | **70.0** ± 1.5 |' in markdown_table([result('grid'), best], BY_BUDGET)
    twins = [result('regions', 9, kind='regions'), result('regions', 9, kind='sampler')]
    assert [label(one, twins, BY_BUDGET) for one in twins] == ['regions (regions)', 'regions (sampler)']


def test_a_table_of_keep_rates_by_hand():
    results = [
        result('grid', 64, 90., scorer='norm', keep_rate=rate, stages=(1, 2)) for rate in (0.5, 1.)] + [
        result('grid', 64, 95., scorer='random', keep_rate=0.5, stages=(1, 2))]
    assert groups([*results, result('grid')]) == [(BY_BUDGET, [result('grid')]), (BY_KEEP_RATE, results)]
    assert markdown_table(results, BY_KEEP_RATE).splitlines() == [
        '| scorer | keep 1.0: top-1 | keep 0.5: top-1 |',
        '| --- | --- | --- |',
        '| norm, 64 grid | **90.0** ± 1.5 | 90.0 ± 1.5 |',
        '| random, 64 grid |  | **95.0** ± 1.5 |']


def test_rows_of_one_place_are_told_apart_by_what_differs():
    results = [result('grid', seeds=(0,)), result('grid', seeds=(0, 1), amp='bfloat16'), result('sobol')]
    assert [label(one, results, BY_BUDGET) for one in results] == ['grid (0, none)', 'grid (0 1, bfloat16)', 'sobol']


def test_a_bar_in_a_name_does_not_end_a_cell_of_markdown():
    assert '| a\\|b | **50.0** ± 1.5 |' in markdown_table([result('a|b')], BY_BUDGET)


def test_labels_are_escaped_in_html():
    results = [result('<script>&"'), result('norm', scorer='<i>', keep_rate=0.5)]
    for page in (html_table(results[:1], BY_BUDGET), html_details(results)):
        assert '<td>&lt;script&gt;&amp;&quot;' in page and '<script' not in page
    for page in (html_table(results[1:], BY_KEEP_RATE), html_details(results)):
        assert '<td>&lt;i&gt;, 9 norm' in page and '<i>' not in page


def test_details_have_every_measure_with_its_errors():
    page = html_details([result('grid', knn=40.)])
    head = '<th>placement</th><th>tokens</th><th>top-1, %</th><th>kNN, %</th><th>GFLOPs</th><th>images/s</th>'
    assert head in page
    assert ('<td>grid</td><td>9</td><td>50.00 <small>± 1.50</small></td>'
            '<td>40.00 <small>± 0.25</small> <small>± 0.12 (seeds)</small></td><td>0.02</td><td>10.00</td>') in page


def test_a_model_without_a_budget():
    one = result('as it is', None, kind='as it is')
    assert '| placement | all: top-1 |' in markdown_table([one], BY_BUDGET)
