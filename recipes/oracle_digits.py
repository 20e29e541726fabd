"""SPoT-ON on held-out digit canvases: the error of each objective at small budgets, from the isotropic lattice.

    python recipes/oracle_digits.py

Prints the tables of docs/oracle.md. A canvas is made of each of the 359 held-out digits, `--canvases` times over; as
canvases of one digit are alike, standard errors are over digits. `--split train` is for choosing settings.
"""
from __future__ import annotations

from typing import Tuple

import click
import timm
import torch

import timm_spot
from timm_spot.tasks.pictures.digits import draw_canvases, load_digits, to_input
from timm_spot.tasks.search.objectives import OBJECTIVES


def draw(model: torch.nn.Module, split: str, digits: int, canvases: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Canvases (digits * canvases, 3, 64, 64) as the model takes them, digit by digit, and labels."""
    images, labels = load_digits(split)
    images, labels = images[:digits].repeat_interleave(canvases, 0), labels[:digits].repeat_interleave(canvases)
    return to_input(draw_canvases(images, torch.Generator().manual_seed(2)), model), labels


def percent(per_canvas: torch.Tensor, canvases: int) -> Tuple[float, float]:
    """Mean and its standard error over digits, in percent."""
    per_digit = 100 * per_canvas.float().view(-1, canvases).mean(dim=1)
    return per_digit.mean().item(), (per_digit.std() / len(per_digit) ** 0.5).item()


@click.command(help=__doc__)
@click.option('--n-tokens', multiple=True, type=int, default=(9, 16, 25), show_default=True)
@click.option('--objective', 'objectives', multiple=True, default=tuple(OBJECTIVES), show_default=True)
@click.option('--steps', default=20, show_default=True)
@click.option('--lr', default=1e-2, show_default=True)
@click.option('--keep', default='last', show_default=True)
@click.option('--bounds', default='none', show_default=True)
@click.option('--split', default='held_out', show_default=True)
@click.option('--digits', default=359, show_default=True)
@click.option('--canvases', default=2, show_default=True, help='Canvases of each digit.')
def main(
        n_tokens: Tuple[int, ...],
        objectives: Tuple[str, ...],
        steps: int,
        lr: float,
        keep: str,
        bounds: str,
        split: str,
        digits: int,
        canvases: int,
) -> None:
    model = timm.create_model('spot_vit_pico_patch8_64', pretrained=True).eval()
    images, labels = draw(model, split, digits, canvases)
    with torch.inference_mode():
        full = timm_spot.sample_positions('isotropic', 64, (64, 64))[0]
        wrong = torch.cat([model(x, full).argmax(dim=1) for x in images.split(128)]) != labels
    click.echo(f'{len(images)} canvases ({split}), {steps} steps, lr {lr}, keep {keep}, bounds {bounds}')
    click.echo('error at the full budget of 64 tokens: {:.1f} ± {:.1f} %'.format(*percent(wrong, canvases)))
    click.echo('\n| tokens | objective | error before, % | error after, % | gain, % | gain, SE |')
    click.echo('|---' * 6 + '|')
    for n in n_tokens:
        for objective in objectives:
            result = timm_spot.optimize_positions(
                model, images, labels, n_tokens=n, objective=objective, steps=steps, lr=lr, keep=keep, bounds=bounds,
                record=False, chunk_size=128)
            before, after = percent(~result.correct_before, canvases), percent(~result.correct_after, canvases)
            gain, error = percent(result.correct_after.float() - result.correct_before.float(), canvases)
            click.echo(
                f'| {n} | {objective} | {before[0]:.1f} ± {before[1]:.1f} | {after[0]:.1f} ± {after[1]:.1f} | '
                f'{gain:+.1f} ± {error:.1f} | {gain / error if error else 0:+.1f} |')


if __name__ == '__main__':
    main()
