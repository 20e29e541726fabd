"""FLOPs, parameters and speed of token relevance beside the dense model.

    python benchmarks/relevance.py [--threads 2] [--device cuda --dtype bfloat16 --batch-size 256 --compile]

FLOPs are multiply-adds, counted by torch's FlopCounterMode. Times are medians over rounds in which dense and sparse
models take turns, so that what else the machine does falls on all of them; fused attention is on in all.
"""
from __future__ import annotations

import statistics
import time
from typing import Dict, List, Tuple

import click
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import timm_spot


def gflops(model: torch.nn.Module) -> float:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops() / 2 / 1e9


def milliseconds(models: Dict[str, torch.nn.Module], images: torch.Tensor, rounds: int) -> Dict[str, float]:
    """Median time of a forward of each model."""
    times: Dict[str, List[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for i in range(-3, rounds):
            for name, model in models.items():
                begin = time.perf_counter()
                model(images)
                if images.is_cuda:
                    torch.cuda.synchronize()
                if i >= 0:
                    times[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


@click.command(help=__doc__)
@click.option('--model', 'names', multiple=True, default=('deit_small_patch16_224', 'deit_base_patch16_224'))
@click.option('--time', 'timed', multiple=True, default=('deit_small_patch16_224',), help='Which of them to time.')
@click.option('--keep-rate', default=0.7, show_default=True)
@click.option('--batch-size', 'batch_sizes', multiple=True, type=int, default=(1, 8), show_default=True)
@click.option('--rounds', default=15, show_default=True)
@click.option('--threads', default=2, show_default=True)
@click.option('--device', default='cpu', show_default=True)
@click.option('--dtype', default='float32', show_default=True)
@click.option('--compile', 'compiled', is_flag=True)
def main(
        names: Tuple[str, ...],
        timed: Tuple[str, ...],
        keep_rate: float,
        batch_sizes: Tuple[int, ...],
        rounds: int,
        threads: int,
        device: str,
        dtype: str,
        compiled: bool,
) -> None:
    torch.set_num_threads(threads)
    for name in names:
        dense = timm.create_model(name).eval()
        models = {'dense': dense}
        for read in ('last', 'all'):
            models[f'relevance, {read}'] = timm_spot.sparsify(dense, keep_rate, read=read)
        for scorer in ('cls-attention', 'random'):
            models[scorer] = timm_spot.sparsify(dense, keep_rate, scorer=scorer)
        size = sum(p.numel() for p in dense.parameters())
        for kind, model in models.items():
            added = sum(p.numel() for p in model.parameters()) / size - 1
            click.echo(f'{name}  {kind:20}  {gflops(model):6.3f} GFLOPs  {added:+.2%} parameters')
        if name not in timed:
            continue
        assert all(block.attn.fused_attn for model in models.values() for block in model.blocks)
        for model in models.values():
            model.to(device, getattr(torch, dtype))
        ready = {kind: torch.compile(model) if compiled else model for kind, model in models.items()}
        for batch_size in batch_sizes:
            images = torch.randn(batch_size, 3, 224, 224, device=device, dtype=getattr(torch, dtype))
            times = milliseconds(ready, images, rounds)
            for kind, value in times.items():
                ratio = times['dense'] / value
                click.echo(f'{name}  batch {batch_size}  {kind:20}  {value:8.1f} ms  {ratio:.2f} x dense')


if __name__ == '__main__':
    main()
