"""Try `timm_spot.retrofit` on every ViT name in timm and write the table in docs/retrofit.md.

    python recipes/retrofit_table.py --out docs/retrofit.md

Every model is built with random weights (no download). All but the models of `WHOLE` are built one block deep, which
keeps everything that retrofit touches; those are built whole and tried at 224 x 224 and a non-square size too.

* parity: largest difference of the logits from the source's on the full patch grid, relative to the largest logit.
* off the grid: error of the position feature at 2,000 random positions against bicubic interpolation of the source's
  position table, relative in the 2-norm, the table being a random 4 x 4 field enlarged.
"""
from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, Tuple

import click
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import timm_spot

# Modules of timm that hold ViTs, of whatever kind.
MODULES = (
    'vision_transformer', 'deit', 'vision_transformer_hybrid', 'vitamin', 'vision_transformer_relpos',
    'vision_transformer_sam', 'beit', 'eva', 'naflexvit')
WHOLE = (
    'vit_tiny_patch16_224', 'vit_small_patch16_224', 'vit_base_patch16_224', 'vit_large_patch16_224',
    'vit_base_patch32_224', 'vit_base_patch8_224', 'vit_small_patch14_dinov2', 'vit_small_patch14_reg4_dinov2',
    'vit_base_patch16_clip_224', 'vit_base_patch16_siglip_224', 'deit3_small_patch16_224', 'deit_base_patch16_224',
    'vit_medium_patch16_reg4_gap_256', 'vit_so150m_patch16_reg4_gap_256')
PARITY, OFF_GRID = 2e-4, 0.04


@torch.no_grad()
def randomise(vit: VisionTransformer) -> None:
    """Random weights of which every one matters: timm's fresh LayerScales and biases hide what hangs on them."""
    for name, p in vit.named_parameters():
        if name.endswith('gamma'):
            p.uniform_(0.1, 1)
        elif p.ndim == 1:
            p.add_(0.1 * torch.randn_like(p))
        elif name in ('cls_token', 'reg_token', 'pos_embed'):
            p.normal_(std=0.5)


@torch.inference_mode()
def parity(vit: VisionTransformer) -> float:
    spot = timm_spot.retrofit(vit, sampler='grid')
    images = torch.randn(1, 3, *vit.patch_embed.img_size)
    expected = vit(images)
    return ((spot(images) - expected).abs().max() / expected.abs().max()).item()


@torch.inference_mode()
def off_grid(vit: VisionTransformer) -> float:
    grid = vit.patch_embed.grid_size
    prefix = vit.pos_embed.shape[1] - grid[0] * grid[1]
    field = torch.randn(1, vit.embed_dim, 4, 4)
    table = F.interpolate(field, size=grid, mode='bicubic', align_corners=False)
    vit.pos_embed[:, prefix:] = table.flatten(2).transpose(1, 2)
    positions = torch.rand(1, 2000, 2)
    patch, size = vit.patch_embed.patch_size, vit.patch_embed.img_size
    covered = torch.tensor([n * p / s for n, p, s in zip(grid, patch, size)])  # by whole patches
    points = 2 * (positions / covered).flip(-1)[:, None] - 1
    expected = F.grid_sample(table, points, mode='bicubic', padding_mode='border', align_corners=False)
    expected = expected[0, :, 0].T
    embed = timm_spot.retrofit(vit).patch_embed
    actual = embed.pos_proj(embed.position_feature(positions, *vit.patch_embed.img_size))[0]
    return ((actual - expected).norm() / expected.norm()).item()


def measure(name: str, **kwargs: object) -> Tuple[float, float]:
    torch.manual_seed(0)
    vit = timm.create_model(name, **kwargs).eval()
    randomise(vit)
    return parity(vit), off_grid(vit)


def row(name: str, built: str, size: Tuple[int, int], errors: Tuple[float, float]) -> str:
    passed = errors[0] <= PARITY and errors[1] <= OFF_GRID
    return (f"| {name} | {built} | {size[0]} x {size[1]} | {errors[0]:.1e} | {100 * errors[1]:.2f} % | "
            f"{'pass' if passed else 'fail'} |")


def try_whole(name: str) -> List[str]:
    vit = timm.create_model(name, depth=1)
    patch = vit.patch_embed.patch_size[0]
    sizes = dict.fromkeys([vit.patch_embed.img_size, (224, 224), (160 // patch * patch, 224)])
    return [row(name, 'whole', size, measure(name, img_size=size)) for size in sizes]


@click.command(help=__doc__)
@click.option('--out', type=click.Path(path_type=Path), required=True, help='Markdown file to write.')
@click.option('--names', default='', help='Only names that match this regular expression.')
def main(out: Path, names: str) -> None:
    passed: List[str] = []
    refused: Dict[str, List[str]] = defaultdict(list)
    candidates = [n for module in MODULES for n in timm.list_models(module=module) if re.search(names, n)]
    for name in candidates:
        with torch.device('meta'):
            vit = timm.create_model(name)
        try:
            timm_spot.retrofit(vit)
        except ValueError as e:
            refused[str(e).split('retrofitted: ')[1].rstrip('.')].append(name)
            continue
        rows = try_whole(name) if name in WHOLE else [
            row(name, 'one block', vit.patch_embed.img_size, measure(name, depth=1))]
        passed += rows
        click.echo('\n'.join(rows))
    failures = sum(r.endswith('| fail |') for r in passed)
    lines = [
        '# What `retrofit` takes\n',
        f'Made by `python recipes/retrofit_table.py --out {out}` with timm {timm.__version__}: {len(candidates)} '
        f'names tried, {sum(map(len, refused.values()))} refused, {failures} rows failed. What the columns mean is '
        'said in that script; a row passes with a parity of at most 2e-4 and an error off the grid of at most 4 %.\n',
        '| name | built | image | parity | off the grid | result |\n|---|---|---|---|---|---|',
        *passed,
        '\n## Refused\n',
    ]
    for reason, rejected in refused.items():
        lines.append(f"* {reason}: {', '.join(rejected)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
