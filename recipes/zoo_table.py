"""Write the table of registered models: parameters, GFLOPs by budget, licence and source of the weights.

    python recipes/zoo_table.py --out docs/zoo.md

Nothing is downloaded and no weights are needed: models are built on torch's meta device. GFLOPs are those of a forward
pass on one image, a multiplication and an addition counted as two.
"""
from __future__ import annotations

import math
from pathlib import Path

import click
import timm
import torch

import timm_spot  # noqa: F401  registers the models
from timm_spot.models.spot_vit import SubpixelVisionTransformer
from timm_spot.tasks.evaluation.families import list_families
from timm_spot.tasks.evaluation.flops import count_flops

SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of the full budget: 25, 49, 98 and 196 of 196 tokens
# Accuracy is named only where it was measured in this repository, with its page.
MEASURED = {
    'spot_vit_pico_patch8_64.digits':
        '96.4 % of the digits at 25 even tokens, 99.3 % at 64 ([digits](placement.md#on-the-digits))',
    'spot_vit_pico_patch8_64.digits_placed':
        '98.9 % of the digits at 9 tokens of its placer, 99.5 % at 25 ([digits](placement.md#on-the-digits))',
    'relevance_spot_vit_pico_patch8_64.digits':
        '99.4 % of the digits at keep rate 0.7 ([digits](evaluate.md#dropping-tokens))',
}


def gflops(model: torch.nn.Module, n_tokens: int) -> str:
    """Of one image through so many tokens."""
    H, W = model.patch_embed.img_size
    images = torch.zeros(1, model.patch_embed.proj.in_channels, H, W, device='meta')
    positions = torch.zeros(1, n_tokens, 2, device='meta')
    return f'{count_flops(lambda: model(images, positions=positions)) / 1e9:.3g}'


def source(tagged: str) -> tuple[str, str]:
    """Where the weights of a tag come from, and their licence as the config states it."""
    cfg = timm.get_pretrained_cfg(tagged)
    if cfg.hf_hub_id:
        where = f'Hub: `{cfg.hf_hub_id}`'
    elif cfg.file:
        where = 'in the package'
    elif cfg.origin_url:
        where = f"[the authors' file]({cfg.origin_url})"
    else:
        return 'none', ''
    return where, cfg.license or 'see its source'


BUDGETS = [f'GFLOPs at 1/{round(1 / share)}' for share in SHARES[:-1]] + ['GFLOPs at the full budget']
TITLES = dict(subpixel='Subpixel ViTs', pruned='ViTs that drop tokens', dHT='ViTs of regions')
ABOUT = """Made by `python recipes/zoo_table.py --out docs/zoo.md`, without weights. M: millions of parameters of the
model as it is created. GFLOPs: of a forward pass on one image, a multiplication and an addition counted as two; those
of a placement network come on top ([its cost](placement.md#on-the-digits)), those of models that drop tokens depend on
the keep rate ([fewer tokens](fewer_tokens.md)). Licences are what timm's configs say of the weights; that of the
authors' checkpoints is theirs to state. Accuracy stands here only where it was measured in this repository."""


@torch.no_grad()
def rows_of(name: str, by_budget: bool) -> list[str]:
    """A row for each tag of a model, with its GFLOPs by budget where the table has them."""
    model = timm.create_model(name, device='meta').eval()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    cells = [''] * len(SHARES) if by_budget else []
    if type(model) is SubpixelVisionTransformer:  # none of its kin, which drop tokens or hide them
        full = model.patch_embed.num_patches
        cells = [f'{gflops(model, n)} at {n}' for n in (math.ceil(full * share) for share in SHARES)]
    rows = []
    for tagged in timm.list_models(f'{name}.*', include_tags=True) or [name]:
        where, licence = source(tagged)
        shown = [f'`{tagged}`', f'{millions:.3g}', *cells, where, licence, MEASURED.get(tagged, '')]
        rows.append('| ' + ' | '.join(shown) + ' |')
    return rows


@click.command(help=__doc__)
@click.option('--out', type=click.Path(path_type=Path), required=True, help='Markdown file to write.')
def main(out: Path) -> None:
    lines = ['# Models', '', ABOUT]
    for family, title in TITLES.items():
        patterns = next(f.patterns for f in list_families() if f.name == family)
        names = timm.list_models(list(patterns))
        names = [name for name in names if name.startswith('relevance_') is (family == 'pruned')]
        budgets = BUDGETS if family == 'subpixel' else []
        head = ['name and tag', 'M', *budgets, 'weights', 'licence', 'measured']
        lines += ['', f'## {title}', '', f'| {" | ".join(head)} |', '|---' * len(head) + '|']
        lines += [row for name in names for row in rows_of(name, bool(budgets))]
    out.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    click.echo(f'{sum(line.startswith("| `") for line in lines)} rows in {out}')


if __name__ == '__main__':
    main()
