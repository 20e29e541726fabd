"""Photographs: a ViT made subpixel, one set of weights for all budgets, beside the ViT trained for each small picture.

    python recipes/photographs.py DATA WEIGHTS --train-script pytorch-image-models/train.py --out build/photographs

DATA is a folder with `train` and `validation`, a folder for each class in both; WEIGHTS are those of timm's
`vit_small_patch14_dinov2` (a file; 'hub' for those of the Hub). All rows start from them and have the same data,
augmentation, optimiser and number of steps, by timm's own train.py. The subpixel rows see budgets of 16 to 100 tokens
at random; the others are the ViT on pictures of 56, 70, 98 and 140 px, which have 16, 25, 49 and 100 patches. What
is done is not done again; a run that was stopped goes on from its last epoch.

The table has top-1 on `validation` with the standard error over pictures, and the difference to the ViT on the small
picture of as many tokens, paired by picture, the mean over seeds.
"""
from __future__ import annotations

import csv
import math
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import timm
import torch
from timm.data import create_dataset, create_transform
from timm.models import load_state_dict
from tqdm import tqdm

import timm_spot  # noqa: F401  registers the models

BACKBONE, WINDOW, IMAGE = 'vit_small_patch14_dinov2', 14, 224
BUDGETS = (16, 25, 49, 100)
COLUMNS = ('training', 'placement', 'n_tokens', 'seeds', 'n', 'top1', 'top1_se', 'gap', 'gap_se')
OPTIONS = shlex.split(
    '--device cpu --no-prefetcher --workers 1 --amp --amp-dtype bfloat16 --batch-size 32 --crop-pct 1.0 '
    '--opt adamw --lr 3e-4 --weight-decay 0.05 --layer-decay 0.75 --warmup-epochs 1 --sched-on-updates --clip-grad 1 '
    '--smoothing 0.1 --drop-path 0.1 --scale 0.7 1.0 --ratio 0.9 1.11 --color-jitter 0 --checkpoint-hist 1 '
    '--model-ema --model-ema-decay 0.998 --model-ema-warmup')


@dataclass(frozen=True)
class Row:
    """What is trained, and where it is judged.

    Attributes:
        kwargs: `--model-kwargs` of timm's train.py beside the backbone and the budgets; None for the ViT itself.
        placements: Keywords of `set_placement` by name.
        n_tokens: Budget of a ViT on a small picture.
    """

    kwargs: dict[str, object] | None = None
    placements: dict[str, dict[str, object]] = field(default_factory=dict)
    n_tokens: int | None = None


def at(sampler: str, coverage: float = 0.) -> dict[str, dict[str, object]]:
    return {f'{sampler}, {coverage:g}': dict(eval_sampler=sampler, eval_coverage=coverage)}


ROWS = {
    **{f'low-res {n}': Row(n_tokens=n) for n in BUDGETS},
    'fine': Row(dict(coverage=0.), at('isotropic') | at('center')),
    'covering': Row(dict(coverage=1.), at('isotropic', 1.) | at('center', 1.)),
    'covering, no W_size': Row(dict(coverage=1., size_embed=False), at('isotropic', 1.)),
    'random coverage': Row(
        dict(coverage=(0., 1.)),
        at('isotropic', 1.) | at('center', 1.) | at('isotropic', 0.5) | at('isotropic') | at('coarse+center', 1.)),
    'half to whole coverage': Row(
        dict(coverage=(0.5, 1.)), at('isotropic', 1.) | at('center', 1.) | at('isotropic', 0.5)),
    'warped': Row(dict(coverage=1., sampler='center'), at('isotropic', 1.) | at('center', 1.)),
    'scattered': Row(dict(coverage=1., sampler='sobol'), at('isotropic', 1.) | at('center', 1.)),
    'energy': Row(dict(coverage=0., sampler='salient_lattice', saliency='energy'), at('salient_lattice')),
    'energy, covering': Row(dict(coverage=1., sampler='salient_lattice', saliency='energy'), at('salient_lattice', 1.)),
    'placer': Row(dict(coverage=0., placer='density'), {'density, 0': {}}),
    'placer, covering': Row(dict(coverage=1., placer='density'), {'density, 1': {}}),
    'mixed': Row(dict(coverage=0., sampler='coarse+sobol'), at('coarse+sobol') | at('coarse+center')),
}


def train(row: Row, name: str, seed: int, data: Path, weights: str, script: Path, out: Path, epochs: int) -> Path:
    """Trains by timm's script, or goes on with it; the last checkpoint."""
    run = f"{name.replace(' ', '_').replace(',', '')}-{seed}"
    last = out / 'train' / run / 'last.pth.tar'
    if (out / 'train' / run / 'done').exists():
        return last
    command = [sys.executable, '-m', 'timm_spot', str(script), '--data-dir', str(data), *OPTIONS, '--seed', str(seed),
               '--epochs', str(epochs), '--num-classes', str(sum(f.is_dir() for f in (data / 'train').iterdir())),
               '--output', str(out / 'train'), '--experiment', run]
    command += ['--pretrained'] if weights == 'hub' else ['--pretrained', '--pretrained-path', weights]
    if row.kwargs is None:
        size = WINDOW * math.isqrt(row.n_tokens)
        command += ['--model', BACKBONE, '--input-size', '3', str(size), str(size)]
        command += ['--model-kwargs', f'img_size={size}']
    else:
        kwargs = dict(backbone=BACKBONE, n_tokens=(BUDGETS[0], BUDGETS[-1]), eval_n_tokens=25)
        command += ['--model', 'spot_retrofit', '--input-size', '3', str(IMAGE), str(IMAGE), '--model-kwargs',
                    *(f'{k}={v}' for k, v in (kwargs | row.kwargs).items())]
    if last.exists():
        command += ['--resume', str(last)]
    click.echo(shlex.join(command))
    (out / 'train').mkdir(parents=True, exist_ok=True)
    with open(out / 'train' / f'{run}.log', 'a') as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    (out / 'train' / run / 'done').touch()
    return last


