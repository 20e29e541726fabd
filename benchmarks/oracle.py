"""Time and memory of SPoT-ON: one step against one forward pass, and whole searches of 5 steps.

    python -m benchmarks oracle

A step is backward, optimizer and the next forward. Steps and forward passes are timed in turn. Peak memory is measured
in a process of its own for each row, above what the model and a forward pass need.
"""
from __future__ import annotations

import statistics
import time
from typing import Dict, List, Tuple

import timm
import torch

import timm_spot

from .measure import Config, Section, in_child, milliseconds, now, peak, reset_peak
from .references import BASE, BareEncoder

BATCH = 8
STEPS = 5


def run(config: Config) -> Section:
    section = Section()
    rows = section.table(
        f'SPoT-ON on {BASE}, float32, batch {BATCH}', 'tokens', 'bare encoder, forward, ms', 'timm_spot, forward, ms',
        'step, ms', 'step / bare forward', 'step / forward', f'search of {STEPS} steps, images/s', 'memory, MB',
        'with checkpointing, MB')
    for n in (25, 196):
        t = measure_time(n, config)
        memory = [in_child(measure_memory, n, checkpointing, config) for checkpointing in (False, True)]
        ratio = t['step'] / t['bare']
        rows.append([
            str(n), *(milliseconds(t[k]) for k in ('bare', 'forward', 'step')), f'{ratio:.2f}',
            f"{t['step'] / t['forward']:.2f}", f"{BATCH / t['search']:.2f}", *(f'{m:.0f}' for m in memory)])
        section.judge(f'one oracle step, {n} tokens: forwards of the bare encoder', ratio, at_most=2.2)
    return section


def build(config: Config) -> Tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(BASE, **config.model_args).to(config.device).eval()
    images = torch.randn(BATCH, 3, 224, 224, device=config.device)
    return model, images, torch.arange(BATCH, device=config.device)


def measure_time(n_tokens: int, config: Config) -> Dict[str, float]:
    """Medians, in seconds, of a forward pass of the bare encoder and of the model, a step, and a search."""
    model, images, targets = build(config)
    bare = BareEncoder(model)
    positions = timm_spot.sample_positions('isotropic', n_tokens, (224, 224)).to(config.device).expand(BATCH, -1, -1)
    with torch.no_grad():
        tokens = model.patch_embed(images, positions)
    times: Dict[str, List[float]] = dict(bare=[], forward=[], step=[], search=[])
    begin = 0.

    def watch(step: int, *_: torch.Tensor) -> None:
        nonlocal begin
        end = now(config.device)
        # The last evaluation has no graph to build and is no full step.
        if 0 < step < STEPS:
            times['step'].append(end - begin)
        with torch.inference_mode():
            bare(tokens)
            middle = now(config.device)
            model(images, positions)
        begin = now(config.device)
        times['bare'].append(middle - end)
        times['forward'].append(begin - middle)

    def search(**kwargs: object) -> None:
        timm_spot.optimize_positions(model, images, targets, n_tokens=n_tokens, steps=STEPS, **kwargs)

    start = time.perf_counter()
    search()  # warms up
    while len(times['search']) < 3 or time.perf_counter() - start < config.seconds:
        search(callback=watch)
        before = now(config.device)
        search()
        times['search'].append(now(config.device) - before)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_memory(n_tokens: int, checkpointing: bool, config: Config) -> float:
    """Peak memory of a search, in MB, above that of the model and a forward pass. Call it in a fresh process."""
    torch.set_num_threads(config.threads)
    model, images, targets = build(config)
    model.set_grad_checkpointing(checkpointing)
    with torch.inference_mode():
        model(images, timm_spot.sample_positions('isotropic', n_tokens, (224, 224)).to(config.device)[0])
    before = reset_peak(config.device)
    timm_spot.optimize_positions(model, images, targets, n_tokens=n_tokens, steps=2)
    return peak(config.device) - before
