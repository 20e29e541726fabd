"""The whole model: images/s and peak memory against the bare encoder (the limit) and ViTs that save tokens otherwise.

    python -m benchmarks model
"""
from __future__ import annotations

import shutil
from typing import Callable, Dict

import timm
import torch

from .measure import Config, Section, alternate, cpu_flags, in_child, milliseconds, peak, reset_peak
from .references import BASE, BareEncoder, DroppedPatches, tome_vit

BUDGETS = (25, 49, 100, 196)
BATCH = 8


def run(config: Config) -> Section:
    section = Section()
    model = timm.create_model(BASE, **config.model_args).to(config.device).eval().requires_grad_(False)
    with torch.inference_mode():
        _against_the_limit(section, config, model)
        _against_rivals(section, config, model)
        _compiled(section, config, model)
    _memory(section, config)
    return section


def _against_the_limit(section: Section, config: Config, model: torch.nn.Module) -> None:
    rows = section.table(
        f'{BASE} against the bare encoder fed as many ready tokens, eager, images/s', 'dtype', 'batch', 'tokens',
        'timm_spot', 'bare encoder', 'ratio')
    curves: Dict[str, list] = {'tokens': list(BUDGETS), 'timm_spot': [], 'bare encoder': []}
    seconds: Dict[torch.dtype, float] = {}
    # bfloat16 is slow where the CPU has no instruction for it: one row says how slow.
    batches = (1, BATCH) if config.quick else (1, BATCH, 64)
    cases = [(torch.float32, b, n) for b in batches for n in BUDGETS] + [(torch.bfloat16, BATCH, 25)]
    for dtype, batch, n in cases:
        model.to(dtype).set_placement(n_tokens=n)
        images = torch.randn(batch, 3, 224, 224, device=config.device, dtype=dtype)
        tokens, bare = model.patch_embed(images), BareEncoder(model)
        t = alternate({'ours': lambda x=images: model(x), 'bare': lambda x=tokens, m=bare: m(x)}, config)
        ratio = t['bare'] / t['ours']
        rows.append([
            str(dtype).removeprefix('torch.'), str(batch), str(n), f"{batch / t['ours']:.1f}",
            f"{batch / t['bare']:.1f}", f'{ratio:.3f}'])
        if batch == BATCH and dtype == torch.float32:
            section.judge(f"whole model, {n} tokens, batch {batch}: share of the bare encoder's images/s", ratio, 0.97)
            curves['timm_spot'].append(batch / t['ours'])
            curves['bare encoder'].append(batch / t['bare'])
        if batch == BATCH and n == 25:
            seconds[dtype] = t['ours']
    model.float()
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    if config.device == 'cuda' or {'amx_bf16', 'avx512_bf16'} & cpu_flags():
        section.judge('bfloat16, 25 tokens, batch 8: times float32', gain, at_least=2)
    else:
        section.remarks.append(
            f'This CPU has neither AMX nor bf16 instructions: bfloat16 runs at {gain:.2f} of the speed of float32, and '
            'its bar (2, where the CPU has them) does not apply.')
    section.curves['images/s by tokens (batch 8, float32)'] = curves


def _against_rivals(section: Section, config: Config, model: torch.nn.Module) -> None:
    def vit(name: str, **kwargs: object) -> torch.nn.Module:
        return timm.create_model(name, **kwargs, **config.model_args).to(config.device).eval()

    images = torch.randn(BATCH, 3, 224, 224, device=config.device)
    dense = vit('vit_base_patch16_224')
    calls: Dict[str, Callable[[], torch.Tensor]] = {'ViT-B/16, dense, 196 tokens': lambda: dense(images)}
    for n in (25, 49):
        def ours(n: int = n) -> torch.Tensor:
            model.set_placement(n_tokens=n)
            return model(images)

        side = {25: 80, 49: 112}[n]
        small, crop = vit('vit_base_patch16_224', img_size=side), images[..., :side, :side].contiguous()
        dropped = DroppedPatches(dense, n)
        calls[f'timm_spot, {n} tokens'] = ours
        calls[f'ViT-B/16 on {side} x {side} px, {n} tokens'] = lambda m=small, x=crop: m(x)
        calls[f'ViT-B/16, all but {n} patches dropped'] = lambda m=dropped: m(images)
    b32 = vit('vit_base_patch32_224')
    calls['ViT-B/32, 49 tokens'] = lambda: b32(images)
    if config.tome:
        for r in (8, 16):
            merging = tome_vit(config.tome, r, **config.model_args)
            calls[f'ViT-B/16 with ToMe, r = {r}'] = lambda m=merging: m(images)
    else:
        section.remarks.append('ToMe was not measured: give --tome, the folder of a clone of facebookresearch/ToMe.')
    t = alternate(calls, config)
    rows = section.table(f'Beside other ways to few tokens, float32, batch {BATCH}, eager', 'model', 'images/s',
                         'times the dense ViT')
    reference = t['ViT-B/16, dense, 196 tokens']
    for name, seconds in t.items():
        rows.append([name, f'{BATCH / seconds:.1f}', f'{reference / seconds:.2f}'])
    section.judge(
        "whole model, 25 tokens, batch 8: times the dense ViT-B/16's images/s", reference / t['timm_spot, 25 tokens'],
        at_least=6)


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


def _memory(section: Section, config: Config) -> None:
    rows = section.table(
        f'Peak memory of inference above that of the loaded model, MB, float32, batch {BATCH}, a process for each',
        'tokens', 'timm_spot, float32 images', 'timm_spot, uint8 images', 'bare encoder, ready tokens')
    for n in (25, 196):
        ours, eight_bit, bare = (
            in_child(inference_memory, kind, n, config) for kind in ('float32', 'uint8', 'tokens'))
        rows.append([str(n), f'{ours:.0f}', f'{eight_bit:.0f}', f'{bare:.0f}'])
        if n == 25:
            section.judge(
                'peak memory, 25 tokens, batch 8, above that of the bare encoder', ours - bare, at_most=30, unit=' MB')


def inference_memory(kind: str, n_tokens: int, config: Config) -> float:
    """Peak memory in MB of one forward pass, its input included, above the built model's. Call in a fresh process."""
    torch.set_num_threads(config.threads)
    model = timm.create_model(BASE, n_tokens=n_tokens, **config.model_args).to(config.device).eval()
    for p in model.parameters():
        p.data.normal_(std=0.02)  # touch every page, zeros included
    before = reset_peak(config.device)
    with torch.inference_mode():
        if kind == 'tokens':
            BareEncoder(model)(torch.randn(BATCH, n_tokens, model.embed_dim, device=config.device))
        elif kind == 'uint8':
            model(torch.randint(256, (BATCH, 3, 224, 224), dtype=torch.uint8, device=config.device))
        else:
            model(torch.randn(BATCH, 3, 224, 224, device=config.device))
    return peak(config.device) - before
