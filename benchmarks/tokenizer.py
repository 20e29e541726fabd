"""The tokenizer alone (windows, position feature, projection) against the straightforward way to write it.

    python -m benchmarks tokenizer
"""
from __future__ import annotations

from typing import Callable

import timm
import torch
import torch.nn.functional as F

from timm_spot.ops.windows import read_windows

from .measure import Config, Section, alternate, milliseconds
from .references import BASE, StraightforwardTokenizer, index_windows

BATCH = 8


def unfold_windows(images: torch.Tensor, window: int) -> torch.Tensor:
    """The patch grid's windows, which `F.unfold` can give."""
    return F.unfold(images, window, stride=window).transpose(1, 2)


def run(config: Config) -> Section:
    section = Section()
    # The blocks play no part: one is enough.
    model = timm.create_model(BASE, depth=1).to(config.device).eval().requires_grad_(False)
    embed = model.patch_embed
    straightforward = StraightforwardTokenizer(embed)
    images = torch.randn(BATCH, 3, 224, 224, device=config.device)
    bytes_ = torch.randint(256, images.shape, dtype=torch.uint8, device=config.device)
    mean, std = (127.5 * torch.ones(3, 1, 1, device=config.device) for _ in range(2))

    title = f'Tokenizer of {BASE}, float32, batch {BATCH}, ms'
    forward = section.table(
        f'{title}: forward', 'tokens', 'timm_spot', 'given positions (B, N, 2)', 'straightforward', 'projection alone',
        'straightforward / timm_spot', 'timm_spot / projection')
    backward = section.table(
        f'{title}: forward + backward to the positions', 'tokens', 'timm_spot', 'straightforward', 'ratio')
    windows = section.table(
        'Windows alone, ms', 'tokens', 'grid_sample (timm_spot)', 'advanced indexing', 'F.unfold (patch grid only)')
    eight_bit = section.table(
        'From uint8 images to tokens, ms', 'tokens', 'timm_spot on uint8', 'normalise the images, then timm_spot',
        'ratio')
    for n in (25, 49, 196):
        placer = model.placer.replaced(n_tokens=n)
        positions = placer(images).clone()
        torch.testing.assert_close(straightforward(images, positions), embed(images, positions), rtol=0, atol=1e-3)
        ready = read_windows(images, positions, embed.window, 'patch').flatten(2)

        with torch.inference_mode():
            t = alternate({
                'ours': lambda p=placer: embed(images, p(images)),
                'positions': lambda p=positions: embed(images, p),
                'straightforward': lambda p=positions: straightforward(images, p),
                'projection': lambda r=ready: F.linear(r, embed.proj.weight.flatten(1), embed.proj.bias),
                'windows': lambda p=positions: read_windows(images, p, embed.window, 'patch').flatten(2),
                'indexing': lambda p=positions: index_windows(images, p, embed.window).flatten(2),
                'unfold': lambda: unfold_windows(images, embed.window),
                'bytes': lambda p=placer: embed(bytes_, p(bytes_)),
                'normalised': lambda p=placer: embed(bytes_.float().sub_(mean).div_(std), p(bytes_)),
            }, config)
        speedup, multiple = t['straightforward'] / t['ours'], t['ours'] / t['projection']
        forward.append([
            str(n), *(milliseconds(t[k]) for k in ('ours', 'positions', 'straightforward', 'projection')),
            f'{speedup:.2f}', f'{multiple:.2f}'])
        windows.append([str(n), *(milliseconds(t[k]) for k in ('windows', 'indexing')),
                        milliseconds(t['unfold']) if n == 196 else '–'])
        eight_bit.append([
            str(n), milliseconds(t['bytes']), milliseconds(t['normalised']), f"{t['normalised'] / t['bytes']:.2f}"])

        def back(tokenize: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], p: torch.Tensor = positions) -> None:
            p = p.clone().requires_grad_()
            tokenize(images, p).sum().backward()

        t = alternate({'ours': lambda: back(embed), 'straightforward': lambda: back(straightforward)}, config)
        ratio = t['straightforward'] / t['ours']
        backward.append([str(n), milliseconds(t['ours']), milliseconds(t['straightforward']), f'{ratio:.2f}'])
        if n != 49:
            section.judge(f'tokenizer forward, {n} tokens: times the straightforward one', speedup, at_least=4)
            section.judge(f'the same with the backward to the positions, {n} tokens', ratio, at_least=2.5)
            section.remarks.append(f'At {n} tokens the tokenizer takes {multiple:.2f} times its projection alone.')
    return section
