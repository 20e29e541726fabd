"""A retrofitted ViT at coverage 1 against the ViT on the small picture with its position table resampled: zero-shot.

    python recipes/size_agreement.py DATA CHECKPOINT --backbone vit_small_patch14_dinov2 --img-size 140

Nothing is trained. Both see the same pictures of 224 px; the ViT sees them made smaller by an antialiased resize, the
subpixel model reads them through windows that tile them. What differs is the blur (a pyramid's against a resize's) and
the position table (a smooth fit against bicubic resampling). Printed for each budget: in how many of the pictures of
DATA's `validation` both have the same top-1, the accuracy of both, and the mean cosine of their logits.
"""
from __future__ import annotations

import math
from pathlib import Path

import click
import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_transform
from timm.models import load_checkpoint

import timm_spot

BUDGETS = (16, 25, 49, 100)


@torch.inference_mode()
def compare(vit: torch.nn.Module, n_tokens: int, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Share of equal answers, top-1 of the ViT and of the subpixel model (percent), mean cosine of logits."""
    subpixel = timm_spot.retrofit(vit, n_tokens=n_tokens, coverage=1.).eval()
    side = vit.patch_embed.patch_size[0] * math.isqrt(n_tokens)
    vit.set_input_size((side, side))
    equal, first, second, cosine = [], [], [], []
    for images, labels in batches:
        expected = vit(F.interpolate(images, (side, side), mode='bicubic', antialias=True))
        found = subpixel(images)
        equal.append(expected.argmax(1) == found.argmax(1))
        first.append(expected.argmax(1) == labels)
        second.append(found.argmax(1) == labels)
        cosine.append(F.cosine_similarity(expected, found))
    shares = [100. * torch.cat(x).double().mean().item() for x in (equal, first, second)]
    return [*shares, torch.cat(cosine).mean().item()]


@click.command(help=__doc__)
@click.argument('data', type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument('checkpoint', type=click.Path(exists=True, path_type=Path))
@click.option('--backbone', required=True, help='Name of the ViT.')
@click.option('--img-size', type=int, required=True, help="Side of the ViT's pictures in pixels.")
@click.option('--full-size', default=224, show_default=True, help="Side of the subpixel model's pictures.")
def main(data: Path, checkpoint: Path, backbone: str, img_size: int, full_size: int) -> None:
    classes = sum(f.is_dir() for f in (data / 'validation').iterdir())
    transform = create_transform(full_size, interpolation='bicubic', crop_pct=1.)
    dataset = create_dataset('', root=str(data), split='validation', transform=transform)
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=50))
    click.echo('| tokens | same top-1 | the ViT | subpixel | cosine |\n|---|---|---|---|---|')
    for n_tokens in BUDGETS:
        vit = timm.create_model(backbone, img_size=img_size, num_classes=classes).eval()
        load_checkpoint(vit, str(checkpoint), use_ema=True, weights_only=True)
        equal, first, second, cosine = compare(vit, n_tokens, batches)
        click.echo(f'| {n_tokens} | {equal:.1f} % | {first:.1f} % | {second:.1f} % | {cosine:.4f} |')


if __name__ == '__main__':
    main()
