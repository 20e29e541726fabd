"""Photographs: a ViT made subpixel, one set of weights for all budgets and sizes, beside the ViT on small pictures.

    python recipes/photographs.py DATA WEIGHTS --train-script pytorch-image-models/train.py --out build/photographs
    python recipes/photographs.py SCENES build/photographs --train-script ... --epochs 5 --out build/scenes \\
        --row 'low-res 25' --row 'looking at 25' --row 'placer at 25'

DATA is a folder with `train` and `validation`, a folder for each class in both; WEIGHTS are those of timm's
`vit_small_patch14_dinov2` (a file; 'hub' for those of the Hub), or what this script has made of other pictures of the
same classes: then a ViT goes on from itself and every subpixel row from the row `distilled`. All rows have the same
data, augmentation, optimiser and number of steps, by timm's own train.py. The subpixel rows see budgets of 16 to 100
tokens at random, or 25; the others are the ViT on pictures of 56, 70, 98 and 140 px, which have 16, 25, 49 and 100
patches. `distilled` goes on from the row `all sizes` for as many steps again, taught by that row at 100
tokens; `longer` is as many steps without a teacher. What is done is not done again; a run that was stopped goes on
from its last epoch.

OUT/models has each row's model by seed, for `timm-spot evaluate --model` and `timm.create_model('local-dir:...')`.
The table has top-1 on `validation` with the standard error over pictures, and the difference to the ViT on the small
picture of as many tokens, paired by picture, the mean over seeds.
"""
from __future__ import annotations

import csv
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import numpy as np
import timm
import torch
from timm.data import create_dataset, create_transform
from timm.models import load_state_dict, save_for_hf
from tqdm import tqdm

import timm_spot  # noqa: F401  registers the models

BACKBONE, WINDOW, IMAGE = 'vit_small_patch14_dinov2', 14, 224
BUDGETS = (16, 25, 49, 100)
COLUMNS = ('training', 'placement', 'n_tokens', 'seeds', 'n', 'top1', 'top1_se', 'gap', 'gap_se')
OPTIONS = shlex.split(  # without validation in between: nothing is chosen by it
    "--val-split '' "
    '--device cpu --no-prefetcher --workers 1 --amp --amp-dtype bfloat16 --batch-size 32 --crop-pct 1.0 '
    '--opt adamw --lr 3e-4 --weight-decay 0.05 --layer-decay 0.75 --warmup-epochs 1 --sched-on-updates --clip-grad 1 '
    '--smoothing 0.1 --drop-path 0.1 --scale 0.7 1.0 --ratio 0.9 1.11 --color-jitter 0 --checkpoint-hist 1 '
    '--model-ema --model-ema-decay 0.998 --model-ema-warmup')
DISTILLATION = '--task-loss-weight 0.5 --kd-temperature 2'


@dataclass(frozen=True)
class Row:
    """What is trained, and where it is judged.

    Attributes:
        kwargs: Keywords of `spot_retrofit` beside the backbone; None for the ViT itself on a small picture.
        placements: Keywords of `set_placement` by name.
        budgets: Numbers of tokens to judge it at; for the ViT the one of its picture.
        start: Row that it goes on from.
        taught: Whether the row `all sizes` at its largest budget is its teacher.
    """

    kwargs: dict[str, object] | None = None
    placements: dict[str, dict[str, object]] = field(default_factory=dict)
    budgets: tuple[int, ...] = BUDGETS
    start: str | None = None
    taught: bool = False

    @property
    def img_size(self) -> int:
        return IMAGE if self.kwargs is not None else WINDOW * math.isqrt(self.budgets[0])


def at(sampler: str, *coverages: float) -> dict[str, dict[str, object]]:
    return {f'{sampler}, {c:g}': dict(eval_sampler=sampler, eval_coverage=c) for c in coverages}


RANGE = BUDGETS[0], BUDGETS[-1]
ENERGY = dict(sampler='salient_lattice', saliency='energy')
ALL_SIZES = dict(n_tokens=RANGE, coverage=(0., 1.), saliency='energy')
EVERYWHERE = at('isotropic', 1., 0.5, 0.) | at('center', 1.) | at('salient_lattice', 1., 0.5)
BY_DENSITY = {f'density, {c:g}': dict(eval_coverage=c) for c in (1., 0.5)}


