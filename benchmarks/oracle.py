"""Time and memory of one SPoT-ON step against one forward pass of the same model at the same budget.

    python -m benchmarks.oracle

A step is backward, optimizer and the next forward. Steps and forward passes are timed in turn, so that other load on
the machine meets them alike; the ratio is that of the medians. Peak memory is measured in a process of its own for each
row, on top of what the model and a forward pass need.
"""
from __future__ import annotations

import multiprocessing
import re
import statistics
import time
from pathlib import Path
from typing import List, Tuple

import click
import timm
import torch

import timm_spot


def build(name: str, batch_size: int, device: str) -> Tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name).to(device).eval()
    return model, torch.randn(batch_size, 3, 224, 224, device=device), torch.arange(batch_size, device=device)


def now(device: str) -> float:
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_time(
        name: str, batch_size: int, n_tokens: int, steps: int, repeats: int, device: str) -> Tuple[float, float]:
    """Medians, in seconds, of a forward pass and a step."""
    model, images, targets = build(name, batch_size, device)
    positions = timm_spot.sample_positions('isotropic', n_tokens, (224, 224)).to(device).expand(batch_size, -1, -1)
    forwards: List[float] = []
    strides: List[float] = []
    begin = [0.]

    def watch(step: int, *_: torch.Tensor) -> None:
        end = now(device)
        # The last evaluation has no graph to build and is no full step.
        if 0 < step < steps:
            strides.append(end - begin[0])
        with torch.inference_mode():
            model(images, positions)
        begin[0] = now(device)
        forwards.append(begin[0] - end)

    for _ in range(repeats):
        timm_spot.optimize_positions(model, images, targets, n_tokens=n_tokens, steps=steps, callback=watch)
    return statistics.median(forwards), statistics.median(strides)


def peak(device: str) -> float:
    """Peak memory in MB since `reset_peak`."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 20
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s+(\d+) kB', status).group(1)) / 1024


def reset_peak(device: str) -> float:
    """Start the peak anew from the memory in use now, and return that."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    else:
        Path('/proc/self/clear_refs').write_text('5')  # Linux only
    return peak(device)


def measure_memory(name: str, batch_size: int, n_tokens: int, checkpointing: bool, device: str) -> float:
    """Peak memory of a search, in MB, above that of the model and a forward pass. Call it in a fresh process."""
    model, images, targets = build(name, batch_size, device)
    model.set_grad_checkpointing(checkpointing)

    with torch.inference_mode():
        model(images, timm_spot.sample_positions('isotropic', n_tokens, (224, 224)).to(device)[0])
    before = reset_peak(device)
    timm_spot.optimize_positions(model, images, targets, n_tokens=n_tokens, steps=2)
    return peak(device) - before


@click.command(help=__doc__)
@click.option('--model', 'name', default='spot_vit_base_patch16_mae', show_default=True)
@click.option('--batch-size', default=8, show_default=True)
@click.option('--n-tokens', multiple=True, type=int, default=(25, 196), show_default=True)
@click.option('--steps', default=4, show_default=True)
@click.option('--repeats', default=3, show_default=True)
@click.option('--device', default='cpu', show_default=True)
def main(name: str, batch_size: int, n_tokens: Tuple[int, ...], steps: int, repeats: int, device: str) -> None:
    click.echo(f'{name}, batch of {batch_size}, torch {torch.__version__}, {torch.get_num_threads()} threads, {device}')
    click.echo('| tokens | forward, ms | step, ms | step / forward | memory, MB | with checkpointing, MB |')
    click.echo('|---' * 6 + '|')
    for n in n_tokens:
        forward, step = measure_time(name, batch_size, n, steps, repeats, device)
        memory = []
        for checkpointing in (False, True):
            with multiprocessing.get_context('spawn').Pool(1) as pool:
                memory.append(pool.apply(measure_memory, (name, batch_size, n, checkpointing, device)))
        click.echo(
            f'| {n} | {1e3 * forward:.0f} | {1e3 * step:.0f} | {step / forward:.2f} | '
            + ' | '.join(f'{m:.0f}' for m in memory) + ' |')


if __name__ == '__main__':
    main()
