"""Compare tokens that follow the image with patches: a small dHT ViT and a ViT of equal depth and token count.

    python recipes/dht_digits.py

Both read the digit canvases of `recipes/train_digits.py` (64 x 64, a digit among noise and strokes) as 64 tokens of
windows of 8 px, have the same blocks without layer scale, begin with the same sine-cosine positions and are trained
alike by Muon on the same canvases, for a short time that two cores can afford. The regions are those of the released
tokenizer, which is not trained here: they are found once for each canvas, and a step then costs both models about the
same. Prints accuracy on held-out digits for every seed, and the gap with its standard error over the seeds.
"""
from __future__ import annotations

import time
from functools import partial
from typing import Any, Dict, List, Tuple

import click
import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2, muon
from timm.scheduler import CosineLRScheduler
from torch import nn
from train_digits import sine_table

import timm_spot
from timm_spot.models import Regions
from timm_spot.ops import fit_histogram_weights
from timm_spot.ops.regions.features import inject_means
from timm_spot.tasks.pictures.digits import draw_canvases, load_digits, to_input

SIZE = dict(img_size=64, patch_size=8, embed_dim=96, depth=3, num_heads=4, num_classes=10)
N_TOKENS = 64
MEAN, STD = 0.1, 0.25  # of a canvas, which is mostly empty
CANVASES_PER_DIGIT = dict(train=10, held_out=4)


class KnownRegions(nn.Module):
    """In the place of a tokenizer: regions found before, of those canvases that `chosen` numbers.

    Args:
        canvases: (M, 64, 64), uint8.
    """

    def __init__(self, canvases: torch.Tensor) -> None:
        super().__init__()
        self.chosen = torch.arange(0)
        self.known: List[Tuple[torch.Tensor, ...]] = []
        tokenizer = timm_spot.RasterToVector().tokenizer
        to_imagenet = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        mean, std = to_imagenet
        for part in canvases.split(64):
            with torch.no_grad():
                found = tokenizer(((part[:, None] / 255).expand(-1, 3, -1, -1) - mean) / std, N_TOKENS, strict=True)
            colors = (found.colors * std.flatten() + mean.flatten() - MEAN) / STD
            start = 0
            for segmentation, count in zip(found.segmentation, found.counts.tolist()):
                of = slice(start, start + count)
                self.known.append((
                    (segmentation - start).byte(), found.boxes[:, of], colors[of], found.sizes[of]))
                start += count

    def forward(self, images: torch.Tensor, *_: Any, **__: Any) -> Regions:
        segmentations, boxes, colors, sizes = zip(*(self.known[i] for i in self.chosen.tolist()))
        counts = torch.tensor([len(s) for s in sizes])
        start = counts.cumsum(0) - counts
        segmentation = torch.stack(segmentations).long() + start[:, None, None]
        colors, sizes = torch.cat(colors), torch.cat(sizes)
        return Regions(
            pieces=segmentation,
            segmentation=segmentation,
            injected=inject_means(images, segmentation, sizes, colors.T),
            boxes=torch.cat(boxes, dim=1),
            counts=counts,
            colors=colors,
            sizes=sizes,
            image=torch.arange(len(counts)).repeat_interleave(counts),
            gradient=None,
            hierarchy=None,
        )


class Canvases:
    """Canvases (M, 64, 64) of one split, their labels (M,), and their regions."""

    def __init__(self, split: str) -> None:
        generator = torch.Generator().manual_seed(1)
        digits, labels = load_digits(split)
        times = CANVASES_PER_DIGIT[split]
        self.pixels = torch.cat([draw_canvases(digits, generator, distort=split == 'train') for _ in range(times)])
        self.labels = labels.repeat(times)
        self.regions = KnownRegions(self.pixels)

    def logits(self, model: nn.Module, chosen: torch.Tensor) -> torch.Tensor:
        """Logits (B, 10) of the canvases that `chosen` (B,) numbers."""
        if isinstance(model, timm_spot.models.DhtVisionTransformer):
            self.regions.chosen = chosen
            model.patch_embed.tokenizer = self.regions
        return model(to_input(self.pixels[chosen], model))


@torch.no_grad()
def create(kind: str) -> nn.Module:
    if kind == 'patches':
        model = timm.create_model('vit_tiny_patch16_224', weight_init='jax', **SIZE)
        model.pos_embed[:, 1:] = 0.5 * sine_table(model.embed_dim, 8).flatten(0, 1)
    else:
        model = timm.create_model(
            'dht_vit_pico_patch8_64', weight_init='jax', n_tokens=N_TOKENS, init_values=None, **SIZE)
        embed = model.patch_embed
        table = 0.5 * sine_table(model.embed_dim, 8)
        embed.pos_proj.weight.copy_(fit_histogram_weights(table, embed.pos_size, embed.pos_scale))
        embed.tokenizer.requires_grad_(False)
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=(MEAN,) * 3, std=(STD,) * 3)
    return model


def train(kind: str, seed: int, steps: int, batch_size: int, lr: float, data: Dict[str, Canvases]) -> float:
    """Train one model; returns its accuracy on canvases of held-out digits, in percent."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = create(kind).train()
    optimizer = create_optimizer_v2(model, 'muon', lr=lr, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, steps, warmup_t=steps // 10, warmup_lr_init=1e-5, t_in_epochs=False)
    labels = data['train'].labels
    for step in range(steps):
        chosen = torch.randint(len(labels), (batch_size,), generator=generator)
        loss = F.cross_entropy(data['train'].logits(model, chosen), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step_update(step)

    model.eval()
    labels = data['held_out'].labels
    with torch.inference_mode():
        parts = torch.arange(len(labels)).split(64)
        found = torch.cat([data['held_out'].logits(model, part).argmax(1) for part in parts])
    return 100 * (found == labels).double().mean().item()


@click.command(help=__doc__)
@click.option('--steps', default=1500, show_default=True, help='Optimiser steps.')
@click.option('--batch-size', default=48, show_default=True)
@click.option('--lr', default=4e-3, show_default=True)
@click.option('--seeds', default=3, show_default=True)
def main(steps: int, batch_size: int, lr: float, seeds: int) -> None:
    # In bfloat16, timm's default, the orthogonalisation takes three times as long on a CPU without AMX.
    muon.zeropower_via_newtonschulz = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    begin = time.process_time()
    data = {split: Canvases(split) for split in CANVASES_PER_DIGIT}
    click.echo(f'regions found in {(time.process_time() - begin) / 60:.1f} CPU minutes')
    gaps = []
    for seed in range(seeds):
        accuracy = {}
        for kind in ('regions', 'patches'):
            begin = time.process_time()
            accuracy[kind] = train(kind, seed, steps, batch_size, lr, data)
            minutes = (time.process_time() - begin) / 60
            click.echo(f'seed {seed}  {kind:8s} {accuracy[kind]:5.1f} %  {minutes:.1f} CPU minutes')
        gaps.append(accuracy['regions'] - accuracy['patches'])
    gap = torch.tensor(gaps)
    error = (gap.std() / len(gap) ** 0.5).item() if seeds > 1 else float('nan')
    click.echo(f'regions are ahead by {gap.mean():.1f} ± {error:.1f} points')


if __name__ == '__main__':
    main()
