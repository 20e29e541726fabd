"""Train `spot_vit_pico_patch8_64.digits`, the model that ships with timm_spot. Under 30 minutes on two cores.

    python recipes/train_digits.py --out build/digits

Each token is uniform over the canvas, drawn anew for each canvas and step; in every other batch the tokens are
independent ('uniform'), in the others they avoid each other ('sobol'). The budget of a batch is 9 to 64 (log-uniform,
so that small budgets are as common as large ones). Muon, as timm has it, gets off the long plateau at the start an
order of magnitude sooner than AdamW.
Writes the weights in half precision and a model card with the accuracy on digits never seen in training.

With `--sizes` every second pair of batches has a coverage between 0 and 1, and the card has a table at coverage 1 too.
"""
from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Dict, List, Sequence

import click
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2, muon
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import timm_spot
from timm_spot.models.subpixel_embed import patch_sigma
from timm_spot.ops import fit_position_weights
from timm_spot.ops.placements import sample_placement
from timm_spot.tasks.pictures.digits import CANVAS, draw_canvases, load_digits, to_input

NAME = 'spot_vit_pico_patch8_64'
BUDGETS = (9, 16, 25, 49, 64)
PLACEMENTS = ('random patches', 'uniform', 'isotropic', 'center')
TRAIN_CANVASES_PER_DIGIT = 40  # drawn once: a step then costs the model only
CANVASES_PER_DIGIT = 10  # in the held-out evaluation


