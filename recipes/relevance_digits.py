"""Which tokens may go? Every scorer on the shipped digits model: accuracy against FLOPs.

    python recipes/relevance_digits.py --out build/relevance

The relevance predictors are trained at keep rates of 0.4 to 0.9 drawn per step, on 64 and 49 tokens, on the grid and
off it, from three seeds; the backbone stays as it is shipped, so that all scorers are compared on the same one. With
--tune it is trained too, and the rivals are run on each trained backbone. Every model sees the canvases of digits never
seen in training that `timm-spot evaluate` has, so that differences are taken image by image. Canvases of one digit are
alike: standard errors are over the 359 digits, and over seeds.

Trained models are kept in --out, so that a second run goes on after them; the package holds the predictors of the first
seed, in half precision.
"""
from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import List, Sequence, Tuple

import click
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import timm_spot
from timm_spot.tasks.evaluation.flops import count_flops
from timm_spot.tasks.evaluation.metrics import estimate_mean
from timm_spot.tasks.pictures.datasets import Pictures
from timm_spot.tasks.pictures.digits import draw_canvases, load_digits, to_input
from timm_spot.tasks.pictures.images import model_transform
from timm_spot.tasks.pruning_task import RelevanceTask

NAME = 'spot_vit_pico_patch8_64'
RIVALS = ('cls-attention', 'received-attention', 'norm', 'random')
KEEP_RATES = (0.9, 0.7, 0.5)
# Of 49 tokens 31, 20, 13 stay: 25.2 on average over the blocks; or 28, 16, 10: the FLOPs of 25.
KEEP_RATES_49 = (0.64, 0.58)
SAMPLERS = ('isotropic', 'sobol')  # 64 isotropic tokens are the 8 x 8 grid of patches
TRAIN_CANVASES_PER_DIGIT = 10
LR_BACKBONE, LR_PREDICTORS = 2e-4, 2e-3


