"""Measure everything that a claim about speed needs, and write benchmarks/RESULTS.md.

    python -m benchmarks [SECTION ...]

Sections: tokenizer, sizes, model, oracle, files, large, relevance, fewer_tokens, deploy; all by default. And
vectorize, which needs other programs. What a section measured is kept beside the page (results.json), so that one can
be measured anew alone.
"""
from __future__ import annotations

import importlib
import json
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, Dict, List, Tuple

import click
import torch

from .measure import Config, machine

DEFAULT = ('tokenizer', 'sizes', 'model', 'oracle', 'files', 'large', 'relevance', 'fewer_tokens', 'deploy')
SECTIONS = (*DEFAULT, 'vectorize')


@click.command(help=__doc__)
@click.argument('sections', nargs=-1, type=click.Choice(SECTIONS))
@click.option('--out', type=click.Path(path_type=Path, file_okay=False), default=Path(__file__).parent,
              show_default=True, help='Folder of RESULTS.md, results.json and the plot.')
@click.option('--threads', default=2, show_default=True)
@click.option('--seconds', default=10., show_default=True, help='For one comparison, six rounds at least.')
@click.option('--quick', is_flag=True, help='Models of two blocks: does it run? Its figures mean nothing.')
@click.option('--device', default='cpu', show_default=True)
@click.option('--tome', default='', help="Folder of a clone of facebookresearch/ToMe, for ToMe's rows.")
@click.option('--pictures', multiple=True, type=click.Path(exists=True, file_okay=False),
              help='Folder for vectorize, as often as there are some; by default the photographs in examples/.')
def main(sections: Tuple[str, ...], out: Path, **options: Any) -> None:
    config = Config(**options)
    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    store = out / 'results.json'
    results: Dict[str, Dict[str, Any]] = json.loads(store.read_text()) if store.exists() else {}
    for name in sections or DEFAULT:
        begin = time.perf_counter()
        click.echo(f'{name} ...')
        torch.manual_seed(0)
        section = importlib.import_module(f'.{name}', __package__).run(config)
        results[name] = dict(asdict(section), machine=machine(config), date=date.today().isoformat())
        click.echo(f'{name}: {time.perf_counter() - begin:.0f} s')
        store.write_text(json.dumps(results, indent=1) + '\n')
        (out / 'RESULTS.md').write_text(page(results))
    plot(results, out)
    for row in (row for name in results for row in results[name]['judged']):
        click.echo('  '.join(row))


def page(results: Dict[str, Dict[str, Any]]) -> str:
    lines = [
        '# Measured speed', '',
        'Written by `make bench` (`python -m benchmarks`). Calls that a ratio compares are timed in turn in one '
        'process; times are medians.', '',
        '## Ratios', '']
    judged = [[*row, results[name]['date']] for name in SECTIONS if name in results for row in results[name]['judged']]
    lines += markdown(['what', 'bar', 'measured', '', 'date'], judged)
    lines += ['', 'Not measured: anything on a GPU (none was at hand), and so no fused kernel was written.', '']
    for name in SECTIONS:
        if name not in results:
            continue
        result = results[name]
        where = f"On {result['machine']}, {result['date']}: `python -m benchmarks {name}`."
        lines += [f'## {name.capitalize()}', '', where, '']
        for title, header, rows in result['tables']:
            lines += [f'**{title}**', '', *markdown(header, rows), '']
        if result['curves']:
            lines += [f'![images/s as shares of the limit, by tokens]({name}.png)', '']
        for remark in result['remarks']:
            lines += [remark, '']
    return '\n'.join(lines).rstrip() + '\n'


def markdown(header: List[str], rows: List[List[str]]) -> List[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ['---'] * len(header), *rows)]


def plot(results: Dict[str, Dict[str, Any]], out: Path) -> None:
    """Draw the curves of each section that has some, as shares of the last, the limit."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    for name, result in results.items():
        for title, curves in result['curves'].items():
            figure, axes = plt.subplots(figsize=(6, 3.5), layout='constrained')
            *labels, limit = [label for label in curves if label != 'tokens']
            axes.axhline(1., color='grey', linestyle='--', label=limit)
            for label in labels:
                shares = [value / most for value, most in zip(curves[label], curves[limit])]
                axes.plot(curves['tokens'], shares, marker='o', label=label)
                for x, share in zip(curves['tokens'], shares):
                    axes.annotate(f'{share:.3f}', (x, share), (0, -14), textcoords='offset points', ha='center')
            axes.set(xlabel='tokens', ylabel=f'of what the {limit} gives', title=title, ylim=(0.9, 1.05))
            axes.legend()
            figure.savefig(out / f'{name}.png', dpi=120)
            plt.close(figure)


if __name__ == '__main__':
    main()
