"""Models that drop or merge tokens, at one share of the dense model's multiply-adds: speed, and what matching costs.

    python -m benchmarks fewer_tokens

Fused attention is on in all of them; float32, the dense model called in turn with the others.
"""
from __future__ import annotations

from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import timm
import torch

import timm_spot
from timm_spot.models.pruning_flops import count_multiply_adds
from timm_spot.ops.merging import match_tokens, merge_tokens, plan_counts

from .measure import Config, Section, alternate, milliseconds

NAME, SHARE = 'deit_small_patch16_224', 0.6
SCORERS = ('merge', 'received-attention', 'cls-attention', 'random')
SPEED = {1: 1.3, 8: 1.5}  # bars by batch size


def run(config: Config) -> Section:
    section = Section()
    dense = timm.create_model(NAME, **config.model_args).eval().to(config.device)
    models: Dict[str, torch.nn.Module] = {'dense': dense}
    for scorer in SCORERS:
        models[scorer] = timm_spot.sparsify(dense, scorer=scorer)
        models[scorer].set_flops(SHARE)
    merging = models['merge']
    cost = count_multiply_adds(merging, merging.patch_embed.num_patches, merging.plan, 1.)
    section.remarks.append(f'merge: r={list(merging.r)}, {cost / 1e9:.2f} · 10^9 multiply-adds, matching included.')
    speed = section.table(
        f"{NAME} at {SHARE} of the multiply-adds, float32, ms (times the dense model's speed)", 'batch', *models)
    matching = section.table(f'{NAME}, merge, ms', 'batch', 'matching and merging', 'whole forward', 'share')
    with torch.inference_mode():
        for batch, bar in SPEED.items():
            images = torch.randn(batch, 3, 224, 224, device=config.device)
            calls: Dict[str, Callable[[], Any]] = {name: partial(model, images) for name, model in models.items()}
            calls['matching'] = partial(_match_and_merge, _inputs(merging, batch, config.device))
            t = alternate(calls, config)
            overhead = t.pop('matching')
            speed.append([str(batch), *(f"{milliseconds(s)} ({t['dense'] / s:.2f})" for s in t.values())])
            section.judge(
                f'{NAME} at {SHARE} of the multiply-adds by merging, batch {batch}: times the dense speed',
                t['dense'] / t['merge'], at_least=bar)
            share = overhead / t['merge']
            matching.append([str(batch), milliseconds(overhead), milliseconds(t['merge']), f'{share:.1%}'])
            section.judge(
                f'{NAME}, batch {batch}: matching and merging, of the forward', 100 * share, at_most=4, unit=' %')
    return section


def _inputs(model: torch.nn.Module, batch: int, device: str) -> List[Tuple[torch.Tensor, torch.Tensor, int]]:
    """Keys, tokens and numbers to merge of each block."""
    attention, left, given = model.blocks[0].attn, model.patch_embed.num_patches, []
    for r in plan_counts(left, len(model.blocks), (), (), model.r, True)[1]:
        if r:
            length = model.num_prefix_tokens + left
            keys = torch.randn(batch, attention.num_heads, length, attention.head_dim, device=device)
            given.append((keys, torch.randn(batch, length, model.embed_dim, device=device), r))
        left -= r
    return given


def _match_and_merge(given: List[Tuple[torch.Tensor, torch.Tensor, int]]) -> None:
    for keys, x, r in given:
        merge_tokens(x, None, match_tokens(keys, r, 1))
