from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from timm_spot.tasks.evaluation.metrics import Estimate
from timm_spot.tasks.evaluation.results import append_result, read_results, repair_files
from timm_spot.tasks.evaluation.rows import COLUMNS, NEW_COLUMNS, SPEED_COLUMNS, Result, Row

OLD = Path(__file__).parents[2] / 'data' / 'evaluation_0.1'  # written by version 0.1


def result(sampler: str = 'grid', top1: float = 50., speed: float = 10.) -> Result:
    row = Row('sampler', 'digits', 'f6ce', 'validation', 'a, "b"', '7fc4', sampler, 9, seeds=(0, 1), settings='12ab')
    return Result(row, 30, 1, 0.021, {'top1': Estimate(top1, 1.5, 0.25), 'nll': Estimate(1.25, 0.5, None)}, speed)


def header(file: Path) -> list:
    return next(csv.reader(file.read_text().splitlines()))


def _cells(file: Path) -> csv.DictReader:
    return csv.DictReader(file.read_text().splitlines())


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD, tmp_path / 'old')
    return tmp_path / 'old'


def test_results_come_back_as_they_were_appended(tmp_path):
    for one in (result('grid'), result('sobol', 60., 20.)):
        append_result(tmp_path, one)
    assert (tmp_path / 'results.csv').read_text().count('data_sha') == 1  # one header
    assert read_results(tmp_path) == ([result('grid'), result('sobol', 60., 20.)], [])
    assert read_results(tmp_path / 'none') == ([], [])


def test_of_two_results_of_one_row_the_last_counts(tmp_path):
    for one in (result(top1=1.), result('sobol'), result(top1=2., speed=30.)):
        append_result(tmp_path, one)
    found, problems = read_results(tmp_path)
    assert (found, problems) == ([result(top1=2., speed=30.), result('sobol')], [])


def test_a_line_that_a_kill_left_unfinished_is_named_and_goes(tmp_path):
    append_result(tmp_path, result())
    file = tmp_path / 'results.csv'
    whole = file.read_bytes()
    file.write_bytes(whole + b'digits,f6ce')
    found, problems = read_results(tmp_path)
    assert found == [result()] and 'results.csv, line 3, was left unfinished' in problems[0]
    assert file.read_bytes() != whole  # reading repairs nothing
    assert repair_files(tmp_path) == problems
    assert file.read_bytes() == whole and repair_files(tmp_path) == []


@pytest.mark.parametrize('left', [b'', b'data,data_'])
def test_a_file_that_a_kill_left_without_a_header(tmp_path, left):
    (tmp_path / 'results.csv').write_bytes(left)
    repair_files(tmp_path)
    append_result(tmp_path, result())
    assert read_results(tmp_path) == ([result()], [])


@pytest.mark.parametrize('damage', [
    b'digits,f6ce,valdigits,f6ce,validation,a,7fc4,grid,9\n',  # two runs wrote at once
    b'\x00' * 40 + b'\n', b'\xff\xfe\x00\n', b'"never closed\n', b'\n'])
def test_a_damaged_line_among_whole_ones_is_named_and_goes(tmp_path, damage):
    append_result(tmp_path, result('grid'))
    file = tmp_path / 'results.csv'
    file.write_bytes(file.read_bytes() + damage)
    append_result(tmp_path, result('sobol'))
    problem, = repair_files(tmp_path)
    assert 'results.csv, line 3, is damaged' in problem
    assert read_results(tmp_path) == ([result('grid'), result('sobol')], [])


@pytest.mark.parametrize('column, value', [('top1', '5o'), ('n_tokens', 'x'), ('images', ''), ('top1_se', '')])
def test_a_number_that_is_none_makes_a_damaged_line(tmp_path, column, value):
    append_result(tmp_path, result())
    file = tmp_path / 'results.csv'
    row, = csv.DictReader(file.read_text().splitlines())
    with file.open('w') as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerow({**row, column: value})
    assert read_results(tmp_path)[0] == [] and 'line 2, is damaged' in repair_files(tmp_path)[0]


def test_a_second_header_goes(tmp_path):
    append_result(tmp_path, result())
    file = tmp_path / 'results.csv'
    whole = file.read_text()
    file.write_text(whole.splitlines(keepends=True)[0] + whole)
    assert repair_files(tmp_path) == [] and file.read_text() == whole


def test_a_lost_speed_is_named_and_not_invented(tmp_path):
    append_result(tmp_path, result('grid'))
    (tmp_path / 'speed.csv').unlink()
    append_result(tmp_path, result('sobol'))
    found, problems = read_results(tmp_path)
    assert [one.images_per_s for one in found] == [None, 10.]
    assert 'speed.csv lacks 1 of 2 rows' in problems[0]


def test_other_columns_are_refused(tmp_path):
    (tmp_path / 'speed.csv').write_text('data,sampler,top1\ndigits,grid,50.0\n')
    for function in (read_results, repair_files):
        with pytest.raises(ValueError, match=r'speed\.csv has other columns'):
            function(tmp_path)


def test_files_of_version_0_1_load_and_are_left_as_they_are(old):
    found, problems = read_results(old)
    assert problems == [] and len(found) == 14
    assert [one.row.kind for one in found] == [
        *['sampler'] * 3, 'oracle', 'baseline', *['sampler'] * 4, 'regions', 'regions', 'as it is', *['baseline'] * 2]
    oracle = found[3]
    assert oracle.row.sampler == 'oracle isotropic' and not oracle.row.competes and found[0].row.competes
    assert oracle.estimates['top1'] == Estimate(92.3398, 0.4946, None) and oracle.images_per_s > 0
    drawn = found[8].row
    assert (drawn.scorer, drawn.keep_rate, drawn.stages, drawn.seeds) == ('random', 0.5, (1, 2, 3), (0, 1))
    for name in ('results.csv', 'speed.csv'):
        assert (old / name).read_bytes() == (OLD / name).read_bytes()


def test_files_of_version_0_1_are_continued(old):
    before = read_results(old)[0]
    assert repair_files(old) == []
    for name, columns in (('results.csv', COLUMNS), ('speed.csv', SPEED_COLUMNS)):
        assert header(old / name) == list(columns)
        kept = [{k: v for k, v in row.items() if k not in NEW_COLUMNS} for row in _cells(old / name)]
        assert kept == list(_cells(OLD / name))  # figures to the letter
    append_result(old, result())
    assert read_results(old) == ([*before, result()], [])
