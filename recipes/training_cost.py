"""What fine-tuning at random budgets costs: measured steps, the hours that follow, and the operations behind them.

    python recipes/training_cost.py --device cuda --amp --batch-size 128
    python recipes/training_cost.py --batch-size 8 --tera-flops 100

A step is forward, backward and AdamW on random images, without loading them. It is timed at budgets evenly spaced on
the logarithmic scale that random budgets are drawn from, so that their mean is the mean of training. The hours are an
estimate: epochs x images / (images/s), on one such device. --tera-flops adds those of a device that sustains so many
10^12 operations a second, from the operations counted (a multiplication and an addition are two) and nothing else.
"""
from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Optional, Tuple

import click
import timm
import torch
from timm.optim import create_optimizer_v2

import timm_spot  # noqa: F401  registers the models
from timm_spot.tasks.evaluation.flops import count_flops

POINTS = 7  # budgets that are timed
REPEATS = 5


@click.command(help=__doc__)
@click.option('--model', 'name', default='spot_vit_base_patch16_mae', show_default=True)
@click.option('--budgets', type=(int, int), default=(25, 196), show_default=True)
@click.option('--epochs', default=20, show_default=True)
@click.option('--images', 'n_images', default=1_281_167, show_default=True, help="Of an epoch; ImageNet-1k's.")
@click.option('--batch-size', default=128, show_default=True)
@click.option('--device', default='cpu', show_default=True)
@click.option('--amp', is_flag=True, help='bfloat16.')
@click.option('--tera-flops', type=float, help='Sustained speed of a device that is not at hand.')
def main(
        name: str,
        budgets: Tuple[int, int],
        epochs: int,
        n_images: int,
        batch_size: int,
        device: str,
        amp: bool,
        tera_flops: Optional[float],
) -> None:
    model = timm.create_model(name).to(device).train()
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-6)
    size = timm.data.resolve_model_data_config(model)['input_size']
    images = torch.randn(batch_size, *size, device=device)
    targets = torch.randint(model.num_classes, (batch_size,), device=device)

    def forward_backward() -> None:
        with torch.autocast(images.device.type, torch.bfloat16) if amp else nullcontext():
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()

    def step() -> float:
        begin = time.perf_counter()
        optimizer.zero_grad()
        forward_backward()
        optimizer.step()
        if images.device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    low, high = budgets
    seconds, flops = [], []
    for i in range(POINTS):
        n_tokens = round(low * (high / low) ** ((i + 0.5) / POINTS))
        model.set_placement(n_tokens=n_tokens, sampler='uniform')
        step()  # warms up
        seconds.append(statistics.median(step() for _ in range(REPEATS)))
        flops.append(count_flops(forward_backward))
        click.echo(
            f'{n_tokens:4d} tokens  {1 / seconds[-1]:.3f} steps/s  {flops[-1] / batch_size / 1e9:.1f} GFLOP an image')
    where = torch.cuda.get_device_name() if images.device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    rate = batch_size / statistics.mean(seconds)
    click.echo(f'{where}, batch {batch_size}, {"bfloat16" if amp else "float32"}: {rate:.2f} images/s in the mean; '
               f'{epochs} epochs of {n_images:,} images take {epochs * n_images / rate / 3600:,.0f} hours on one')
    total = epochs * n_images * statistics.mean(flops) / batch_size
    click.echo(f'{total:.2e} operations in all')
    if tera_flops:
        hours = total / tera_flops / 3.6e15
        click.echo(f'at {tera_flops:g} x 10^12 a second, if a device sustains them: {hours:.1f} hours')


if __name__ == '__main__':
    main()
