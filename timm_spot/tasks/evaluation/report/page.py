"""One self-contained page, and its tables in Markdown, from the results of an evaluation (extra `viz`)."""
from __future__ import annotations

import base64
import html
import io
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Dict, List, Sequence

import timm
import torch
from torch import nn

from ....models.placing import at_budget
from ...kept import write_whole
from ...pictures.datasets import Pictures
from ...pictures.images import denormalize, model_transform
from ...pictures.saliency_maps import saliency_source
from ...search.draws import draw_placements
from ..families import family_of
from ..results import read_results
from ..rows import PLACER, SAMPLER, Result, Row
from .plots import plot, to_svg
from .tables import groups, html_details, html_table, markdown_table

_PICTURES = 2  # shown with their placements

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
.placements figure { margin: 0; width: 12rem; } .placements img { width: 100%; }
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


def write_report(out: Path, models: Dict[str, nn.Module], pictures: Pictures, device: torch.device) -> List[str]:
    """Write results.md and report.html of all results in a folder.

    Args:
        out: With results.csv and speed.csv.
        models: Those whose placements are shown.
        pictures: The data set, whose first pictures they are shown on.
        device: Of this run.

    Returns:
        What is wrong with the files in the folder.
    """
    results, problems = read_results(out)
    about = _about(results, device)
    tables, parts = [], []
    for name in dict.fromkeys(result.row.model for result in results):
        own = [result for result in results if result.row.model == name]
        tables.append(f'## {name}\n')
        parts.append(f'<h2>{html.escape(name)}</h2>')
        for by, group in groups(own):
            tables.append(markdown_table(group, by) + '\n')
            parts.append(html_table(group, by))
            figures = [plot(group, by, x) for x in (by.x, 'images_per_s')]
            parts += [to_svg(figure) for figure in figures if figure is not None]
        parts.append(f'<h3>All measures</h3>{html_details(own)}')
        if name in models and family_of(models[name]).has_samplers and not pictures.is_stream:
            parts.append(_placements([result.row for result in own], models[name], pictures))
    write_whole(out / 'results.md', '\n'.join([*tables, f'{_NOTE}\n', *(f'- {line}' for line in about), '']))
    listed = ''.join(f'<li>{html.escape(line)}</li>' for line in about)
    write_whole(
        out / 'report.html',
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>timm_spot evaluation</title>'
        f'<style>{_STYLE}</style></head><body><h1>Accuracy by placement and budget</h1><p>{html.escape(_NOTE)}</p>'
        f'<ul>{listed}</ul>{"".join(parts)}</body></html>\n')
    return problems


_NOTE = (
    'Top-1 and nearest-neighbour (kNN) accuracy in percent, ± the standard error over images. The best of each column '
    'is in bold; an oracle sees the labels and does not compete. "Keep" is the share of tokens that a stage keeps.')


def _about(results: Sequence[Result], device: torch.device) -> List[str]:
    """What the results are of, and what wrote the report."""
    from .... import __version__

    data: Dict[str, None] = {}
    for r in results:
        skipped = f', {r.skipped:,} more could not be read' if r.skipped else ''
        data[f'Data set: {r.row.data}, {r.row.split} (digest {r.row.data_sha}), {r.images:,} images{skipped}'] = None
    processor = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine()
    now = datetime.now(timezone.utc).strftime('%Y-%m-%d %H:%M UTC')
    return [
        *data, f'Written {now} by timm_spot {__version__} (timm {timm.__version__}, torch {torch.__version__})',
        f'Device of the last run: {device} ({processor})']


def _placements(rows: Sequence[Row], model: nn.Module, pictures: Pictures) -> str:
    """The first pictures with the placements of each sampler at the smallest budget."""
    drawn = [row for row in rows if row.kind in (SAMPLER, PLACER)]
    if not drawn:
        return ''
    budget = min(row.n_tokens for row in drawn)
    by_name = {row.placement: row for row in drawn if row.n_tokens == budget}
    figures = []
    for i in range(min(_PICTURES, len(pictures))):
        try:
            picture = pictures[i][0]
        except ValueError:  # named among those left out
            continue
        image = model_transform(model)(picture)[None].to(next(model.parameters()).device)
        for name, row in by_name.items():
            caption = f'<figcaption>{html.escape(name)}</figcaption>'
            try:
                drawing = _draw(model, image[0], _place(model, image, row, pictures.name(i), i))
            except (FileNotFoundError, ValueError) as e:  # a row of an earlier run, whose sampler or maps are gone
                figures.append(f'<figure>{caption}{html.escape(str(e))}</figure>')
                continue
            alt = f'{html.escape(name)} on picture {i}'
            figures.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{drawing}">{caption}</figure>')
    return f'<h3>Placements of {budget} tokens</h3><div class="placements">{"".join(figures)}</div>'


def _place(model: nn.Module, image: torch.Tensor, row: Row, file: str, number: int) -> torch.Tensor:
    """Positions (N, 2) of the tokens of picture `number` of the data set, (1, C, H, W), as a row has them."""
    if row.kind == PLACER:
        with torch.inference_mode():
            return at_budget(model, row.n_tokens, row.coverage or 0.).place(image)[0]
    maps = saliency_source(row.saliency, model, model_transform(model))(image, [file]) if row.saliency else None
    return draw_placements(
        model, image, row.sampler, row.n_tokens, maps, torch.tensor([number]), 0, row.coverage or 0.)[0]


def _draw(model: nn.Module, image: torch.Tensor, positions: torch.Tensor) -> str:
    """An image (C, H, W) with its windows, as PNG in base64."""
    import matplotlib.pyplot as plt

    from ...drawing.placements import draw_placement

    embed = model.patch_embed
    figure = draw_placement(
        denormalize(model, image.cpu()), positions.cpu(), embed.window, convention=embed.convention).figure
    data = io.BytesIO()
    figure.savefig(data, format='png', dpi=100)
    plt.close(figure)
    return base64.b64encode(data.getvalue()).decode()
