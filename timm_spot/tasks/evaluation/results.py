"""Files of results: rows appended one by one, so that a kill loses at most the row in work."""
from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from . import prunings

RESULTS, SPEED = 'results.csv', 'speed.csv'
KEY = (
    'data', 'data_sha', 'split', 'model', 'weights', 'sampler', 'n_tokens', *prunings.COLUMNS, 'seeds', 'saliency',
    'knn', 'amp')
METRICS = ('top1', 'top5', 'nll', 'ece', 'knn_top1')
COLUMNS = (
    *KEY, 'images', 'skipped', *(f'{m}{suffix}' for m in METRICS for suffix in ('', '_se', '_se_seeds')), 'gflops')
SPEED_COLUMNS = (*KEY, 'images_per_s')

Row = Dict[str, str]


def read_rows(path: Path) -> List[Row]:
    """Rows of a CSV that `evaluate` appends to; a last line that a kill left unfinished is cut off the file."""
    if not path.exists():
        return []
    text = path.read_text(encoding='utf-8')
    whole = text[:text.rfind('\n') + 1]
    if whole != text:
        path.write_text(whole, encoding='utf-8')
    return list(csv.DictReader(io.StringIO(whole)))


def read_results(out: Path) -> List[Row]:
    """All rows in a folder, with their speeds."""
    speeds = {identity(row): row['images_per_s'] for row in read_rows(out / SPEED)}
    return [dict(row, images_per_s=speeds[identity(row)]) for row in read_rows(out / RESULTS)]


def identity(row: Row) -> Tuple[str, ...]:
    """What tells a row from all others."""
    return tuple(row[name] for name in KEY)


def append_row(path: Path, columns: Sequence[str], row: Row) -> None:
    """Append a row in one write, on the disk when this returns."""
    line = io.StringIO()
    writer = csv.DictWriter(line, columns, lineterminator='\n')
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerow(row)
    with path.open('a', encoding='utf-8') as file:
        file.write(line.getvalue())
        file.flush()
        os.fsync(file.fileno())
