"""What takes long to measure: batches of 64, and compiled models.

    python -m benchmarks large
"""
from __future__ import annotations

import shutil

import timm
import torch

from .measure import Config, Section, alternate, milliseconds
from .model import BATCH, BUDGETS, against_the_limit
from .references import BASE, BareEncoder

LARGE_BATCH = 64


def run(config: Config) -> Section:
    section = Section()
    model = timm.create_model(BASE, **config.model_args).to(config.device).eval().requires_grad_(False)
    with torch.inference_mode():
        _compiled(section, config, model)
        against_the_limit(section, config, model, [(torch.float32, LARGE_BATCH, n) for n in BUDGETS])
    return section


def _compiled(section: Section, config: Config, model: torch.nn.Module) -> None:
    if not shutil.which('g++'):
        section.remarks.append('Compiled models were not measured: torch.compile needs g++ on a CPU.')
        return
    model.set_placement(n_tokens=25)
    images = torch.randn(BATCH, 3, 224, 224, device=config.device)
    tokens, bare = model.patch_embed(images), BareEncoder(model)
    compiled = torch.compile(model, fullgraph=True)
    compiled_bare = torch.compile(bare, fullgraph=True)
    compiled(images), compiled_bare(tokens)
    t = alternate({
        'timm_spot, eager': lambda: model(images), 'timm_spot, compiled': lambda: compiled(images),
        'bare encoder, eager': lambda: bare(tokens), 'bare encoder, compiled': lambda: compiled_bare(tokens)}, config)
    rows = section.table(f'torch.compile(fullgraph=True), float32, batch {BATCH}, 25 tokens', 'model', 'ms', 'images/s')
    rows += [[name, milliseconds(s), f'{BATCH / s:.1f}'] for name, s in t.items()]
