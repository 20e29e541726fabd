"""Files of results: rows appended one by one, so that a kill loses at most the row in work.

`results.csv` holds what was measured, `speed.csv`, of the same keys, what no two runs measure alike. Files of version
0.1, without the columns `kind` and `settings`, load, and are brought to today's columns before a row is added.
"""
from __future__ import annotations

import csv
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple, TypeVar

from ..kept import write_whole
from .rows import COLUMNS, NEW_COLUMNS, SPEED_COLUMNS, Result, Row

RESULTS, SPEED = 'results.csv', 'speed.csv'
_T = TypeVar('_T')


class _Table(NamedTuple):
    """A file as it was read.

    Attributes:
        lines: Its rows, by column, with what they say.
        problems: What cannot be read, named.
        is_current: Whether it holds nothing but whole lines of today's columns.
    """

    lines: List[Tuple[Dict[str, str], object]]
    problems: List[str]
    is_current: bool


def read_results(out: Path) -> Tuple[List[Result], List[str]]:
    """All results in a folder with their speeds, and what is wrong with the files.

    Of several of one row the last counts. Nothing is written.

    Raises:
        ValueError: A file has other columns.
    """
    table, speed = _read(out / RESULTS, COLUMNS, Result.from_cells), _read(out / SPEED, SPEED_COLUMNS, _speed)
    speeds = dict(found for _, found in speed.lines)
    results = {found.row: replace(found, images_per_s=speeds.get(found.row)) for _, found in table.lines}
    lost = sum(result.images_per_s is None for result in results.values())
    problems = table.problems + speed.problems
    if lost:
        problems.append(f'{out / SPEED} lacks {lost} of {len(results)} rows: their speeds are not known.')
    return list(results.values()), problems


def repair_files(out: Path) -> List[str]:
    """Bring the files to today's columns and whole lines, so that rows can be appended; needs the folder's lock.

    Returns:
        What was repaired: lines that could not be read are gone, and their rows are computed again.

    Raises:
        ValueError: A file has other columns.
    """
    problems = []
    tables = [
        (out / name, columns, _read(out / name, columns, parse))
        for name, columns, parse in ((RESULTS, COLUMNS, Result.from_cells), (SPEED, SPEED_COLUMNS, _speed))]
    for path, columns, table in tables:
        if not table.is_current:
            rows = [dict(cells, **{name: Row.from_cells(cells).to_cells()[name] for name in NEW_COLUMNS})
                    for cells, _ in table.lines]
            write_whole(path, _to_csv(columns, rows, header=True))
        problems += table.problems
    return problems


def append_result(out: Path, result: Result) -> None:
    """Append a result to both files, each in one write, on the disk when this returns."""
    # The result comes last: whoever has it has the speed as well.
    _append(out / SPEED, SPEED_COLUMNS, dict(result.row.to_cells(), images_per_s=f'{result.images_per_s:.1f}'))
    _append(out / RESULTS, COLUMNS, result.to_cells())


def _speed(cells: Dict[str, str]) -> Tuple[Row, float]:
    return Row.from_cells(cells), float(cells['images_per_s'])


def _read(path: Path, columns: Sequence[str], parse: Callable[[Dict[str, str]], _T]) -> _Table:
    if not path.exists():
        return _Table([], [], True)
    *lines, rest = path.read_bytes().decode('utf-8', errors='replace').split('\n')
    problems = [f'{path}, line {len(lines) + 1}, was left unfinished.'] if rest else []
    if not lines:
        return _Table([], problems, not problems)
    header = _split(lines[0])
    if header != [name for name in columns if name in header or name not in NEW_COLUMNS]:
        raise ValueError(f'{path} has other columns, it is of another version or damaged: give another folder.')
    found, repeated = [], 0
    for number, line in enumerate(lines[1:], start=2):
        values = _split(line)
        if values == header:
            repeated += 1
            continue
        cells = dict(zip(header, values))
        try:
            if len(values) != len(header) or '\ufffd' in line:
                raise ValueError
            found.append((cells, parse(cells)))
        except ValueError:
            problems.append(f'{path}, line {number}, is damaged and does not count.')
    return _Table(found, problems, not problems and not repeated and tuple(header) == tuple(columns))


def _split(line: str) -> List[str]:
    try:
        return next(csv.reader([line.rstrip('\r')], strict=True), [])
    except csv.Error:
        return []


def _to_csv(columns: Sequence[str], rows: Sequence[Dict[str, str]], header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _append(path: Path, columns: Sequence[str], row: Dict[str, str]) -> None:
    header = not path.exists() or path.stat().st_size == 0
    with path.open('a', encoding='utf-8', newline='') as file:
        file.write(_to_csv(columns, [row], header))
        file.flush()
        os.fsync(file.fileno())
