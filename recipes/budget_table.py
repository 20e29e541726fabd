"""Fixed budgets against random ones in training, on the digit canvases: accuracy at 9 to 64 tokens, three seeds each.

    python recipes/budget_table.py --out build/budget_table.json

Every arm sees the same canvases in the same number of batches with the same settings, placed on the isotropic lattice
with each token jittered inside its cell, anew for each canvas and batch ('sobol' does the same at a higher price). The
teacher of the self-distilled arm is the model trained at 64 tokens with the same seed, through timm's own
`LogitDistillationTask`; its own training and its forward passes come on top. Runs that are in the file already are not
repeated.
"""
from __future__ import annotations

import json
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import click
import timm
import torch
from timm.optim import create_optimizer_v2, muon
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask, LogitDistillationTask
from train_digits import start_from_sines

import timm_spot
from timm_spot.tasks.pictures.digits import draw_canvases, load_digits, to_input

MODEL = dict(model_name='spot_vit_pico_patch8_64', embed_dim=64, depth=3)  # small: twelve trainings on one core
BUDGETS = (9, 16, 25, 49, 64)
ARMS = {
    'fixed at 25': 25,
    'fixed at 64': 64,
    'random 9-64': (9, 64),
    'random 9-64, self-distilled': (9, 64),
}
DISTILLED, TEACHER = 'random 9-64, self-distilled', 'fixed at 64'


@timm_spot.register_sampler('jittered')
def jittered(
        n_tokens: int,
        image_size: Tuple[int, int],
        batch_size: int,
        generator: Optional[torch.Generator],
) -> torch.Tensor:
    lattice = timm_spot.sample_positions('isotropic', n_tokens, image_size)
    shift = torch.rand(batch_size, n_tokens, 2, generator=generator) - 0.5
    return (lattice + shift / n_tokens ** 0.5).clamp(0., 1.)


@lru_cache(maxsize=1)
def draw_training_set(seed: int) -> Tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    digits, labels = load_digits('train')
    canvases = torch.cat([draw_canvases(digits, generator, distort=True) for _ in range(10)])
    return canvases, labels.repeat(10)


def train(
        arm: str,
        seed: int,
        steps: int,
        batch_size: int,
        lr: float,
        teacher: Optional[torch.nn.Module],
) -> torch.nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    canvases, labels = draw_training_set(seed)
    model = timm.create_model(
        **MODEL, n_tokens=ARMS[arm], sampler='jittered', eval_sampler='isotropic', seed=seed, weight_init='jax')
    start_from_sines(model.patch_embed)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    if arm == DISTILLED:
        task = LogitDistillationTask(
            model, teacher, criterion, task_loss_weight=0.5, temperature=2.0, verbose=False)
    else:
        task = ClassificationTask(model, criterion, verbose=False)
    optimizer = create_optimizer_v2(model, 'muon', lr=lr, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, steps, warmup_t=steps // 10, warmup_lr_init=1e-5, t_in_epochs=False)
    task.train()
    for step in range(steps):
        chosen = torch.randint(len(labels), (batch_size,), generator=generator)
        loss = task(to_input(canvases[chosen], model), labels[chosen])['loss']
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step_update(step)
    return model.eval()


@torch.inference_mode()
def evaluate(model: torch.nn.Module) -> List[float]:
    """Accuracy in percent at each budget, isotropic, on four canvases of each held-out digit."""
    digits, labels = load_digits('held_out')
    generator = torch.Generator().manual_seed(1)
    canvases = [to_input(draw_canvases(digits, generator), model) for _ in range(4)]
    accuracy = []
    for n_tokens in BUDGETS:
        model.set_placement(eval_n_tokens=n_tokens)
        correct = sum((model(images).argmax(dim=1) == labels).sum().item() for images in canvases)
        accuracy.append(100 * correct / (len(canvases) * len(labels)))
    return accuracy


def format_table(runs: Dict[str, List[float]]) -> str:
    """Mean over seeds ± its standard error."""
    lines = ['| training | seeds | ' + ' | '.join(f'{n} tokens' for n in BUDGETS) + ' |',
             '|---' * (len(BUDGETS) + 2) + '|']
    for arm in ARMS:
        found = torch.tensor([accuracy for key, accuracy in runs.items() if key.split(', seed ')[0] == arm])
        if len(found) > 1:
            mean, error = found.mean(dim=0), found.std(dim=0) / len(found) ** 0.5
            cells = [f'{m:.1f} ± {e:.1f}' for m, e in zip(mean.tolist(), error.tolist())]
            lines.append(f'| {arm} | {len(found)} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


@click.command(help=__doc__)
@click.option('--out', type=click.Path(path_type=Path), required=True, help='JSON file of the runs.')
@click.option('--steps', default=1500, show_default=True)
@click.option('--batch-size', default=64, show_default=True)
@click.option('--lr', default=1e-2, show_default=True)
@click.option('--seed', 'seeds', multiple=True, default=(0, 1, 2), show_default=True)
def main(out: Path, steps: int, batch_size: int, lr: float, seeds: Tuple[int, ...]) -> None:
    # In bfloat16, timm's default, the orthogonalisation takes three times as long on a CPU without AMX.
    muon.zeropower_via_newtonschulz = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    runs = json.loads(out.read_text()) if out.exists() else {}
    for seed in seeds:
        teacher = None
        for arm in ('fixed at 64', 'random 9-64', 'fixed at 25', 'random 9-64, self-distilled'):
            key = f'{arm}, seed {seed}'
            weights = out.with_name(f'{out.stem}_teacher_{seed}.pt')
            if key not in runs:
                begin = time.time()
                if arm == DISTILLED:
                    teacher = timm.create_model(**MODEL, n_tokens=64)
                    teacher.load_state_dict(torch.load(weights, weights_only=True))
                model = train(arm, seed, steps, batch_size, lr, teacher)
                runs[key] = evaluate(model)
                if arm == TEACHER:
                    torch.save(model.state_dict(), weights)
                out.write_text(json.dumps(runs, indent=1) + '\n')
                click.echo(f'{key}: {[round(a, 1) for a in runs[key]]}  {(time.time() - begin) / 60:.1f} min')
    click.echo(format_table(runs))


if __name__ == '__main__':
    main()
