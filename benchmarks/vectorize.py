"""Rate and distortion of pictures as SVG: ours against vtracer, and against polygons of SLIC's superpixels.

    pip install vtracer resvg-py scikit-image
    python -m benchmarks vectorize --pictures FOLDER --pictures FOLDER

Every file is parsed strictly and rendered by resvg. Means over the pictures of a folder; photographs of the repository
unless folders are given.
"""
from __future__ import annotations

import gzip
import io
import statistics
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Dict, List, NamedTuple

import numpy as np
from PIL import Image

from timm_spot.tasks.pictures.images import read_picture
from timm_spot.tasks.vectors.drawing import draw_labels, mean_colors, to_svg
from timm_spot.tasks.vectors.vectorize import TOLERANCE, Detail, picture_to_svg

from .measure import Config, Section

PHOTOS = Path(__file__).parent.parent / 'examples' / 'photos'
MAX_SIDE = 512
SAME = "ours, in vtracer's kB"


class Measured(NamedTuple):
    """One file."""

    kb: float
    gzip_kb: float
    paths: int
    psnr: float
    ssim: float
    seconds: float  # of CPU time


def run(config: Config) -> Section:
    section = Section()
    for folder in config.pictures or (str(PHOTOS),):
        _compare(section, Path(folder), config.quick)
    section.remarks.append(
        f"Pictures of at most {MAX_SIDE} px. Seconds are CPU time, ours with the search for the size, vtracer's with "
        'reading and writing. SLIC: 2,048 superpixels drawn as our regions are.')
    return section


def _compare(section: Section, folder: Path, quick: bool) -> None:
    rows = section.table(
        f'Means over {folder.name}', 'how', 'kB', 'gzip kB', 'paths', 'PSNR, dB', 'SSIM', 'CPU seconds')
    found: Dict[str, List[Measured]] = {}
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    for file in files[:1] if quick else files:
        picture = read_picture(file)
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        traced = _measure(picture, partial(_vtracer, picture, mode='polygon'))
        found.setdefault('vtracer, polygon', []).append(traced)
        found.setdefault('vtracer, spline (default)', []).append(_measure(picture, partial(_vtracer, picture)))
        for name, detail in (
                (SAME, Detail(max_kb=traced.kb)), ('ours, in half of them', Detail(max_kb=traced.kb / 2)),
                ('ours, default', Detail())):
            found.setdefault(name, []).append(_measure(picture, partial(picture_to_svg, picture, detail)))
        found.setdefault('SLIC, 2048 polygons', []).append(_measure(picture, partial(_slic, picture)))
    for name, values in found.items():
        kb, gzip_kb, paths, psnr, ssim, seconds = (statistics.fmean(column) for column in zip(*values))
        rows.append([
            name, f'{kb:.1f}', f'{gzip_kb:.1f}', f'{paths:.0f}', f'{psnr:.2f}', f'{ssim:.3f}', f'{seconds:.2f}'])
    ahead = [a.psnr - b.psnr for a, b in zip(found[SAME], found['vtracer, polygon'])]
    section.judge(
        f"{folder.name}: PSNR above vtracer's polygons in as many bytes", statistics.fmean(ahead), at_least=1.,
        unit=' dB')


def _measure(picture: Image.Image, draw: Callable[[], str]) -> Measured:
    import resvg_py
    from skimage.metrics import structural_similarity

    begin = time.process_time()
    svg = draw()
    seconds = time.process_time() - begin
    ET.fromstring(svg)
    with Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))) as rendered:
        seen = np.asarray(Image.alpha_composite(Image.new('RGBA', rendered.size, '#fff'), rendered.convert('RGBA')))
    pixels, seen = np.asarray(picture), seen[..., :3]
    error = ((seen.astype(float) - pixels) ** 2).mean()
    return Measured(
        len(svg.encode()) / 1000, len(gzip.compress(svg.encode(), mtime=0)) / 1000, svg.count('<path'),
        10 * np.log10(255 ** 2 / error), structural_similarity(pixels, seen, channel_axis=2), seconds)


def _vtracer(picture: Image.Image, **settings: str) -> str:
    import vtracer

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, 'a.png'), Path(folder, 'a.svg')
        picture.save(source)
        vtracer.convert_image_to_svg_py(str(source), str(target), **settings)
        return target.read_text()


def _slic(picture: Image.Image) -> str:
    from skimage.segmentation import slic

    pixels = np.asarray(picture)
    labels = np.unique(slic(pixels, 2048, start_label=0), return_inverse=True)[1].reshape(pixels.shape[:2])
    return to_svg(draw_labels(labels, TOLERANCE), mean_colors(pixels, labels), picture.size, '')
