"""Tables of results: by placement and budget, or by scorer and keep rate, in Markdown and HTML."""
from __future__ import annotations

import html
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from ..metrics import Estimate
from ..rows import ORACLE, SAMPLER, Result, Row

SHOWN = ('top1', 'knn_top1')  # in the table of a model; all measures have one of their own
TITLES = dict(
    top1='top-1, %', top5='top-5, %', nll='NLL, nats', ece='calibration error, %', knn_top1='kNN, %',
    gflops='GFLOPs', images_per_s='images/s')
_SHORT = dict(top1='top-1', knn_top1='kNN', gap='of the oracle gap')
# What may tell rows of one table apart beside placement and budget.
_DETAILS = ('data', 'split', 'data_sha', 'weights', 'stages', 'seeds', 'saliency', 'knn', 'amp', 'settings', 'kind')

_CONDITIONS = ('data_sha', 'split', 'weights', 'n_tokens', 'amp', 'coverage', 'scorer', 'keep_rate', 'share')
GAP = 'gap'  # a column of the table by budget, where an oracle was run

Value = Union[int, float, None]


class Grouping(NamedTuple):
    """What the columns of a table are.

    Attributes:
        column: From a result to its column.
        place: From a row to what it has beside its column, the name of its line.
        head: First heading.
        title: From a column to its heading.
        descending: Order of the columns.
        x: What a plot of the group goes over, beside the speed.
    """

    column: Callable[[Result], Value]
    place: Callable[[Row], str]
    head: str
    title: Callable[[Value], str]
    descending: bool
    x: str


BY_BUDGET = Grouping(
    lambda result: result.row.n_tokens, lambda row: row.placement, 'placement',
    lambda n: 'all' if n is None else str(n), False, 'n_tokens')
BY_KEEP_RATE = Grouping(
    lambda result: result.row.keep_rate, lambda row: f'{row.scorer_name}, {_shown(row.n_tokens)} {row.placement}',
    'scorer', lambda rate: 'merged' if rate is None else f'keep {rate}', True, 'gflops')
BY_SHARE = Grouping(
    lambda result: result.row.share, lambda row: f'{row.scorer}, {_shown(row.n_tokens)} {row.placement}', 'scorer',
    lambda share: f'{share:g} of the multiply-adds', True, 'gflops')


def groups(results: Sequence[Result]) -> List[Tuple[Grouping, List[Result]]]:
    """Results of one model as they go into tables: those that drop no tokens, those that do, by rate and by cost."""
    parts = [
        (BY_BUDGET, [r for r in results if not r.row.scorer]),
        (BY_KEEP_RATE, [r for r in results if r.row.scorer and r.row.share is None]),
        (BY_SHARE, [r for r in results if r.row.scorer and r.row.share is not None])]
    return [part for part in parts if part[1]]


def value_of(result: Result, name: str) -> Optional[float]:
    """A measure, or a number of tokens, of a result; None where it has none."""
    if name == 'n_tokens':
        return result.row.n_tokens
    if name in ('gflops', 'images_per_s'):
        return getattr(result, name)
    estimate = result.estimates.get(name)
    return None if estimate is None else estimate.value


def lines_of(results: Sequence[Result], by: Grouping) -> Dict[str, Dict[Value, Result]]:
    """Results by the name of their line, then by their column."""
    found: Dict[str, Dict[Value, Result]] = {}
    for result in results:
        found.setdefault(label(result, results, by), {})[by.column(result)] = result
    return found


def label(result: Result, results: Sequence[Result], by: Grouping) -> str:
    """A row's placement or scorer, with whatever else tells it from other rows of the same place in the table."""
    def place(other: Result) -> tuple:
        return by.place(other.row), by.column(other)

    twins = [other.row for other in results if place(other) == place(result)]
    extra = [
        _shown(getattr(result.row, name)) or 'none' for name in _DETAILS
        if len({getattr(twin, name) for twin in twins}) > 1]
    return by.place(result.row) + (f" ({', '.join(extra)})" if extra else '')


