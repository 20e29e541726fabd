"""Plots of accuracy, as SVG (extra `viz`)."""
from __future__ import annotations

import importlib.util
import io
import re
import textwrap
from typing import TYPE_CHECKING, Any, Optional, Sequence

from ..rows import Result
from .tables import SHOWN, TITLES, Grouping, lines_of, value_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_matplotlib() -> None:
    """Raise RuntimeError where the report could not be drawn, before hours of work."""
    if importlib.util.find_spec('matplotlib') is None:
        raise RuntimeError("the report needs matplotlib: pip install 'timm-spot[evaluate]'.")


def plot(results: Sequence[Result], by: Grouping, x: str) -> Optional[Figure]:
    """Accuracy against a measure: a line for each placement or scorer, with the standard error of each point.

    Returns:
        None where no result has both.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    metric = next((name for name in SHOWN if any(name in r.estimates for r in results)), '')  # top-1, if there is one
    budgets = {value_of(r, x) for r in results if metric in r.estimates and value_of(r, x) is not None}
    if x == 'n_tokens' and len(budgets) == 1 and len(lines_of(results, by)) > 1:
        return _plot_one_budget(results, by, metric, budgets.pop())
    figure = Figure(figsize=(5, 4.8), layout='constrained')
    ax = figure.subplots()
    drawn, labels = [], []
    # Colour, marker and line vary together: legible in grey too.
    for i, (label, line) in enumerate(lines_of(results, by).items()):
        points = sorted(
            (value_of(r, x), r.estimates[metric].value, r.estimates[metric].se) for r in line.values()
            if metric in r.estimates and value_of(r, x) is not None)
        if not points:
            continue
        at, accuracy, error = zip(*points)
        drawn.append(ax.errorbar(
            at, accuracy, yerr=error, marker='osD^vPX*<>'[i % 10], color=colormaps['tab10'](i % 10),
            linestyle=('-', '--', ':')[i // 10 % 3], markersize=5, capsize=2, linewidth=1.3))
        labels.append(textwrap.fill(label, 28))
    if not drawn:
        return None
    _set_axes(ax, results, x, metric)
    # A label that begins with an underscore is none to matplotlib.
    legend = figure.legend(
        drawn, [f' {label}' if label.startswith('_') else label for label in labels], loc='outside lower center',
        ncols=2, frameon=False, fontsize='small')
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ is a letter
    return figure


def _plot_one_budget(results: Sequence[Result], by: Grouping, metric: str, n_tokens: Any) -> Figure:
    """Accuracy at the one budget that there is: a point for each placement, in a line of its own, the best on top."""
    from matplotlib.figure import Figure

    points = sorted(
        (r.estimates[metric].value, r.estimates[metric].se, label)
        for label, line in lines_of(results, by).items() for r in line.values() if metric in r.estimates)
    accuracy, error, labels = zip(*points)
    figure = Figure(figsize=(5, 1. + 0.35 * len(points)), layout='constrained')
    ax = figure.subplots()
    ax.errorbar(accuracy, range(len(points)), xerr=error, fmt='o', color='#0072b2', markersize=5, capsize=2)
    for text in ax.set_yticks(range(len(points)), [textwrap.fill(label, 28) for label in labels]):
        text.label1.set_parse_math(False)  # a $ is a letter
    ax.set_xlabel(f'{TITLES[metric]}, {n_tokens} tokens')
    ax.grid(axis='x', alpha=0.3)
    return figure


def _set_axes(ax: Any, results: Sequence[Result], x: str, metric: str) -> None:
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    ax.set_xscale('linear' if x == 'gflops' else 'log')
    ax.xaxis.set_major_formatter(ScalarFormatter())
    if x == 'images_per_s':
        ax.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))  # within a decade label others too
    elif x == 'n_tokens':
        budgets = sorted({r.row.n_tokens for r in results if r.row.n_tokens is not None})
        ax.set_xticks(budgets, [str(n) for n in budgets])
        ax.set_xticks([], minor=True)
    ax.set_xlabel('tokens' if x == 'n_tokens' else TITLES[x])
    ax.set_ylabel(TITLES[metric])
    ax.grid(alpha=0.3)


def to_svg(figure: Figure) -> str:
    """A figure as an element for a page."""
    drawn = io.StringIO()
    figure.savefig(drawn, format='svg', metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
    text = drawn.getvalue()
    # Sized by the page; ids are made unique, several drawings share it.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1', re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1', text))
    return text[text.index('<svg'):]