@torch.no_grad()
def sine_table(dim: int, side: int) -> torch.Tensor:
    """Sine-cosine position table (side, side, dim)."""
    angle = torch.arange(side)[:, None] / 100 ** (torch.arange(dim // 4) / (dim // 4))
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    return torch.cat([axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)], dim=2)


@torch.no_grad()
def start_from_sines(embed: torch.nn.Module, side: int = 14, scale: float = 0.5) -> None:
    """Let the position columns begin as those of a sine-cosine position table: near positions look alike at once."""
    table = sine_table(embed.pos_proj.out_features, side)
    sigma = patch_sigma(embed.n_sigma, embed.pos_nodes)
    embed.pos_proj.weight.copy_(scale * fit_position_weights(table, embed.pos_nodes, sigma))


def place(
        placement: str,
        n_tokens: int,
        batch_size: int,
        generator: torch.Generator,
        coverage: float = 0.,
) -> torch.Tensor:
    """Placements (B, N, 2 or 4); 'random patches' are n of the 64 patches of the grid, as when a ViT drops patches."""
    if placement != 'random patches':
        return sample_placement(
            placement, n_tokens, (CANVAS, CANVAS), batch_size, generator=generator, window=8, coverage=coverage)
    grid = timm_spot.sample_positions('grid', 64, (CANVAS, CANVAS), batch_size, window=8)
    chosen = torch.rand(batch_size, 64, generator=generator).argsort(dim=1)[:, :n_tokens]
    return grid.gather(1, chosen[..., None].expand(-1, -1, 2))


@torch.inference_mode()
def evaluate(
        model: torch.nn.Module,
        placements: Sequence[str] = PLACEMENTS,
        coverage: float = 0.,
) -> Dict[str, List[float]]:
    """Accuracy in percent on canvases of held-out digits, for each placement at each budget."""
    digits, labels = load_digits('held_out')
    generator = torch.Generator().manual_seed(1)
    canvases = [to_input(draw_canvases(digits, generator), model) for _ in range(CANVASES_PER_DIGIT)]
    table = {}
    for placement in placements:
        table[placement] = []
        for n_tokens in BUDGETS:
            correct = 0
            for images in canvases:
                positions = place(placement, n_tokens, len(images), generator, coverage)
                correct += (model(images, positions).argmax(dim=1) == labels).sum().item()
            table[placement].append(100 * correct / (len(labels) * CANVASES_PER_DIGIT))
    return table


def format_table(table: Dict[str, List[float]]) -> str:
    lines = ['| placement | ' + ' | '.join(f'{n} tokens' for n in BUDGETS) + ' |', '|---' * (len(BUDGETS) + 1) + '|']
    lines += [f'| {name} | ' + ' | '.join(f'{a:.1f}' for a in row) + ' |' for name, row in table.items()]
    return '\n'.join(lines)


def write(model: torch.nn.Module, out: Path, table: Dict[str, List[float]], command: str, minutes: float) -> None:
    """Write weights in half precision and the model card."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, out / f'{NAME}.digits.safetensors', metadata={'format': 'pt'})
    parameters = sum(p.numel() for p in model.parameters())
    trained, held_out = len(load_digits('train')[1]), len(load_digits('held_out')[1])
    (out / f'{NAME}.digits.md').write_text(
        f'# {NAME}.digits\n\n'
        f'A subpixel ViT of {parameters / 1e6:.2f} M parameters (half precision on disk) that reads handwritten '
        'digits on 64 x 64 canvases.\n\n'
        "**Data.** scikit-learn's `load_digits` (UCI, *Optical Recognition of Handwritten Digits*, CC BY 4.0): "
        f'{trained:,} digits to train; every fifth, {held_out} in all, held out. Each is enlarged to 24-40 px at a '
        'random place of a canvas with noise and up to four stray strokes (`timm_spot/tasks/digits.py`).\n\n'
        '**Training.** Uniform random placements (independent in half of the batches, Sobol points in the others), '
        'anew for each canvas, at a random budget of 9 to 64 tokens for each batch (log-uniform). '
        f'`{command}`, {minutes:.0f} minutes.\n\n'
        f'**Accuracy** in percent on {held_out * CANVASES_PER_DIGIT:,} canvases of held-out digits '
        f"({CANVASES_PER_DIGIT} of each); 'random patches' are n of the 64 patches of the grid, as when a ViT drops "
        'patches:\n\n'
        f'{format_table(table)}\n\n'
        '**Licence.** Apache-2.0.\n')
    (out / 'accuracy.json').write_text(json.dumps(dict(budgets=BUDGETS, accuracy=table), indent=1) + '\n')


@click.command(help=__doc__)
@click.option('--out', type=click.Path(path_type=Path), required=True, help='Folder for weights and model card.')
@click.option('--steps', default=4000, show_default=True, help='Optimiser steps.')
@click.option('--batch-size', default=128, show_default=True)
@click.option('--lr', default=4e-3, show_default=True)
@click.option('--weight-decay', default=0.05, show_default=True)
@click.option('--seed', default=0, show_default=True)
@click.option('--sizes', is_flag=True, help='Windows of many sizes in half of the batches.')
def main(out: Path, steps: int, batch_size: int, lr: float, weight_decay: float, seed: int, sizes: bool) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    digits, labels = load_digits('train')
    model = timm.create_model(NAME, drop_path_rate=0.05, weight_init='jax', size_embed=sizes)
    start_from_sines(model.patch_embed)
    # In bfloat16, timm's default, the orthogonalisation takes three times as long on a CPU without AMX.
    muon.zeropower_via_newtonschulz = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    optimizer = create_optimizer_v2(model, 'muon', lr=lr, weight_decay=weight_decay)
    warmup = min(300, steps // 10)
    scheduler = CosineLRScheduler(optimizer, steps, warmup_t=warmup, warmup_lr_init=1e-5, t_in_epochs=False)
    ema = ModelEmaV3(model, decay=0.998, use_warmup=True)

    begin = time.time()
    canvases = torch.cat([draw_canvases(digits, generator, distort=True) for _ in range(TRAIN_CANVASES_PER_DIGIT)])
    labels = labels.repeat(TRAIN_CANVASES_PER_DIGIT)
    click.echo(f'{len(canvases)} canvases drawn in {time.time() - begin:.0f} s')
    for step in range(steps):
        chosen = torch.randint(len(labels), (batch_size,), generator=generator)
        n_tokens = int(9 * (65 / 9) ** torch.rand((), generator=generator).item())
        sampler = ('uniform', 'sobol')[step % 2]
        coverage = torch.rand((), generator=generator).item() if sizes and step % 4 >= 2 else 0.
        positions = place(sampler, n_tokens, batch_size, generator, coverage)
        logits = model(to_input(canvases[chosen], model), positions)
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step_update(step)
        ema.update(model, step)
        if step % 100 == 0 or step == steps - 1:
            minutes = (time.time() - begin) / 60
            click.echo(f'step {step:5d}/{steps}  tokens {n_tokens:2d}  loss {loss.item():.3f}  {minutes:5.1f} min')

    # What ships is what is measured: round to half precision first.
    shipped = ema.module.eval()
    shipped.load_state_dict({k: v.half().float() for k, v in shipped.state_dict().items()})
    table = evaluate(shipped)
    if sizes:
        covering = evaluate(shipped, ('uniform', 'isotropic', 'center'), coverage=1.)
        table |= {f'{placement}, coverage 1': row for placement, row in covering.items()}
    command = f'python recipes/train_digits.py --out {out} --steps {steps} --batch-size {batch_size} --lr {lr}'
    command += f' --weight-decay {weight_decay} --seed {seed}' + sizes * ' --sizes'
    write(shipped, out, table, command, (time.time() - begin) / 60)
    click.echo(format_table(table))


if __name__ == '__main__':
    main()
