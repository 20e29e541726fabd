"""What the symmetric derivative of the windows changes against plain automatic differentiation, on digit canvases.

    python -m benchmarks.oracle_gradient

From the patch grid, where every sample lies on a kink of the interpolation, and from half a pixel beside it: the share
of coordinates whose gradient has the sign of the loss difference over +-0.5 px (where that exceeds `--noise` times the
root mean square over the image's coordinates), and the mean loss that the oracle reaches.
"""
from __future__ import annotations

from typing import Tuple
from unittest import mock

import click
import timm
import torch
import torch.nn.functional as F

import timm_spot
from timm_spot.ops import windows
from timm_spot.tasks.pictures.digits import CANVAS, draw_canvases, load_digits, to_input


def plain_windows(images: torch.Tensor, positions: torch.Tensor, window: int, follow: bool) -> torch.Tensor:
    """In the place of `symmetric_windows`: leaves the derivative to autograd."""
    return windows.patch_windows(images, positions, window)


def agreement(
        model: torch.nn.Module,
        images: torch.Tensor,
        targets: torch.Tensor,
        start: torch.Tensor,
        noise: float,
) -> Tuple[float, int]:
    """Share of coordinates whose gradient has the sign of the finite difference, and how many were compared."""
    positions = start.expand(len(images), -1, -1).clone().requires_grad_()
    F.cross_entropy(model(images, positions), targets, reduction='sum').backward()
    differences = []
    with torch.no_grad():
        for i in range(positions[0].numel()):
            step = torch.zeros(positions[0].numel())
            step[i] = 0.5 / CANVAS
            step = step.view_as(positions[0])
            ahead, behind = (
                F.cross_entropy(model(images, positions + sign * step), targets, reduction='none') for sign in (1, -1))
            differences.append(ahead - behind)
    difference = torch.stack(differences, dim=1)
    clear = difference.abs() > noise * difference.square().mean(dim=1, keepdim=True).sqrt()
    agree = difference.sign() == positions.grad.flatten(1).sign()
    return agree[clear].float().mean().item(), clear.sum().item()


@click.command(help=__doc__)
@click.option('--n-tokens', default=16, show_default=True)
@click.option('--canvases', default=64, show_default=True)
@click.option('--noise', default=0.1, show_default=True, help="Smallest difference that counts, in the image's RMS.")
@click.option('--steps', default=20, show_default=True)
@click.option('--lr', default=1e-2, show_default=True)
def main(n_tokens: int, canvases: int, noise: float, steps: int, lr: float) -> None:
    model = timm.create_model('spot_vit_pico_patch8_64', pretrained=True).eval().requires_grad_(False)
    digits, targets = load_digits('held_out')
    canvas = draw_canvases(digits[:canvases], torch.Generator().manual_seed(3))
    images, targets = to_input(canvas, model), targets[:canvases]
    grid = timm_spot.sample_positions('grid', n_tokens, (CANVAS, CANVAS), window=model.patch_embed.window)[0]
    click.echo(f'{canvases} held-out canvases, {n_tokens} tokens, {steps} steps, lr {lr}')
    click.echo('| derivative | start | agreement in sign, % | coordinates compared | loss before | loss after |')
    click.echo('|---' * 6 + '|')
    for derivative, read in (('symmetric', windows.symmetric_windows), ('plain autograd', plain_windows)):
        for place, start in (('patch grid', grid), ('half a pixel off', grid + 0.5 / CANVAS)):
            with mock.patch.object(windows, 'symmetric_windows', read):
                share, compared = agreement(model, images, targets, start, noise)
                result = timm_spot.optimize_positions(model, images, targets, init=start, steps=steps, lr=lr)
            click.echo(
                f'| {derivative} | {place} | {100 * share:.1f} | {compared} | {result.losses[:, 0].mean():.4f} | '
                f'{result.losses[:, -1].mean():.4f} |')


if __name__ == '__main__':
    main()
