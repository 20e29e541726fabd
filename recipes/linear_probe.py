"""Linear probe at 25 isotropic tokens: what SPoT-MAE taught an encoder, against one of random initialisation.

    python recipes/linear_probe.py build/mae/encoder.safetensors

Standardised features of the frozen encoder; scikit-learn's logistic regression on 2,876 canvases of training digits;
accuracy on 1,436 canvases of digits never seen. Three draws of canvases and of the random encoder. The difference is
paired; its standard error is that over the draws.
"""
from __future__ import annotations

from pathlib import Path

import click
import timm
import torch
from safetensors.torch import load_file

import timm_spot  # noqa: F401  registers the models
from timm_spot.tasks.pictures.digits import draw_canvases, load_digits, to_input

NAME, DRAWS = 'spot_vit_pico_patch8_64', 3


@torch.inference_mode()
def features(model: torch.nn.Module, canvases: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(to_input(part, model)) for part in canvases.split(256)])


def classify(model: torch.nn.Module, train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """Class predicted for each test canvas."""
    from sklearn.linear_model import LogisticRegression

    x, y = features(model, train), features(model, test)
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    probe = LogisticRegression(C=0.1, max_iter=300).fit(((x - mean) / std).numpy(), labels.numpy())
    return torch.from_numpy(probe.predict(((y - mean) / std).numpy()))


@click.command(help=__doc__)
@click.argument('encoder', type=click.Path(exists=True, path_type=Path))
def main(encoder: Path) -> None:
    (digits, labels), (held_out, truth) = load_digits('train'), load_digits('held_out')
    rows = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        train = torch.cat([draw_canvases(digits, generator, distort=True) for _ in range(2)])
        test = torch.cat([draw_canvases(held_out, generator) for _ in range(4)])
        models = [timm.create_model(NAME, num_classes=0, n_tokens=25).eval() for _ in range(2)]
        models[1].load_state_dict(load_file(encoder), strict=True)
        right = [classify(m, train, labels.repeat(2), test) == truth.repeat(4) for m in models]
        rows.append([100 * r.double().mean().item() for r in right])
        click.echo(f'draw {seed}: random {rows[-1][0]:.1f} %, pretrained {rows[-1][1]:.1f} %')
    gain = torch.tensor([after - before for before, after in rows])
    click.echo(f'gain {gain.mean():.1f} ± {gain.std() / DRAWS ** 0.5:.1f} points (mean and standard error)')


if __name__ == '__main__':
    main()
