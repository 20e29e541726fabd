"""Windows of any size: what the pyramid and reading from it add to a base model.

    python -m benchmarks sizes
"""
from __future__ import annotations

from functools import partial

import timm
import torch

from .measure import Config, Section, alternate, milliseconds
from .references import BASE

N_TOKENS = 25
BATCH = 8


def run(config: Config) -> Section:
    section = Section()
    model, plain = (
        timm.create_model(BASE, n_tokens=N_TOKENS, **coverage, **config.model_args).to(config.device).eval()
        for coverage in (dict(coverage=0.), {}))
    rows = section.table(
        f'{BASE}, float32, {N_TOKENS} tokens, ms: windows that tile the picture (coverage 1) and windows of single '
        'pixels', 'batch', 'sampler', 'model at coverage 0', 'at coverage 1', 'tokenizer at coverage 0',
        'at coverage 1', 'more', 'share of the model at coverage 0')
    with torch.inference_mode():
        for batch in (1, BATCH):
            images = torch.randn(batch, 3, 224, 224, device=config.device)
            for sampler in ('isotropic', 'center'):
                _compare(section, rows, config, model, images, sampler)
        t = alternate({'sized': lambda: model(images), 'plain': lambda: plain(images)}, config)
    section.judge(
        f"at coverage 0, batch {BATCH}: share of the images/s of a model without sizes", t['plain'] / t['sized'],
        at_least=0.97)
    return section


def _compare(
        section: Section,
        rows: list[list[str]],
        config: Config,
        model: torch.nn.Module,
        images: torch.Tensor,
        sampler: str,
) -> None:
    batch = len(images)
    calls = {}
    for coverage in (0, 1):
        placement = model.placer.replaced(sampler=sampler, coverage=float(coverage))(images)
        calls[f'model {coverage}'] = partial(model, images, placement)
        calls[f'tokens {coverage}'] = partial(model.patch_embed, images, placement)
    t = alternate(calls, config)
    more = t['tokens 1'] - t['tokens 0']
    rows.append([
        str(batch), sampler, *(milliseconds(t[name]) for name in ('model 0', 'model 1', 'tokens 0', 'tokens 1')),
        milliseconds(more), f"{more / t['model 0']:.1%}"])
    what = f'windows of sampler {sampler} that tile the picture, {N_TOKENS} tokens, batch {batch}'
    if batch == 1:
        section.judge(f'{what}: more than windows of single pixels', 1e3 * more, at_most=3, unit=' ms')
    else:
        section.judge(f'{what}: more, of the forward at coverage 0', 100 * more / t['model 0'], at_most=6, unit=' %')
