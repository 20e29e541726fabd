from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import timm_spot
from timm_spot.tasks.evaluation.metrics import Estimate
from timm_spot.tasks.evaluation.report.page import write_report
from timm_spot.tasks.evaluation.results import append_result
from timm_spot.tasks.evaluation.rows import Result, Row
from timm_spot.tasks.pictures.datasets import Pictures

CPU = torch.device('cpu')


def result(sampler='grid', model='pico', top1=50., **fields):
    row = Row(**{**dict(
        kind='sampler', data='digits', data_sha='f6ce', split='validation', model=model, weights='7fc4',
        sampler=sampler, n_tokens=9), **fields})
    return Result(row, 3590, 2, 0.021, {'top1': Estimate(top1, 1.5, None)}, 10.)


@pytest.fixture(scope='module')
def digits():
    return Pictures('digits')


def report(folder, results, models=None, pictures=None):
    for one in results:
        append_result(folder, one)
    problems = write_report(folder, models or {}, pictures, CPU)
    return (folder / 'results.md').read_text(), (folder / 'report.html').read_text(), problems


def test_it_says_of_what_and_by_whom(tmp_path):
    table, page, problems = report(tmp_path, [result(), result('sobol')])
    for text in (table, page):
        assert 'digits, validation (digest f6ce), 3,590 images, 2 more could not be read' in text
        assert f'timm_spot {timm_spot.__version__}' in text and f'torch {torch.__version__}' in text
        assert re.search(r'Written \d{4}-\d\d-\d\d \d\d:\d\d UTC', text)
        assert 'Device of the last run: cpu (' in text
    assert problems == []


def test_several_data_sets_are_all_named(tmp_path):
    table, _, _ = report(tmp_path, [result(), result(data='<b>&', data_sha='0a1b')])
    assert 'digits, validation (digest f6ce)' in table and '<b>&, validation (digest 0a1b)' in table


def test_names_are_escaped_wherever_they_stand(tmp_path):
    hostile = '<img src=x onerror=alert(1)>'
    _, page, _ = report(tmp_path, [
        result(sampler=f'{hostile}1', model=f'{hostile}2', data=f'{hostile}3', split=f'{hostile}4'),
        result(sampler=f'{hostile}1', model=f'{hostile}2', data=f'{hostile}3', split=f'{hostile}5')])
    assert '<img' not in page and '<h2>&lt;img src=x' in page and '<td>&lt;img src=x' in page
    assert page.count('&lt;img src=x onerror=alert(1)&gt;3') >= 2  # the line that names the data sets


@pytest.mark.parametrize('name', ['$x^$', '$', '100 $ or 90 $'])
def test_a_dollar_does_not_break_the_report(tmp_path, name):
    table, page, _ = report(tmp_path, [result(name, model=f'{name}m')])
    assert f'| {name} | **50.0** ± 1.5 |' in table and page.count('<svg') == 2


def test_a_row_without_speed_is_reported_without_it(tmp_path):
    append_result(tmp_path, result())
    (tmp_path / 'speed.csv').unlink()
    table, page, problems = report(tmp_path, [])
    assert '| grid | **50.0** ± 1.5 |' in table and page.count('<svg') == 1 and 'images/s' not in page
    assert 'speed.csv lacks 1 of 1 rows' in problems[0]


def test_pictures_show_the_placements_of_samplers_only(tmp_path, pico, digits):
    append_result(tmp_path, result(n_tokens=16))  # the smallest budget is shown
    kinds = dict(grid='sampler', sobol='sampler', **{'oracle grid': 'oracle', 'top-k': 'baseline'})
    _, page, _ = report(
        tmp_path, [result(sampler, kind=kind) for sampler, kind in kinds.items()], {'pico': pico}, digits)
    assert re.findall(r'<img alt="([^"]*)"', page) == [
        'grid on picture 0', 'sobol on picture 0', 'grid on picture 1', 'sobol on picture 1']
    assert '<h3>Placements of 9 tokens</h3>' in page


def test_a_sampler_of_an_earlier_run_that_is_gone_is_named(tmp_path, pico, digits):
    _, page, _ = report(tmp_path, [result('<mine>'), result('grid')], {'pico': pico}, digits)
    assert page.count('<img') == 2
    assert '<figcaption>&lt;mine&gt;</figcaption>sampler=&#x27;&lt;mine&gt;&#x27; is unknown' in page
    gone = dataclasses.replace(result('salient').row, saliency=str(tmp_path / 'gone'))
    _, page, _ = report(tmp_path, [dataclasses.replace(result(), row=gone)], {'pico': pico}, digits)
    assert page.count('<img') == 2 and 'none of' in page


def test_the_report_appears_whole(tmp_path, monkeypatch):
    report(tmp_path, [result()])
    before = (tmp_path / 'report.html').read_text()
    monkeypatch.setattr('timm_spot.tasks.evaluation.report.page.html_details', lambda results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(tmp_path, [result('sobol')])
    assert (tmp_path / 'report.html').read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'report.html', 'results.csv', 'results.md', 'speed.csv']
