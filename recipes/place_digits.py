"""The placed model that ships with timm_spot, and what it reads right of digits never seen in training.

    python recipes/digits_folder.py --out build/digits_folder --train-canvases 8 --validation-canvases 1
    python recipes/train_placer.py build/digits_folder --model spot_vit_pico_patch8_64.digits --epochs 4 --seed S \\
        --out build/placer-S                                               # for S = 0 and 1: the placer alone
    python -m timm_spot train.py --data-dir build/digits_folder --num-classes 10 --input-size 3 64 64 --device cpu \\
        --no-prefetcher --workers 0 --batch-size 64 --no-aug --opt adamw --lr 3e-4 --layer-decay 0.75 \\
        --weight-decay 0.05 --clip-grad 1 --warmup-epochs 0 --sched-on-updates --epochs 3 --smoothing 0.1 --seed S \\
        --model local-dir:build/placer-S/model --pretrained --model-kwargs 'n_tokens=(9,25)' eval_n_tokens=9 \\
        --output build/joint --experiment S                                # placer and ViT together
    python recipes/place_digits.py build/joint/0/last.pth.tar build/joint/1/last.pth.tar --out build/placed --oracle

Canvases of the held-out digits, drawn with a seed of their own; canvases of one digit are alike, standard errors are
over the 359 digits and over the models. The rivals are the shipped digits model on the same canvases: on the even
lattice, also with the placer's multiply-adds spent on tokens; on lattices by two maps without a network; searched by
the oracle, which sees the labels. The leak test has the positions as placed and the pixels of an empty canvas: what is
then right, the positions told. Writes the first model's weights in half precision, which ship with the package.
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple

import click
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import timm_spot
from timm_spot.ops import energy, spectral_residual
from timm_spot.tasks.evaluation.flops import count_flops
from timm_spot.tasks.evaluation.metrics import estimate_mean
from timm_spot.tasks.pictures.digits import CANVAS, draw_canvases, load_digits, to_input

NAME = 'spot_vit_pico_patch8_64'
BUDGETS = (9, 16, 25)
SEARCHED = 2  # canvases of each digit that the oracle is run on, which takes most of the time
SEARCH = dict(steps=20, lr=1e-2, record=False, chunk_size=128)  # what docs/oracle.md measures

Place = Callable[[torch.Tensor, int], torch.Tensor]


def rounded(file: str) -> nn.Module:
    """A model as it ships: in half precision."""
    model = timm.create_model(NAME, pretrained=True, placer='density', pretrained_cfg_overlay=dict(file=file))
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    return model.eval()


def even(images: torch.Tensor, n_tokens: int) -> torch.Tensor:
    return timm_spot.sample_positions('isotropic', n_tokens, (CANVAS, CANVAS)).expand(len(images), -1, -1)


def by_map(saliency: Callable[[torch.Tensor], torch.Tensor]) -> Place:
    def place(images: torch.Tensor, n_tokens: int) -> torch.Tensor:
        size = (CANVAS, CANVAS)
        return timm_spot.sample_positions('salient_lattice', n_tokens, size, len(images), saliency(images))

    return place


def by_placer(model: nn.Module) -> Place:
    def place(images: torch.Tensor, n_tokens: int) -> torch.Tensor:
        model.set_placement(n_tokens=n_tokens)
        return model.place(images)

    return place


def cost(model: nn.Module, place: Place, n_tokens: int) -> int:
    """Floating-point operations of one canvas, from pixels to logits."""
    canvas = torch.zeros(1, 3, CANVAS, CANVAS)
    return count_flops(lambda: model(canvas, place(canvas, n_tokens)))


@torch.inference_mode()
def right(model: nn.Module, images: torch.Tensor, placement: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether each canvas is read right, (canvases,)."""
    batches = zip(images.split(256), placement.split(256))
    return torch.cat([model(x, p).argmax(dim=1) for x, p in batches]) == labels


def searched(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, n_tokens: int, count: int) -> torch.Tensor:
    """Whether the first canvases are read right where an oracle has put the tokens."""
    with torch.inference_mode(False):
        images, labels = images[:count].clone(), labels[:count]
        found = timm_spot.optimize_positions(model, images, labels, init=even(images, n_tokens), **SEARCH)
    return found.correct_after


def cell(hits: Sequence[torch.Tensor], digits: torch.Tensor) -> str:
    """Mean in percent over canvases and models, and its standard error."""
    mean, error, seed_error = estimate_mean(torch.stack(list(hits)).double(), digits)
    return f'{100 * mean:.2f} ± {100 * math.hypot(error, seed_error or 0.):.2f}'


@click.command(help=__doc__)
@click.argument('files', nargs=-1, required=True)
@click.option('--canvases', default=10, show_default=True, help='Of each digit.')
@click.option('--seed', default=7, show_default=True, help='Of the canvases.')
@click.option('--oracle', is_flag=True, help='Search with the labels too, for some minutes.')
@click.option('--out', type=click.Path(path_type=Path), required=True)
def main(files: Tuple[str, ...], canvases: int, seed: int, oracle: bool, out: Path) -> None:
    models, plain = [rounded(file) for file in files], timm.create_model(f'{NAME}.digits', pretrained=True).eval()
    first, (digits, labels) = models[0], load_digits('held_out')
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.cat([draw_canvases(digits, generator) for _ in range(canvases)])
    images, labels, origin = to_input(drawn, first), labels.repeat(canvases), torch.arange(len(digits)).repeat(canvases)
    blank = to_input(torch.zeros_like(drawn), first)
    lines: Dict[str, List[str]] = {}
    with torch.inference_mode():
        for n in BUDGETS:
            same = next(m for m in range(n, 100) if cost(first, even, m) >= cost(first, by_placer(first), n))
            rivals = {
                'isotropic': even(images, n),
                "isotropic, tokens for the placer's multiply-adds": even(images, same),
                'salient_lattice on spectral residual': by_map(spectral_residual)(images, n),
                'salient_lattice on energy': by_map(energy)(images, n),
            }
            hits = {name: [right(plain, images, placement, labels)] for name, placement in rivals.items()}
            placed = [by_placer(model)(images, n) for model in models]
            hits['placer'] = [right(model, images, p, labels) for model, p in zip(models, placed)]
            hits['placer, pixels of an empty canvas'] = [
                right(model, blank, p, labels) for model, p in zip(models, placed)]
            if oracle:
                hits['oracle, which sees the labels'] = [searched(plain, images, labels, n, SEARCHED * len(digits))]
            for name, each in hits.items():
                lines.setdefault(name, []).append(cell(each, origin[:len(each[0])]))
            share = cost(first, by_placer(first), n) / cost(first, even, n)
            click.echo(f'{n} tokens: multiply-adds with the placer {share:.3f}; {same} even tokens cost as much')
    full = cell([right(plain, images, even(images, 64), labels)], origin)
    table = [f"| placement | {' | '.join(f'{n} tokens' for n in BUDGETS)} |", '|---' * (len(BUDGETS) + 1) + '|']
    table += [f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items()]
    click.echo('\n'.join([*table, f'All 64 tokens: {full}']))
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in first.state_dict().items()}
    save_file(weights, out / f'{NAME}.digits_placed.safetensors', metadata={'format': 'pt'})


if __name__ == '__main__':
    main()
