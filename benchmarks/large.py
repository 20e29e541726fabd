"""What takes long to measure: compiled models, and batches of 64.

    python -m benchmarks large
"""
from __future__ import annotations

import shutil
from functools import partial

import timm
import torch

from .measure import Config, Section, alternate
from .model import BATCH, BUDGETS, against_the_limit, peak_memory
from .references import BASE, BareEncoder

LARGE_BATCH = 64


def run(config: Config) -> Section:
    section = Section()
    model = timm.create_model(BASE, **config.model_args).to(config.device).eval().requires_grad_(False)
    with torch.inference_mode():
        _compiled(section, config, model)
        against_the_limit(section, config, model, [(torch.float32, LARGE_BATCH, n) for n in BUDGETS])
    peak_memory(section, config, [(LARGE_BATCH, n) for n in BUDGETS])
    return section


def _compiled(section: Section, config: Config, model: torch.nn.Module) -> None:
    if not shutil.which('g++'):
        section.remarks.append('Compiled models were not measured: torch.compile needs g++ on a CPU.')
        return
    rows = section.table(
        'torch.compile(fullgraph=True), float32, images/s', 'batch', 'tokens', 'timm_spot, eager',
        'timm_spot, compiled', 'bare encoder, eager', 'bare encoder, compiled')
    for batch, n in ((1, 25), (BATCH, 25), (BATCH, 196)):
        torch.compiler.reset()  # one program for each shape, none for sizes that change
        model.set_placement(n_tokens=n)
        images = torch.randn(batch, 3, 224, 224, device=config.device)
        tokens, bare = model.patch_embed(images), BareEncoder(model)
        calls = {'ours': (model, images), 'ours, compiled': (torch.compile(model, fullgraph=True), images),
                 'bare': (bare, tokens), 'bare, compiled': (torch.compile(bare, fullgraph=True), tokens)}
        t = alternate({name: partial(f, x) for name, (f, x) in calls.items()}, config)
        rows.append([str(batch), str(n), *(f'{batch / seconds:.1f}' for seconds in t.values())])
