"""Models that drop tokens beside the dense ones: FLOPs, parameters, speed.

    python -m benchmarks relevance

Fused attention is on in all of them. On a CPU float32 at batches of 1 and 8; on a GPU bfloat16 at 256, eager and
compiled.
"""
from __future__ import annotations

from typing import Dict

import timm
import torch

import timm_spot
from timm_spot.tasks.evaluation.flops import count_flops

from .measure import Config, Section, alternate, milliseconds

KEEP_RATE = 0.7
SPEED = {1: 1.2, 8: 1.35}  # bars by batch size
GPU_SPEED = {256: 1.4}
PUBLISHED = {'deit_small_patch16_224': 2.9, 'deit_base_patch16_224': 11.4}  # 10^9 multiply-adds


def run(config: Config) -> Section:
    section = Section()
    with torch.inference_mode():
        _sizes(section, config)
        _speed(section, config)
    return section


def _variants(name: str, config: Config) -> Dict[str, torch.nn.Module]:
    dense = timm.create_model(name, **config.model_args).eval()
    return {
        'dense': dense,
        'relevance, last': timm_spot.sparsify(dense, KEEP_RATE, read='last'),
        'relevance, all': timm_spot.sparsify(dense, KEEP_RATE, read='all'),
        'cls-attention': timm_spot.sparsify(dense, KEEP_RATE, scorer='cls-attention'),
        'random': timm_spot.sparsify(dense, KEEP_RATE, scorer='random'),
    }


def _sizes(section: Section, config: Config) -> None:
    rows = section.table(
        f'Size at keep rate {KEEP_RATE}, predictors included', 'model', 'scorer', '10^9 multiply-adds',
        'added parameters')
    for name, published in PUBLISHED.items():
        models = _variants(name, config)
        size = sum(p.numel() for p in models['dense'].parameters())
        for kind, model in models.items():
            flops = count_flops(model, torch.zeros(1, 3, 224, 224)) / 2e9
            added = sum(p.numel() for p in model.parameters()) / size - 1
            rows.append([name, kind, f'{flops:.2f}', f'{added:.2%}'])
            if kind == 'relevance, last':
                section.judge(
                    f'{name} at keep rate {KEEP_RATE}: deviation of its multiply-adds from the published {published}',
                    100 * abs(flops / published - 1), at_most=3, unit=' %')


def _speed(section: Section, config: Config) -> None:
    name, gpu = 'deit_small_patch16_224', config.device == 'cuda'
    dtype = torch.bfloat16 if gpu else torch.float32
    models = {kind: model.to(config.device, dtype) for kind, model in _variants(name, config).items()}
    rows = section.table(
        f"{name} at keep rate {KEEP_RATE}, {str(dtype).removeprefix('torch.')}, ms (times the dense model's speed)",
        'batch', *models)
    for compiled in (False, True) if gpu else (False,):
        ready = {kind: torch.compile(model) if compiled else model for kind, model in models.items()}
        for batch, bar in (GPU_SPEED if gpu else SPEED).items():
            images = torch.randn(batch, 3, 224, 224, device=config.device, dtype=dtype)
            t = alternate({kind: lambda m=model, x=images: m(x) for kind, model in ready.items()}, config)
            what = f"{batch}{', compiled' if compiled else ''}"
            rows.append([what, *(f"{milliseconds(s)} ({t['dense'] / s:.2f})" for s in t.values())])
            section.judge(
                f'{name} at keep rate {KEEP_RATE}, batch {what}: times the dense speed',
                t['dense'] / t['relevance, last'], at_least=bar)