def train(
        dense: torch.nn.Module,
        canvases: torch.Tensor,
        labels: torch.Tensor,
        steps: int,
        batch_size: int,
        seed: int,
        tune: bool,
) -> torch.nn.Module:
    """A sparse model with trained predictors; `tune` trains the backbone as well."""
    torch.manual_seed(seed)
    model = timm_spot.sparsify(dense).train()
    groups = [dict(params=list(model.predictors.parameters()), lr=LR_PREDICTORS)]
    predictors = {id(p) for p in groups[0]['params']}
    backbone = [p for p in model.parameters() if id(p) not in predictors]
    for p in backbone:
        p.requires_grad_(tune)
    if tune:
        groups.append(dict(params=backbone, lr=LR_BACKBONE))
    task = RelevanceTask(model, dense, keep_rate=(0.4, 0.9), verbose=False).train()
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group['lr'] for group in groups], total_steps=steps, pct_start=0.1)
    begin = time.time()
    for step in range(steps):
        model.set_placement(n_tokens=(64, 49)[step // 2 % 2], sampler=('isotropic', 'sobol')[step % 2])
        chosen = torch.randint(len(labels), (batch_size,))
        result = task(to_input(canvases[chosen], model), labels[chosen])
        optimizer.zero_grad()
        result['loss'].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step == steps - 1:
            terms = '  '.join(f'{name} {value.item():.3f}' for name, value in result.items() if value.ndim == 0)
            click.echo(f'seed {seed} step {step:4d}/{steps}  {terms}  {(time.time() - begin) / 60:.1f} min')
    return model.eval()


@torch.inference_mode()
def correct(model: torch.nn.Module, batches: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Whether each canvas is read right, (canvases,)."""
    return torch.cat([model(images).argmax(dim=1) for images in batches]) == labels


def mean_and_error(values: torch.Tensor, digits: torch.Tensor) -> Tuple[float, float]:
    """Mean in percent of values (seeds, canvases) and its standard error, for digits and seeds drawn anew."""
    mean, error, seed_error = estimate_mean(values.double(), digits)
    return round(100 * mean, 2), round(100 * math.hypot(error, seed_error or 0.), 2)


def format_table(rows: List[dict]) -> str:
    """Markdown: one line a measurement."""
    columns = ('above_dense', 'below_relevance', 'above_25_placed')
    lines = ['| tokens | sampler | keep rate | scorer | 10^6 multiply-adds | accuracy | '
             + ' | '.join(c.replace('_', ' ') for c in columns) + ' |', '|---' * 9 + '|']
    for row in rows:
        cells = [f'{row[c]:+.2f} ± {row[f"{c}_error"]:.2f}' if c in row else '' for c in columns]
        cells = [row['n_tokens'], row['sampler'], row['keep_rate'], row['name'], f'{1e3 * row["gflops"]:.1f}',
                 f'{row["accuracy"]:.2f} ± {row["error"]:.2f}', *cells]
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines)


@click.command(help=__doc__)
@click.option('--out', type=click.Path(path_type=Path), required=True)
@click.option('--steps', default=150, show_default=True)
@click.option('--batch-size', default=64, show_default=True)
@click.option('--seeds', default=3, show_default=True)
@click.option('--tune', is_flag=True, help='Train the backbone as well.')
def main(out: Path, steps: int, batch_size: int, seeds: int, tune: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = timm.create_model(NAME, pretrained=True).eval()
    digits, labels = load_digits('train')
    canvases = torch.cat([draw_canvases(digits, generator, distort=True) for _ in range(TRAIN_CANVASES_PER_DIGIT)])
    arguments = (dense, canvases, labels.repeat(TRAIN_CANVASES_PER_DIGIT))
    trained = []
    for seed in range(seeds):
        folder = out / f'{"tuned" if tune else "frozen"}-{seed}'
        if not folder.exists():
            save_for_hf(train(*arguments, steps, batch_size, seed, tune), folder, safe_serialization=True)
        trained.append(timm.create_model(f'local-dir:{folder}', pretrained=True).eval())
    if not tune:
        shipped = {k: v.half().contiguous() for k, v in trained[0].state_dict().items()}
        save_file(shipped, out / f'relevance_{NAME}.digits.safetensors', metadata={'format': 'pt'})
    models = {'relevance': trained}  # each name stands for a model of each seed
    for rival in RIVALS:
        # On one backbone only draws differ from seed to seed.
        backbones = enumerate(trained if tune or rival == 'random' else trained[:1])
        models[rival] = [model.pruned(scorer=rival, scorer_seed=seed) for seed, model in backbones]

    held_out, transform = Pictures('digits', 'validation'), model_transform(dense)
    pictures, labels = zip(*(held_out[i] for i in range(len(held_out))))
    batches, labels = torch.stack([transform(picture) for picture in pictures]).split(256), torch.tensor(labels)
    rows = []

    def measure(name: str, group: List[torch.nn.Module], n_tokens: int, sampler: str, keep_rate: float) -> torch.Tensor:
        for model in group:
            model.set_placement(n_tokens=n_tokens, sampler=sampler)
            if model is not dense:
                model.set_keep_rate(keep_rate)
        hits = torch.stack([correct(model, batches, labels) for model in group]).float()
        accuracy, error = mean_and_error(hits, held_out.groups)
        rows.append(dict(
            name=name, n_tokens=n_tokens, sampler=sampler, keep_rate=keep_rate,
            gflops=count_flops(group[0], batches[0][:1]) / 2e9, accuracy=accuracy, error=error))
        return hits

    def compare(column: str, difference: torch.Tensor) -> None:
        rows[-1][column], rows[-1][f'{column}_error'] = mean_and_error(difference, held_out.groups)

    for sampler in SAMPLERS:
        full = measure('dense', [dense], 64, sampler, 1.)
        click.echo(json.dumps(rows[-1]))
        for keep_rate in KEEP_RATES:
            for name, group in models.items():
                hits = measure(name, group, 64, sampler, keep_rate)
                compare('above_dense', hits - full)
                if name == 'relevance':
                    ours = hits
                else:
                    compare('below_relevance', ours - hits)
                click.echo(json.dumps(rows[-1]))
    for sampler in SAMPLERS:  # placed, then pruned to 25 on average over the blocks, against 25 placed
        placed = measure('dense', [dense], 25, sampler, 1.)
        click.echo(json.dumps(rows[-1]))
        for keep_rate in KEEP_RATES_49:
            for name in ('relevance', 'cls-attention', 'received-attention'):
                compare('above_25_placed', measure(name, models[name], 49, sampler, keep_rate) - placed)
                click.echo(json.dumps(rows[-1]))
    (out / 'relevance.json').write_text(json.dumps(rows, indent=1) + '\n')
    click.echo(format_table(rows))


if __name__ == '__main__':
    main()
