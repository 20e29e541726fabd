"""The whole model: images/s and peak memory against the bare encoder (the limit) and ViTs that save tokens otherwise.

    python -m benchmarks model
"""
from __future__ import annotations

from typing import Callable, Dict, List, Sequence, Tuple

import timm
import torch

from .measure import Config, Section, alternate, cpu_flags, in_child, peak, reset_peak
from .references import BASE, BareEncoder, DroppedPatches, tome_vit

BUDGETS = (25, 49, 100, 196)
BATCH = 8
Case = Tuple[torch.dtype, int, int]


def run(config: Config) -> Section:
    section = Section()
    model = timm.create_model(BASE, **config.model_args).to(config.device).eval().requires_grad_(False)
    with torch.inference_mode():
        cases = [(torch.float32, batch, n) for batch in (1, BATCH) for n in BUDGETS] + [(torch.bfloat16, BATCH, 25)]
        seconds = against_the_limit(section, config, model, cases)
        _judge(section, config, cases, seconds)
        _against_rivals(section, config, model)
    memory = peak_memory(section, config, [(batch, n) for batch in (1, BATCH) for n in BUDGETS])
    section.judge(
        'peak memory, 25 tokens, batch 8, above that of the bare encoder',
        memory[BATCH, 25]['float32'] - memory[BATCH, 25]['tokens'], at_most=30, unit=' MB')
    return section


def against_the_limit(
        section: Section,
        config: Config,
        model: torch.nn.Module,
        cases: Sequence[Case],
) -> List[Dict[str, float]]:
    """Seconds of the model and of the bare encoder for each (dtype, batch, tokens)."""
    rows = section.table(
        f'{BASE} against the bare encoder fed as many ready tokens, eager, images/s', 'dtype', 'batch', 'tokens',
        'timm_spot', 'bare encoder', 'ratio')
    seconds = []
    for dtype, batch, n in cases:
        model.to(dtype).set_placement(n_tokens=n)
        images = torch.randn(batch, 3, 224, 224, device=config.device, dtype=dtype)
        tokens, bare = model.patch_embed(images), BareEncoder(model)
        t = alternate({'ours': lambda x=images: model(x), 'bare': lambda x=tokens, m=bare: m(x)}, config)
        rows.append([
            str(dtype).removeprefix('torch.'), str(batch), str(n), f"{batch / t['ours']:.1f}",
            f"{batch / t['bare']:.1f}", f"{t['bare'] / t['ours']:.3f}"])
        seconds.append(t)
    model.float()
    return seconds


def _judge(section: Section, config: Config, cases: Sequence[Case], seconds: List[Dict[str, float]]) -> None:
    measured = dict(zip(cases, seconds))
    curves: Dict[str, List[float]] = {'tokens': list(BUDGETS), 'timm_spot': [], 'bare encoder': []}
    for n in BUDGETS:
        t = measured[torch.float32, BATCH, n]
        section.judge(
            f"whole model, {n} tokens, batch {BATCH}: share of the bare encoder's images/s", t['bare'] / t['ours'],
            at_least=0.97)
        curves['timm_spot'].append(BATCH / t['ours'])
        curves['bare encoder'].append(BATCH / t['bare'])
    section.curves[f'images/s by tokens (batch {BATCH}, float32)'] = curves

    gain = measured[torch.float32, BATCH, 25]['ours'] / measured[torch.bfloat16, BATCH, 25]['ours']
    if config.device == 'cuda' or {'amx_bf16', 'avx512_bf16'} & cpu_flags():
        section.judge(f'bfloat16, 25 tokens, batch {BATCH}: times float32', gain, at_least=2)
    else:
        section.remarks.append(
            f'This CPU has neither AMX nor bf16 instructions: bfloat16 runs at {gain:.2f} of the speed of float32, and '
            'its bar (2, where the CPU has them) does not apply.')


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
    # As a pair, of which many more rounds fit into the time than of the whole table.
    model.set_placement(n_tokens=25)
    pair = alternate({'dense': lambda: dense(images), 'ours': lambda: model(images)}, config)
    section.judge(
        "whole model, 25 tokens, batch 8: times the dense ViT-B/16's images/s", pair['dense'] / pair['ours'],
        at_least=6)


def peak_memory(
        section: Section,
        config: Config,
        cases: Sequence[Tuple[int, int]],
) -> Dict[Tuple[int, int], Dict[str, float]]:
    """MB of inference for each (batch, tokens), on float32 images, uint8 images, and of the bare encoder."""
    rows = section.table(
        'Peak memory of inference above that of the loaded model, MB, float32, a process for each',
        'batch', 'tokens', 'timm_spot, float32 images', 'timm_spot, uint8 images', 'bare encoder, ready tokens')
    memory = {}
    for batch, n in cases:
        memory[batch, n] = {
            kind: in_child(inference_memory, kind, batch, n, config) for kind in ('float32', 'uint8', 'tokens')}
        rows.append([str(batch), str(n), *(f'{m:.0f}' for m in memory[batch, n].values())])
    return memory


def inference_memory(kind: str, batch: int, n_tokens: int, config: Config) -> float:
    """Peak memory in MB of one forward pass, its input included, above the built model's. Call in a fresh process."""
    torch.set_num_threads(config.threads)
    model = timm.create_model(BASE, n_tokens=n_tokens, **config.model_args).to(config.device).eval()
    for p in model.parameters():
        p.data.normal_(std=0.02)  # touch every page, zeros included
    before = reset_peak(config.device)
    with torch.inference_mode():
        if kind == 'tokens':
            BareEncoder(model)(torch.randn(batch, n_tokens, model.embed_dim, device=config.device))
        elif kind == 'uint8':
            model(torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8, device=config.device))
        else:
            model(torch.randn(batch, 3, 224, 224, device=config.device))
    return peak(config.device) - before
