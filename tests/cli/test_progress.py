from __future__ import annotations

from timm_spot.cli import progress


def test_off_a_terminal_a_line_now_and_then(capsys, monkeypatch):
    now = [0.]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    with progress.show_progress(100, 'oracle') as bar:
        for now[0] in (1., 9., 10., 11., 19., 21.):
            bar.update(5, 'row')
    assert capsys.readouterr().err.splitlines() == ['oracle: 15 of 100, row', 'oracle: 30 of 100, row']


def test_a_short_run_says_nothing(capsys):
    with progress.show_progress(2, 'oracle') as bar:
        bar.update(2)
    assert capsys.readouterr() == ('', '')


def test_only_one_process_shows_its_progress(capsys, monkeypatch):
    monkeypatch.setattr(progress, 'EVERY', 0.)
    with progress.show_progress(2, 'evaluate', shown=False) as bar:
        bar.update(2)
    assert capsys.readouterr() == ('', '')


def test_on_a_terminal_the_row_is_named(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, 'isatty', lambda: True)
    with progress.show_progress(2, 'evaluate') as bar:
        bar.update(1, 'grid, 25 tokens')
    error = capsys.readouterr().err
    assert 'evaluate' in error and '1/2' in error and 'grid, 25 tokens' in error
