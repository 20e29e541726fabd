from __future__ import annotations

from timm_spot.tasks.evaluation.results import (
    COLUMNS,
    KEY,
    SPEED_COLUMNS,
    append_row,
    identity,
    read_results,
    read_rows,
)


def row(**cells: str) -> dict:
    return {**dict.fromkeys(COLUMNS, ''), 'model': 'a, "b"', **cells}


def test_rows_come_back_as_they_were_appended(tmp_path):
    file = tmp_path / 'results.csv'
    for top1 in ('1.0', '2.0'):
        append_row(file, COLUMNS, row(top1=top1))
    assert file.read_text().count('data_sha') == 1  # one header
    assert read_rows(file) == [row(top1='1.0'), row(top1='2.0')]
    assert read_rows(tmp_path / 'none.csv') == []


def test_a_line_that_a_kill_left_unfinished_is_cut_off_the_file(tmp_path):
    file = tmp_path / 'results.csv'
    append_row(file, COLUMNS, row(top1='1.0'))
    whole = file.read_text()
    file.write_text(whole + 'digits,f6ce')
    assert read_rows(file) == [row(top1='1.0')]
    assert file.read_text() == whole
    file.write_text('data,data_')  # not even the header
    assert read_rows(file) == []


def test_a_row_has_its_speed(tmp_path):
    for sampler, speed in (('grid', '10.0'), ('sobol', '20.0')):
        key = {name: row(sampler=sampler)[name] for name in KEY}
        append_row(tmp_path / 'speed.csv', SPEED_COLUMNS, {**key, 'images_per_s': speed})
    append_row(tmp_path / 'results.csv', COLUMNS, row(sampler='sobol', top1='1.0'))
    found, = read_results(tmp_path)
    assert found['images_per_s'] == '20.0' and found['top1'] == '1.0'
    assert identity(found) == identity(row(sampler='sobol', top1='2.0')) != identity(row(sampler='grid'))