def at_25(placements: dict[str, dict[str, object]], **kwargs: object) -> Row:
    return Row(dict(n_tokens=25) | kwargs, placements, (25,))


ROWS = {
    **{f'low-res {n}': Row(budgets=(n,)) for n in BUDGETS},
    'all sizes': Row(ALL_SIZES, at('isotropic', 1., 0.)),
    'distilled': Row(ALL_SIZES, EVERYWHERE, start='all sizes', taught=True),
    **{f'low-res {n}, longer': Row(budgets=(n,), start=f'low-res {n}') for n in BUDGETS},
    'covering': Row(dict(n_tokens=RANGE, coverage=1.), at('isotropic', 1.) | at('center', 1.)),
    'looking': Row(dict(n_tokens=RANGE, coverage=(0.5, 1.)) | ENERGY, at('salient_lattice', 1., 0.5)),
    'placer': Row(dict(n_tokens=RANGE, coverage=(0.5, 1.), placer='density'), BY_DENSITY),
    # what makes sparse tokens better, one by one
    'fine at 25': at_25(at('isotropic', 0.), coverage=0.),
    'covering at 25': at_25(at('isotropic', 1.), coverage=1.),
    'covering at 25, no W_size': at_25(at('isotropic', 1.), coverage=1., size_embed=False),
    'random coverage at 25': at_25(at('isotropic', 1., 0.5, 0.), coverage=(0., 1.)),
    'half to whole coverage at 25': at_25(at('isotropic', 1., 0.5), coverage=(0.5, 1.)),
    'warped at 25': at_25(at('center', 1.) | at('isotropic', 1.), coverage=1., sampler='center'),
    'scattered at 25': at_25(at('sobol', 1.) | at('isotropic', 1.), coverage=1., sampler='sobol'),
    'mixed at 25': at_25(at('coarse+center', 0.), coverage=0., sampler='coarse+center'),
    'random patches at 25': at_25(at('grid_uniform', 0.), coverage=0., sampler='grid_uniform'),
    'looking at 25': at_25(at('salient_lattice', 1., 0.5), coverage=(0.5, 1.), **ENERGY),
    'placer at 25': at_25(BY_DENSITY, coverage=(0.5, 1.), placer='density'),
}
MAIN = (*(f'low-res {n}' for n in BUDGETS), 'all sizes', 'distilled')


@dataclass(frozen=True)
class Runs:
    """Where things are, and how long it takes."""

    data: Path
    weights: str
    script: Path
    out: Path
    epochs: int

    @property
    def classes(self) -> list[str]:
        return sorted(f.name for f in (self.data / 'train').iterdir() if f.is_dir())

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def checkpoint(self, name: str, seed: int) -> Path:
        """The last of a row's training, here."""
        return self.out / 'train' / file_name(name, seed) / 'last.pth.tar'


def file_name(name: str, seed: int) -> str:
    return f"{name.replace(' ', '_').replace(',', '')}-{seed}"


def create(row: Row, num_classes: int, checkpoint: Path, **kwargs: object) -> torch.nn.Module:
    """A row's model with the averaged weights of a training, which may have had no placer."""
    if row.kwargs is None:
        model = timm.create_model(BACKBONE, img_size=row.img_size, num_classes=num_classes)
    else:
        model = timm.create_model(
            'spot_retrofit', backbone=BACKBONE, num_classes=num_classes, **row.kwargs | kwargs)
    missing, unexpected = model.load_state_dict(
        load_state_dict(str(checkpoint), use_ema=True, weights_only=True), strict=False)
    if unexpected or any(not key.startswith('placer.') for key in missing):
        raise click.ClickException(f'{checkpoint} does not fit: {missing} are missing, {unexpected} unexpected.')
    return model.eval()


def save(model: torch.nn.Module, row: Row, folder: Path, classes: list[str]) -> str:
    """Writes a model as timm loads it by name; the name."""
    read = dict(input_size=(3, row.img_size, row.img_size), crop_pct=1.)
    save_for_hf(model, str(folder), dict(label_names=classes), data_config=read, safe_serialization=True)
    return f'local-dir:{folder}'


