"""Scenes: a small object somewhere in a large picture, so that it matters where a model looks.

    python recipes/scenes.py caltech101/train camvid/train/images build/scenes/train
    python recipes/scenes.py caltech101/validation camvid/validation/images build/scenes/validation

Pastes each picture of OBJECTS (a folder for each class), its longer side a third of the scene's, with a soft edge at a
random place onto a square cut from a random picture of BACKGROUNDS. OUT has OBJECTS' folders, and `places.csv`: for
each picture the background, and the object's middle (y, x) and size (h, w) in fractions of the picture. A picture's
scene depends on its name and the seed, not on the others. Signs, defects, cells: any two folders will do.
"""
from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from timm_spot.tasks.pictures.files import list_folder
from timm_spot.tasks.pictures.images import read_picture

COLUMNS = ('file', 'background', 'y', 'x', 'h', 'w')
SOFT = 0.1  # of the object's sides: the edge over which it fades


def fade(length: int) -> np.ndarray:
    """Opacity along one side: 0 outside, 1 inside, a raised cosine between."""
    to_edge = np.minimum(np.arange(length) + 0.5, length - np.arange(length) - 0.5) / (SOFT * length)
    return 0.5 - 0.5 * np.cos(np.pi * np.clip(to_edge, 0., 1.))


def cut_square(picture: Image.Image, size: int, random: np.random.Generator) -> Image.Image:
    """A square as high or wide as the picture, from anywhere in it."""
    side = min(picture.size)
    left, top = (random.integers(length - side, endpoint=True).item() for length in picture.size)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def paste(
        scene: Image.Image,
        picture: Image.Image,
        share: float,
        random: np.random.Generator,
) -> tuple[Image.Image, tuple[float, ...]]:
    """The scene with the picture in it, and where it is: y, x, h, w in fractions."""
    size = scene.width
    scale = share * size / max(picture.size)
    width, height = (max(1, round(scale * length)) for length in picture.size)
    left, top = (random.integers(size - length, endpoint=True).item() for length in (width, height))
    alpha = np.outer(fade(height), fade(width))
    mask = Image.fromarray(np.round(255 * alpha).astype(np.uint8))
    scene.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (left, top), mask)
    return scene, tuple(round(v / size, 4) for v in (top + height / 2, left + width / 2, height, width))


@click.command(help=__doc__)
@click.argument('objects', type=click.Path(exists=True, file_okay=False))
@click.argument('backgrounds', type=click.Path(exists=True, file_okay=False))
@click.argument('out', type=click.Path(path_type=Path))
@click.option('--size', type=click.IntRange(min=8), default=224, show_default=True, help='Side of a scene in pixels.')
@click.option('--share', type=click.FloatRange(0., 1., min_open=True), default=1 / 3, show_default='a third',
              help="The object's longer side as a share of the scene's.")
@click.option('--seed', default=0, show_default=True)
def main(objects: str, backgrounds: str, out: Path, size: int, share: float, seed: int) -> None:
    found, scenes = list_files(objects), list_files(backgrounds)
    places = []
    for file in tqdm(found, disable=None):
        name = file.relative_to(objects)
        name = name if name.suffix == '.jpg' else name.with_name(f'{name.name}.jpg')
        digest = hashlib.sha256(f'{seed} {name.as_posix()}'.encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], 'big'))
        background = scenes[random.integers(len(scenes))]
        scene, place = paste(cut_square(read_picture(background), size, random), read_picture(file), share, random)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        scene.save(out / name, quality=95)
        places.append((name.as_posix(), background.name, *place))
    with open(out / 'places.csv', 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([COLUMNS, *places])
    click.echo(f'{len(places):,} scenes in {out}')


def list_files(folder: str) -> list[Path]:
    """Pictures of a folder, sorted by name: which scene an object gets must not depend on the file system."""
    broken: list[str] = []
    files = sorted(Path(entry.file) for entry in list_folder(folder, broken.append))
    if broken or not files:
        raise click.ClickException('; '.join(broken) or f'{folder} holds no pictures.')
    return files


if __name__ == '__main__':
    main()
