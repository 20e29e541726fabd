"""Tables and one self-contained page from the rows of an evaluation (extra `viz`)."""
from __future__ import annotations

import base64
import html
import importlib.util
import io
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Sequence

import torch
from torch import nn

from ....models.spot_vit import SubpixelVisionTransformer
from ...pictures.datasets import Pictures
from ...pictures.images import denormalize, model_transform
from ...pictures.saliency_maps import saliency_source
from ...search.draws import draw_placements
from ..results import Row, read_results
from ..rows import AS_IT_IS, BASELINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PICTURES = 2  # shown with their placements
_SHOWN = ('top1', 'knn_top1')
_TITLES = dict(
    top1='top-1, %', top5='top-5, %', nll='NLL, nats', ece='calibration error, %', knn_top1='kNN, %',
    gflops='GFLOPs', images_per_s='images/s')

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 62rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2rem; overflow-wrap: anywhere; } h3 { font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; white-space: normal;
  min-width: 5.5rem; max-width: 9rem; overflow-wrap: anywhere; }
td small { color: #595959; }
svg { width: 36rem; max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.placements { display: flex; flex-wrap: wrap; gap: .5rem; }
.placements figure { margin: 0; width: 9rem; } .placements img { width: 100%; }
figcaption { font-size: .85rem; text-align: center; }
@media screen and (min-width: 68rem) {
  body { max-width: 76rem; } p { max-width: 62rem; } svg { display: inline-block; width: 35rem; max-width: 49%; }
  th:first-child, td:first-child { min-width: 14rem; max-width: 22rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .1rem .3rem; }
  h2, h3 { break-after: avoid; } svg, figure, tr { break-inside: avoid; }
}
"""


def check_matplotlib() -> None:
    """Raise RuntimeError where the report could not be drawn, before hours of work."""
    if importlib.util.find_spec('matplotlib') is None:
        raise RuntimeError("the report needs matplotlib: pip install 'timm-spot[evaluate]'.")


def write_report(out: Path, models: Dict[str, nn.Module], pictures: Pictures) -> None:
    """Write results.md and report.html of all rows in a folder.

    Args:
        out: With results.csv and speed.csv.
        models: Those whose placements are shown.
        pictures: The data set, whose first pictures they are shown on.
    """
    rows = read_results(out)
    tables, parts = [], []
    for name in _names(rows):
        own = _of(rows, name)
        tables.append(f'## {name}\n')
        parts.append(f'<h2>{html.escape(name)}</h2>')
        for by, x in (('n_tokens', 'n_tokens'), ('keep_rate', 'gflops')):
            group = [row for row in own if bool(row['scorer']) == (by == 'keep_rate')]
            if group:
                tables.append(_markdown_table(group, by) + '\n')
                parts.append(_html_table(group, by))
                parts += [_svg(_plot(group, by, axis)) for axis in (x, 'images_per_s')]
        parts.append(f'<h3>All measures</h3>{_html_details(own)}')
        if isinstance(models.get(name), SubpixelVisionTransformer) and not pictures.is_stream:
            parts.append(_placements(own, models[name], pictures))
    (out / 'results.md').write_text('\n'.join([*tables, f'{_NOTE}\n']), encoding='utf-8')
    (out / 'report.html').write_text(
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>timm_spot evaluation</title>'
        f'<style>{_STYLE}</style></head><body><h1>Accuracy by placement and budget</h1><p>{html.escape(_NOTE)}</p>'
        f'{"".join(parts)}</body></html>\n', encoding='utf-8')


_NOTE = (
    'Top-1 and nearest-neighbour (kNN) accuracy in percent, ± the standard error over images. The best of each column '
    'is in bold; an oracle sees the labels and does not compete. "Keep" is the share of tokens that a stage keeps.')


def _names(rows: Sequence[Row]) -> List[str]:
    return list(dict.fromkeys(row['model'] for row in rows))


def _of(rows: Sequence[Row], name: str) -> List[Row]:
    return [row for row in rows if row['model'] == name]


def _label(row: Row, rows: Sequence[Row]) -> str:
    """A row's placement or scorer, with whatever else tells it from other rows of the same table cell."""
    twins = [r for r in rows if all(r[key] == row[key] for key in ('sampler', 'n_tokens', 'scorer', 'keep_rate'))]
    extra = [row[key] or 'none'
             for key in ('data', 'split', 'data_sha', 'weights', 'stages', 'seeds', 'saliency', 'knn', 'amp')
             if len({twin[key] for twin in twins}) > 1]
    name = f"{row['scorer']}, {row['n_tokens']} {row['sampler']}" if row['scorer'] else row['sampler']
    return name + (f" ({', '.join(extra)})" if extra else '')


def _layout(rows: Sequence[Row], by: str) -> Dict[str, Dict[str, Row]]:
    """Rows by placement, then budget (`by='n_tokens'`); or by scorer and placement, then keep rate ('keep_rate')."""
    layout: Dict[str, Dict[str, Row]] = {}
    for row in rows:
        layout.setdefault(_label(row, rows), {})[row[by]] = row
    return layout


def _columns(rows: Sequence[Row], by: str) -> List[tuple]:
    values = sorted({row[by] for row in rows}, key=lambda n: float(n or 0), reverse=by == 'keep_rate')
    return [(n, metric) for n in values for metric in _SHOWN if any(row[metric] for row in rows if row[by] == n)]


def _table(rows: Sequence[Row], by: str, bold: Callable[[str], str], small: Callable[[str], str]) -> List[List[str]]:
    """Cells of the page's table, header first."""
    layout, columns = _layout(rows, by), _columns(rows, by)
    best = {}
    for n, metric in columns:
        competing = [
            float(r[metric]) for r in rows if r[by] == n and r[metric] and not r['sampler'].startswith('oracle')]
        best[n, metric] = f'{max(competing):.1f}' if competing else None
    titles = [f"{'keep ' if by == 'keep_rate' else ''}{n or 'all'}: {'top-1' if metric == 'top1' else 'kNN'}"
              for n, metric in columns]
    lines = [['scorer' if by == 'keep_rate' else 'placement', *titles]]
    for label, cells in layout.items():
        line = [label]
        for n, metric in columns:
            row = cells.get(n)
            if row is None or not row[metric]:
                line.append('')
                continue
            value, error = f'{float(row[metric]):.1f}', f"± {float(row[metric + '_se']):.1f}"
            competes = not row['sampler'].startswith('oracle')
            line.append(f"{bold(value) if competes and value == best[n, metric] else value} {small(error)}")
        lines.append(line)
    return lines


def _markdown_table(rows: Sequence[Row], by: str) -> str:
    header, *lines = _table(rows, by, lambda value: f'**{value}**', str)
    return '\n'.join(f"| {' | '.join(line)} |" for line in [header, ['---'] * len(header), *lines])


def _html_table(rows: Sequence[Row], by: str) -> str:
    header, *lines = _table(rows, by, lambda value: f'<b>{value}</b>', lambda error: f'<small>{error}</small>')
    return _html([[html.escape(cell) for cell in header], *([html.escape(line[0]), *line[1:]] for line in lines)])


def _html_details(rows: Sequence[Row]) -> str:
    measured = [metric for metric in _TITLES if any(row[metric] for row in rows)]
    lines = [['placement', 'tokens', *(_TITLES[metric] for metric in measured)]]
    for row in rows:
        keep = f", keep {row['keep_rate']}" if row['scorer'] else ''
        line = [html.escape(_label(row, rows) + keep), row['n_tokens']]
        for metric in measured:
            errors = ''.join(
                f" <small>± {float(row[metric + suffix]):.2f}{mark}</small>"
                for suffix, mark in (('_se', ''), ('_se_seeds', ' (seeds)')) if row.get(metric + suffix))
            line.append(f'{float(row[metric]):.2f}{errors}' if row[metric] else '')
        lines.append(line)
    return _html(lines)


def _html(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    cells = ''.join(f'<th>{cell}</th>' for cell in header)
    rows = ''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in line) + '</tr>' for line in body)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>'


def _plot(rows: Sequence[Row], by: str, x: str) -> Figure:
    """Accuracy against a column: a line for each placement or scorer, with the standard error of each point."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    figure = Figure(figsize=(5, 4.8), layout='constrained')
    ax = figure.subplots()
    layout = _layout(rows, by)
    metric = next(metric for metric in _SHOWN if any(row[metric] for row in rows))  # top-1, where there is a classifier
    # Colour, marker and line vary together: legible in grey too.
    for i, (label, cells) in enumerate(layout.items()):
        points = sorted(
            (float(r[x]), float(r[metric]), float(r[f'{metric}_se'])) for r in cells.values() if r[metric] and r[x])
        if not points:
            continue
        at, accuracy, error = zip(*points)
        ax.errorbar(
            at, accuracy, yerr=error, label=textwrap.fill(label, 28), marker='osD^vPX*<>'[i % 10],
            color=colormaps['tab10'](i % 10),
            linestyle=('-', '--', ':')[i // 10 % 3], markersize=5, capsize=2, linewidth=1.3)
    ax.set_xscale('linear' if x == 'gflops' else 'log')
    ax.xaxis.set_major_formatter(ScalarFormatter())
    if x == 'images_per_s':
        ax.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))  # within a decade label others too
    elif x == 'n_tokens':
        budgets = sorted({int(row['n_tokens']) for row in rows if row['n_tokens']})
        ax.set_xticks(budgets, [str(n) for n in budgets])
        ax.set_xticks([], minor=True)
    ax.set_xlabel('tokens' if x == 'n_tokens' else _TITLES[x])
    ax.set_ylabel(_TITLES[metric])
    ax.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=2, frameon=False, fontsize='small')
    return figure


def _svg(figure: Figure) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format='svg', metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
    text = drawn.getvalue()
    # Sized by the page; ids are made unique, several drawings share it.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1', re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1', text))
    return text[text.index('<svg'):]


def _placements(rows: Sequence[Row], model: nn.Module, pictures: Pictures) -> str:
    """The first pictures with the placements of each sampler at the smallest budget."""
    import matplotlib.pyplot as plt

    from ...drawing.placements import draw_placement

    drawn = [row for row in rows if row['sampler'] not in (*BASELINES, AS_IT_IS) and 'oracle' not in row['sampler']]
    if not drawn:
        return ''
    budget = min(int(row['n_tokens']) for row in drawn)
    samplers: Dict[str, Optional[str]] = {
        row['sampler']: row['saliency'] for row in drawn if int(row['n_tokens']) == budget}
    transform, embed = model_transform(model), model.patch_embed
    figures = []
    for i in range(min(_PICTURES, len(pictures))):
        image = transform(pictures[i][0])[None]
        for sampler, saliency in samplers.items():
            maps = None
            if saliency:
                maps = saliency_source(saliency, model, transform)(image, [pictures.name(i)])
            positions = draw_placements(model, image, sampler, budget, maps, torch.tensor([i]), 0)
            figure = draw_placement(
                denormalize(model, image[0]), positions[0], embed.window, convention=embed.convention).figure
            data = io.BytesIO()
            figure.savefig(data, format='png', dpi=60)
            plt.close(figure)
            encoded = base64.b64encode(data.getvalue()).decode()
            figures.append(
                f'<figure><img alt="{html.escape(sampler)} on picture {i}" src="data:image/png;base64,{encoded}">'
                f'<figcaption>{html.escape(sampler)}</figcaption></figure>')
    return f'<h3>Placements of {budget} tokens</h3><div class="placements">{"".join(figures)}</div>'