def source(name: str, seed: int, runs: Runs) -> list[str]:
    """Options of train.py that say what is trained and where it starts."""
    row = ROWS[name]
    if row.start or Path(runs.weights).is_dir():
        earlier = runs if row.start else replace(runs, out=Path(runs.weights))
        checkpoint = earlier.checkpoint(row.start or (name if row.kwargs is None else 'distilled'), seed)
        folder = runs.out / 'start' / file_name(name, seed)
        start = create(row, runs.num_classes, checkpoint)
        options = ['--model', save(start, row, folder, runs.classes), '--pretrained']
    else:
        options = ['--model', 'spot_retrofit' if row.kwargs is not None else BACKBONE, '--pretrained']
        options += [] if runs.weights == 'hub' else ['--pretrained-path', runs.weights]
        kwargs = dict(img_size=row.img_size) if row.kwargs is None else dict(backbone=BACKBONE) | row.kwargs
        options += ['--model-kwargs', *(f'{k}={v}' for k, v in kwargs.items())]
    if row.taught:
        largest = dict(eval_n_tokens=BUDGETS[-1], eval_coverage=1.)
        teacher = create(ROWS['all sizes'], runs.num_classes, runs.checkpoint('all sizes', seed), **largest)
        taught_by = save(teacher, ROWS['all sizes'], runs.out / 'teacher' / str(seed), runs.classes)
        options += ['--kd-model-name', taught_by, *shlex.split(DISTILLATION)]
    return options


def train(name: str, seed: int, runs: Runs) -> Path:
    """Trains by timm's script, or goes on with it; the last checkpoint."""
    last = runs.checkpoint(name, seed)
    if (last.parent / 'done').exists():
        return last
    size = str(ROWS[name].img_size)
    command = [sys.executable, '-m', 'timm_spot', str(runs.script), '--data-dir', str(runs.data), *OPTIONS,
               '--seed', str(seed), '--epochs', str(runs.epochs), '--num-classes', str(runs.num_classes),
               '--input-size', '3', size, size, '--output', str(runs.out / 'train'), '--experiment', last.parent.name]
    command += source(name, seed, runs)
    if last.exists():
        command += ['--resume', str(last)]
    click.echo(shlex.join(command))
    (runs.out / 'train').mkdir(parents=True, exist_ok=True)
    with open(runs.out / 'train' / f'{last.parent.name}.log', 'a') as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    (last.parent / 'done').touch()
    return last


def pictures(row: Row, data: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches as timm's validate.py makes them."""
    transform = create_transform(row.img_size, interpolation='bicubic', crop_pct=1.)
    dataset = create_dataset('', root=str(data), split='validation', transform=transform)
    yield from torch.utils.data.DataLoader(dataset, batch_size=50, num_workers=1)


@torch.inference_mode()
def right(model: torch.nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> np.ndarray:
    """Which pictures the model has right."""
    with torch.autocast('cpu', torch.bfloat16):
        return torch.cat([model(x).argmax(1) == y for x, y in batches]).numpy()


def judge(name: str, seed: int, checkpoint: Path, runs: Runs) -> None:
    """Keeps the model, and which pictures are right for each placement and budget."""
    row, folder, kept = ROWS[name], runs.out / 'right', runs.out / 'models' / file_name(name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    where = {(p, n): folder / f'{name}; {p}; {n}; {seed}.npy' for p in row.placements or [''] for n in row.budgets}
    missing = {k: path for k, path in where.items() if not path.exists()}
    if not missing and kept.exists():
        return
    model = create(row, runs.num_classes, checkpoint)
    save(model, row, kept, runs.classes)
    batches = list(pictures(row, runs.data)) if missing else []
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
        if shared and name != f'low-res {n_tokens}':
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
    cells = {(re.sub(r'(?<=low-res) \d+', '', r['training']), r['placement'], r['n_tokens']): r for r in rows}
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
@click.option('--row', 'names', multiple=True, type=click.Choice(list(ROWS)), default=MAIN, show_default=True)
@click.option('--seed', 'seeds', multiple=True, default=(0, 1), show_default=True)
@click.option('--epochs', default=8, show_default=True)
def main(data: Path, weights: str, train_script: Path, out: Path, names: tuple[str, ...], seeds: tuple[int, ...],
         epochs: int) -> None:
    runs = Runs(data, weights, train_script, out, epochs)
    for seed in seeds:
        for name in names:
            judge(name, seed, train(name, seed, runs), runs)
    click.echo(markdown(table(out)))


if __name__ == '__main__':
    main()