def gap_closed(result: Result, results: Sequence[Result]) -> Optional[float]:
    """How much of the way from the even lattice to the oracle that starts on it a result has gone, in percent.

    None where one of the two is not among the results under the same conditions, or there is no way to go.
    """
    def find(kind: str, sampler: str) -> Optional[float]:
        found = [
            value_of(other, 'top1') for other in results if (other.row.kind, other.row.sampler) == (kind, sampler)
            and all(getattr(other.row, name) == getattr(result.row, name) for name in _CONDITIONS)]
        return found[0] if len(found) == 1 else None

    even, best, own = find(SAMPLER, 'isotropic'), find(ORACLE, 'oracle isotropic'), value_of(result, 'top1')
    if even is None or best is None or own is None or best <= even:
        return None
    return 100 * (own - even) / (best - even)


def markdown_table(results: Sequence[Result], by: Grouping) -> str:
    """The page's table in Markdown."""
    header, *lines = _table(results, by, lambda value: f'**{value}**', str)
    lines = [[line[0].replace('|', '\\|'), *line[1:]] for line in lines]
    return '\n'.join(f"| {' | '.join(line)} |" for line in [header, ['---'] * len(header), *lines])


def html_table(results: Sequence[Result], by: Grouping) -> str:
    """The page's table in HTML."""
    header, *lines = _table(results, by, lambda value: f'<b>{value}</b>', lambda error: f'<small>{error}</small>')
    return _html([[html.escape(name) for name in header], *([html.escape(line[0]), *line[1:]] for line in lines)])


def html_details(results: Sequence[Result]) -> str:
    """Every measure of every row."""
    measured = [name for name in TITLES if any(value_of(result, name) is not None for result in results)]
    lines = [['placement', 'tokens', *(TITLES[name] for name in measured)]]
    for by, group in groups(results):
        for result in group:
            keep = f', {by.title(by.column(result))}' if result.row.scorer else ''
            line = [html.escape(label(result, group, by) + keep), _shown(result.row.n_tokens)]
            lines.append(line + [_detail(result, name) for name in measured])
    return _html(lines)


def _table(
        results: Sequence[Result],
        by: Grouping,
        bold: Callable[[str], str],
        small: Callable[[str], str],
) -> List[List[str]]:
    """The page's table, header first; the best of each column is bold."""
    values = sorted({by.column(r) for r in results}, key=lambda value: value or 0, reverse=by.descending)
    columns = [
        (value, name) for value in values for name in SHOWN
        if any(name in r.estimates for r in results if by.column(r) == value)]
    if by is BY_BUDGET:
        columns += [
            (value, GAP) for value in values
            if any(gap_closed(r, results) is not None for r in results if by.column(r) == value)]
        columns.sort(key=lambda column: values.index(column[0]))  # stable: behind the measures of its budget
    best = {(value, name): _best(name, [r for r in results if by.column(r) == value]) for value, name in columns}
    lines = [[by.head, *(f'{by.title(value)}: {_SHORT[name]}' for value, name in columns)]]
    for title, line in lines_of(results, by).items():
        written = [title]
        for value, name in columns:
            result = line.get(value)
            if name == GAP:
                closed = None if result is None else gap_closed(result, results)
                written.append('' if closed is None else f'{closed:.0f} %')
                continue
            if result is None or name not in result.estimates:
                written.append('')
                continue
            estimate = result.estimates[name]
            rounded = f'{estimate.value:.1f}'
            is_best = result.row.competes and rounded == best[value, name]
            written.append(f"{bold(rounded) if is_best else rounded} {small(f'± {estimate.se:.1f}')}")
        lines.append(written)
    return lines


def _best(name: str, results: Sequence[Result]) -> Optional[str]:
    competing = [r.estimates[name].value for r in results if r.row.competes and name in r.estimates]
    return f'{max(competing):.1f}' if competing else None


def _detail(result: Result, name: str) -> str:
    value = value_of(result, name)
    if value is None:
        return ''
    _, se, se_seeds = result.estimates.get(name, Estimate(value, None, None))
    errors = ''.join(
        f' <small>± {error:.2f}{mark}</small>' for error, mark in ((se, ''), (se_seeds, ' (seeds)'))
        if error is not None)
    return f'{value:.2f}{errors}'


def _html(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    head = ''.join(f'<th>{text}</th>' for text in header)
    rows = ''.join('<tr>' + ''.join(f'<td>{text}</td>' for text in line) + '</tr>' for line in body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ' '.join(map(str, value))
    return '' if value is None else str(value)