def load(row: Row, checkpoint: Path, num_classes: int) -> torch.nn.Module:
    """The averaged weights of a run."""
    if row.kwargs is None:
        model = timm.create_model(BACKBONE, img_size=WINDOW * math.isqrt(row.n_tokens), num_classes=num_classes)
    else:
        model = timm.create_model(
            'spot_retrofit', backbone=BACKBONE, num_classes=num_classes, n_tokens=25, **row.kwargs)
    model.load_state_dict(load_state_dict(str(checkpoint), use_ema=True, weights_only=True))
    return model.eval()


def pictures(row: Row, data: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches as timm's validate.py makes them."""
    size = IMAGE if row.n_tokens is None else WINDOW * math.isqrt(row.n_tokens)
    transform = create_transform(size, interpolation='bicubic', crop_pct=1.)
    dataset = create_dataset('', root=str(data), split='validation', transform=transform)
    yield from torch.utils.data.DataLoader(dataset, batch_size=50, num_workers=1)


@torch.inference_mode()
def right(model: torch.nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> np.ndarray:
    """Which pictures the model has right."""
    with torch.autocast('cpu', torch.bfloat16):
        return torch.cat([model(x).argmax(1) == y for x, y in batches]).numpy()


def judge(row: Row, name: str, seed: int, checkpoint: Path, data: Path, out: Path) -> None:
    """Keeps which pictures are right, for each placement and budget."""
    where = {(p, n): out / 'right' / f'{name}; {p}; {n}; {seed}.npy' for p in row.placements or [''] for n in (
        [row.n_tokens] if row.n_tokens else BUDGETS)}
    (out / 'right').mkdir(parents=True, exist_ok=True)
    missing = {k: path for k, path in where.items() if not path.exists()}
    if not missing:
        return
    model = load(row, checkpoint, num_classes=sum(f.is_dir() for f in (data / 'train').iterdir()))
    batches = list(pictures(row, data))
    for (placement, n_tokens), path in tqdm(missing.items(), desc=name, disable=None):
        if placement:
            model.set_placement(eval_n_tokens=n_tokens, **row.placements[placement])
        np.save(path, right(model, batches))


def table(out: Path) -> list[dict[str, object]]:
    """A row for each training, placement and budget: top-1 and its difference to the small picture, in percent."""
    found: dict[tuple[str, str, int], dict[int, np.ndarray]] = {}
    for path in sorted((out / 'right').glob('*.npy')):
        name, placement, n_tokens, seed = path.stem.split('; ')
        found.setdefault((name, placement, int(n_tokens)), {})[int(seed)] = np.load(path)
    rows = []
    for (name, placement, n_tokens), by_seed in found.items():
        each = 100. * np.mean(list(by_seed.values()), axis=0)
        line: dict[str, object] = dict(
            training=name, placement=placement, n_tokens=n_tokens, seeds=len(by_seed), n=len(each),
            top1=round(each.mean(), 2), top1_se=round(each.std(ddof=1) / len(each) ** 0.5, 2))
        rival = found.get((f'low-res {n_tokens}', '', n_tokens), {})
        shared = sorted(by_seed.keys() & rival.keys())
        if shared and not name.startswith('low-res'):
            gap = 100. * np.mean([by_seed[s].astype(float) - rival[s] for s in shared], axis=0)
            line |= dict(gap=round(gap.mean(), 2), gap_se=round(gap.std(ddof=1) / len(gap) ** 0.5, 2))
        rows.append(line)
    with open(out / 'table.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def markdown(rows: list[dict[str, object]]) -> str:
    """The table by budget; below each figure the paired difference."""
    cells = {(r['training'].split(' ')[0] if r['training'].startswith('low-res') else r['training'], r['placement'],
              r['n_tokens']): r for r in rows}
    lines = ['| training | placement, coverage | ' + ' | '.join(f'{n} tokens' for n in BUDGETS) + ' |',
             '|---' * (len(BUDGETS) + 2) + '|']
    for training, placement in dict.fromkeys(key[:2] for key in cells):
        line = [training, placement]
        for n_tokens in BUDGETS:
            r = cells.get((training, placement, n_tokens))
            text = '' if r is None else f"{r['top1']:.1f} ± {r['top1_se']:.1f}"
            line.append(f"{text} ({r['gap']:+.1f} ± {r['gap_se']:.1f})" if r and 'gap' in r else text)
        lines.append('| ' + ' | '.join(line) + ' |')
    return '\n'.join(lines)


@click.command(help=__doc__)
@click.argument('data', type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument('weights')
@click.option('--train-script', type=click.Path(exists=True, path_type=Path), required=True, help="timm's train.py.")
@click.option('--out', type=click.Path(path_type=Path), default='build/photographs', show_default=True)
@click.option('--row', 'names', multiple=True, type=click.Choice(list(ROWS)), help='Only these rows.')
@click.option('--seed', 'seeds', multiple=True, default=(0, 1), show_default=True)
@click.option('--epochs', default=8, show_default=True)
def main(data: Path, weights: str, train_script: Path, out: Path, names: tuple[str, ...], seeds: tuple[int, ...],
         epochs: int) -> None:
    for seed in seeds:
        for name in names or ROWS:
            checkpoint = train(ROWS[name], name, seed, data, weights, train_script, out, epochs)
            judge(ROWS[name], name, seed, checkpoint, data, out)
    click.echo(markdown(table(out)))


if __name__ == '__main__':
    main()
