"""`timm-spot draw`."""
from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Callable

import click
import torch
from torch import nn

from ..tasks.drawing.kinds import KINDS, PRIOR_TOKENS, Settings, Subject
from ..tasks.kept import check_overwrite
from ..tasks.pictures.files import printable
from ..tasks.pictures.images import model_transform, read_picture
from ..tasks.predict import looks_foreign, reads_digits
from .common import clean_errors, create_model, create_placed_model, kinds_of, main, set_prior, warn_of_foreign
from .options import (
    DEFAULT_MODEL,
    amp_option,
    coverage_option,
    device_option,
    model_option,
    n_tokens_option,
    overwrite_option,
    placer_option,
    saliency_option,
    sampler_option,
    seed_option,
    weights_option,
)
from .params import POSITIVE, SHARE, STEPS, KindName, OutputFile, ScorerName

_HELP = '\n'.join([
    'Draw IMAGE, as the model takes it, with its tokens.',
    '',
    'Without a model, windows lie on 224 x 224 pixels, and regions are those of the tokenizer in the package.',
    '',
    '\b',
    *(f'{name:<11} {kind.about}' for name, kind in KINDS.items()),
])


@main.command(help=_HELP)
@click.argument('image', type=click.Path(path_type=Path))
@click.option('--out', type=OutputFile(), required=True, help='Picture to write.')
@click.option('--kind', type=KindName(), metavar='KIND', show_default='placement; of a dHT model regions',
              help='What to draw, see above.')
@model_option(show_default=f'none where none is needed, else {DEFAULT_MODEL}')
@weights_option
@n_tokens_option
@sampler_option
@saliency_option
@placer_option
@coverage_option
@seed_option()
@click.option('--steps', type=STEPS, default=30, show_default=True, help='Steps of the search in a trajectory or film.')
@click.option('--lr', type=POSITIVE, default=1e-2, show_default=True, help='Its learning rate.')
@click.option('--scorer', type=ScorerName(), default='cls-attention', show_default=True, help='What a pruning goes by.')
@click.option('--keep-rate', type=SHARE, default=0.7, show_default=True, help='Share that each stage of it keeps.')
@device_option
@amp_option
@overwrite_option
def draw(
        image: Path,
        out: Path,
        kind: str | None,
        name: str | None,
        device: str,
        amp: str | None,
        overwrite: bool,
        **given: Any,
) -> None:
    with clean_errors():
        check_overwrite([out], overwrite)
        settings = Settings(
            amp_dtype=amp and getattr(torch, amp), **{k: given.pop(k) for k in ('steps', 'lr', 'scorer', 'keep_rate')},
            n_tokens=given['n_tokens'])
        kind, open_model = _choose(kind, name or (DEFAULT_MODEL if given['weights'] else None))
        KINDS[kind].check(out)
        picture = read_picture(image)
        model = open_model(device=device, **given)
        transform = model_transform(model)
        images = transform(picture)[None].to(device)
        set_prior(model, given['sampler'], given['saliency'], transform)(images, [image])
        if KINDS[kind].alone is None and reads_digits(model) and looks_foreign(picture):
            warn_of_foreign([str(image)])
        KINDS[kind].write(Subject(model, images), settings, out)
    click.echo(f'{printable(out)}  {kind}, {out.stat().st_size / 1024:.0f} KiB')


def _choose(kind: str | None, name: str | None) -> tuple[str, Callable[..., nn.Module]]:
    """The kind to draw, and what opens the model it is drawn with; before any weights are read."""
    if name is None:
        kind = kind or next(iter(KINDS))
        alone = KINDS[kind].alone
        if alone is not None:
            return kind, _ALONE[alone]
        name = DEFAULT_MODEL
    kinds = kinds_of(create_model(name, pretrained=False, device='meta'))
    kind = kind or kinds[0]
    if kind not in kinds:
        raise ValueError(f'--kind {kind} does not suit {name}, of which can be drawn: {", ".join(kinds)}.')
    return kind, partial(_placed_model if KINDS[kind].alone == 'windows' else create_placed_model, name)


def _placed_model(name: str, **given: Any) -> nn.Module:
    """A model of which nothing but the placement counts: its weights are left out, unless they place the tokens."""
    model = create_placed_model(name, pretrained=False, **given)
    learned = any(True for _ in model.placer.parameters())
    return create_placed_model(name, **given) if learned else model


def _even_windows(weights: None, n_tokens: int | None, **given: Any) -> nn.Module:
    """A model whose windows are those of a ViT of 16 px patches at 224 px; what it would answer means nothing."""
    return create_placed_model(
        'spot_vit_tiny_patch16_in21k', pretrained=False, depth=1, n_tokens=n_tokens or PRIOR_TOKENS, **given)


def _package_regions(weights: None, **given: Any) -> nn.Module:
    """A model whose regions are those of the released tokenizer at 224 px; what it would answer means nothing."""
    from ..tasks.vectorize import RasterToVector

    model = create_placed_model('dht_vit_small_patch16_in1k', pretrained=False, depth=1, **given)
    model.patch_embed.tokenizer = RasterToVector().tokenizer.to(given['device'])
    return model


_ALONE = dict(windows=_even_windows, regions=_package_regions)
