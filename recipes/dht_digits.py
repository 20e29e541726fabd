"""Compare tokens that follow the image with patches: a small dHT ViT and a ViT of equal depth and token count.

    python recipes/dht_digits.py

Both read the digit canvases of `recipes/train_digits.py` (64 x 64, a digit among noise and strokes) as 64 tokens of
windows of 8 px, have the same blocks without layer scale, begin with the same sine-cosine positions and are trained
alike by Muon, for a short time that two cores can afford. The tokenizer starts at random and learns with the rest.
Prints accuracy on held-out digits for every seed.
"""
from __future__ import annotations

import time
from functools import partial

import click
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, muon
from timm.scheduler import CosineLRScheduler
from torch import nn

import timm_spot  # noqa: F401  registers the models
from timm_spot.ops import fit_histogram_weights
from timm_spot.tasks.digits import draw_canvases, load_digits, to_input

SIZE = dict(img_size=64, patch_size=8, embed_dim=96, depth=3, num_heads=4, num_classes=10)
TRAIN_CANVASES_PER_DIGIT = 20
CANVASES_PER_DIGIT = 4  # in the held-out evaluation


def sines(dim: int, side: int = 8, scale: float = 0.5) -> torch.Tensor:
    """Sine-cosine position table (side, side, dim)."""
    angle = torch.arange(side)[:, None] / 100 ** (torch.arange(dim // 4) / (dim // 4))
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    return scale * torch.cat([axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)], dim=2)


@torch.no_grad()
def create(kind: str) -> nn.Module:
    if kind == 'patches':
        model = timm.create_model('vit_tiny_patch16_224', weight_init='jax', **SIZE)
        model.pos_embed[:, 1:] = sines(model.embed_dim).flatten(0, 1)
    else:
        model = timm.create_model('dht_vit_pico_patch8_64', weight_init='jax', n_tokens=64, init_values=None, **SIZE)
        embed = model.patch_embed
        embed.pos_proj.weight.copy_(fit_histogram_weights(sines(model.embed_dim), embed.pos_size, embed.pos_scale))
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=(0.1, 0.1, 0.1), std=(0.25, 0.25, 0.25))  # of a canvas
    return model


@torch.inference_mode()
def evaluate(model: nn.Module) -> float:
    """Accuracy in percent on canvases of held-out digits."""
    model.eval()
    digits, labels = load_digits('held_out')
    generator = torch.Generator().manual_seed(1)
    correct = 0
    for _ in range(CANVASES_PER_DIGIT):
        images = to_input(draw_canvases(digits, generator), model)
        for x, y in zip(images.split(64), labels.split(64)):
            correct += (model(x).argmax(1) == y).sum().item()
    return 100 * correct / (len(labels) * CANVASES_PER_DIGIT)


def train(kind: str, seed: int, steps: int, batch_size: int, lr: float) -> float:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    digits, labels = load_digits('train')
    canvases = torch.cat([draw_canvases(digits, generator, distort=True) for _ in range(TRAIN_CANVASES_PER_DIGIT)])
    labels = labels.repeat(TRAIN_CANVASES_PER_DIGIT)
    model = create(kind).train()
    optimizer = create_optimizer_v2(model, 'muon', lr=lr, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, steps, warmup_t=steps // 10, warmup_lr_init=1e-5, t_in_epochs=False)
    for step in range(steps):
        chosen = torch.randint(len(labels), (batch_size,), generator=generator)
        loss = F.cross_entropy(model(to_input(canvases[chosen], model)), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step_update(step)
    return evaluate(model)


@click.command(help=__doc__)
@click.option('--steps', default=600, show_default=True, help='Optimiser steps.')
@click.option('--batch-size', default=48, show_default=True)
@click.option('--lr', default=4e-3, show_default=True)
@click.option('--seeds', default=3, show_default=True)
def main(steps: int, batch_size: int, lr: float, seeds: int) -> None:
    # In bfloat16, timm's default, the orthogonalisation takes three times as long on a CPU without AMX.
    muon.zeropower_via_newtonschulz = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    for seed in range(seeds):
        for kind in ('patches', 'regions'):
            begin = time.process_time()
            accuracy = train(kind, seed, steps, batch_size, lr)
            minutes = (time.process_time() - begin) / 60
            click.echo(f'seed {seed}  {kind:8s} {accuracy:5.1f} %  {minutes:.1f} CPU minutes')


if __name__ == '__main__':
    main()
