"""Draw every figure of README.md and docs/ anew, into docs/images/.

    python docs/figures.py
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import matplotlib.pyplot as plt
import timm
import torch
from PIL import Image

import timm_spot
from timm_spot.ops import spectral_residual
from timm_spot.ops.placements import sample_placement
from timm_spot.tasks.drawing.density import draw_density
from timm_spot.tasks.drawing.figure import GREY, to_picture
from timm_spot.tasks.pictures.digits import draw_canvases, load_digits, to_input
from timm_spot.tasks.vectorize import read_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES = Path(__file__).parent / 'images'
PHOTO = Path(__file__).parent.parent / 'examples' / 'photos' / 'cowbike.jpg'


def save(figure: Figure, name: str) -> None:
    figure.savefig(IMAGES / f'{name}.png', dpi=120)
    plt.close(figure)


@torch.inference_mode()
def draw_dht() -> None:
    """Regions, means and hierarchy of a photograph by the released tokenizer."""
    image = read_picture(PHOTO, 224)
    regions = timm_spot.RasterToVector().tokenizer(image, 196, strict=True)
    with Image.open(PHOTO) as photo:
        photo = photo.resize(image.shape[:1:-1])
    save(timm_spot.draw_regions(photo, regions.segmentation[0]).figure, 'regions')
    save(timm_spot.draw_region_means(photo, regions.segmentation[0]).figure, 'region_means')
    save(timm_spot.draw_hierarchy(photo, [level[0] for level in regions.levels[2:6]])[0, 0].figure, 'hierarchy')


def draw_sizes(photo: Image.Image) -> None:
    """A photograph through 25 tokens: fine windows, a small picture, and what lies between them."""
    titles = {
        ('isotropic', 0.): 'SPoT: coverage 0', ('isotropic', 1.): 'a small picture: coverage 1',
        ('isotropic', 0.5): 'coverage 0.5', ('center', 1.): 'center, coverage 1'}
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.4), layout='constrained')
    figure.patch.set_alpha(0.)
    for (above, below), ((sampler, coverage), title) in zip(axes.T, titles.items()):
        placement = sample_placement(sampler, 25, (224, 224), coverage=coverage)
        timm_spot.draw_placement(photo, placement, 16, ax=above)
        timm_spot.draw_seen(photo, placement, 16, ax=below)
        above.set_title(title, color=GREY, fontsize='medium')
    figure.savefig(IMAGES / 'sizes.png', dpi=80)
    plt.close(figure)


@torch.inference_mode()
def draw_placer(canvas: torch.Tensor) -> None:
    """What the shipped placer makes of a canvas: its density, the lattice that it carries, 16 windows."""
    model = timm.create_model('spot_vit_pico_patch8_64.digits_placed', pretrained=True, n_tokens=16).eval()
    image = to_input(canvas[None], model)
    save(draw_density(canvas[None], model.placer.density(image)[0], model.place(image), 8)[0].figure, 'density')


def main() -> None:
    matplotlib.use('Agg')
    plt.style.use('default')
    IMAGES.mkdir(exist_ok=True)
    with Image.open(PHOTO) as photo:
        photo = photo.resize((224, 224))
    images = torch.from_numpy(to_picture(photo)).permute(2, 0, 1)[None]
    positions = timm_spot.sample_positions(
        'salient_sobol', 25, (224, 224), saliency=spectral_residual(images), generator=torch.Generator().manual_seed(0))
    save(timm_spot.draw_placement(photo, positions, 16).figure, 'placement')
    save(timm_spot.draw_seen(photo, positions, 16).figure, 'seen')
    save(timm_spot.draw_priors(photo)[0, 0].figure, 'priors')

    draw_sizes(photo)
    draw_dht()

    # The digit on which a search for a better placement of 9 tokens gains most.
    model = timm.create_model('spot_vit_pico_patch8_64', pretrained=True, n_tokens=9).eval()
    digits, labels = load_digits('held_out')
    canvases = draw_canvases(digits[:64], torch.Generator().manual_seed(0))
    result = timm_spot.optimize_positions(
        model, to_input(canvases, model), labels[:64], steps=40, lr=1e-2, bounds='clamp')
    index = (result.losses[:, 0] - result.losses[:, -1]).argmax().item()
    save(timm_spot.draw_trajectory(
        canvases[index, None], result, index, objective='cross-entropy of the label')[0].figure, 'trajectory')
    timm_spot.animate(canvases[index, None], result, 8, IMAGES / 'search.gif', index)

    draw_placer(canvases[3])

    sparse = timm.create_model('relevance_spot_vit_pico_patch8_64', pretrained=True, keep_rate=0.6).eval()
    positions = timm_spot.sample_positions('sobol', 64, (64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept = [stage[0] for stage in sparse.kept_tokens(to_input(canvases[:1], model), positions=positions)]
    save(timm_spot.draw_pruning(canvases[0, None], positions, kept, 8).figure, 'pruning')


if __name__ == '__main__':
    main()
