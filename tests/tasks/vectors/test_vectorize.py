from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from timm_spot.tasks.vectors.raster import paint_shapes
from timm_spot.tasks.vectors.vectorize import MODES, Detail, Vectorizer, picture_to_svg


def photograph(size=(60, 45), seed=0):
    """Smooth colours and noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    noise = rng.normal(0, 6, (size[1], size[0], 3))
    smooth = np.asarray(small.resize(size, Image.Resampling.BICUBIC))
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def graphic(size=(96, 64)):
    picture = Image.new('RGB', (4 * size[0], 4 * size[1]), '#fff')
    draw = ImageDraw.Draw(picture)
    draw.ellipse((60, 40, 220, 200), fill='#e22')
    draw.polygon([(250, 30), (370, 240), (200, 230)], fill='#124')
    return picture.resize(size, Image.Resampling.BOX)  # anti-aliased


def paths(svg):
    return [e.attrib for e in ET.fromstring(svg) if e.tag.endswith('path')]


@pytest.mark.parametrize('make', [photograph, graphic])
@pytest.mark.parametrize('regions', [1, 2, 3, 50, 1000])
def test_regions_are_exact(make, regions):
    assert len(paths(picture_to_svg(make(), Detail(regions=regions)))) == regions


def test_regions_of_a_constant_picture():
    picture = Image.new('RGB', (20, 10), '#123456')
    assert len(paths(picture_to_svg(picture))) == 1
    assert len(paths(picture_to_svg(picture, Detail(regions=7)))) == 7
    assert len(paths(picture_to_svg(picture, Detail(regions=5000)))) == 200  # one for each pixel


@pytest.mark.parametrize('max_kb', [0.5, 2., 8.])
def test_a_file_is_as_large_as_it_may_be(max_kb):
    svg = picture_to_svg(photograph(), Detail(max_kb=max_kb))
    assert 0.9 * max_kb * 1000 < len(svg.encode()) <= max_kb * 1000


def test_the_size_of_a_file_counts_bytes_not_characters():
    svg = picture_to_svg(photograph(), Detail(max_kb=2.), title='模' * 100)  # three bytes each
    assert 1800 < len(svg.encode()) <= 2000


def test_a_file_for_which_all_there_is_is_too_little():
    svg = picture_to_svg(graphic(), Detail(max_kb=1000.))
    assert len(paths(svg)) > 10 and len(svg) < 10_000


def test_too_small_a_file_is_refused():
    with pytest.raises(ValueError, match=r'max_kb=0.05 is less than the 0.\d+ kB that the fewest regions take'):
        picture_to_svg(photograph(), Detail(max_kb=0.05))


@pytest.mark.parametrize('make, psnr', [(photograph, 20.), (photograph, 26.), (graphic, 30.)])
def test_the_fewest_regions_for_a_quality(make, psnr):
    n = len(paths(picture_to_svg(make(), Detail(psnr=psnr))))
    vectorizer = Vectorizer(make(), Detail())
    assert vectorizer.psnr(n) >= psnr and vectorizer.psnr(int(0.9 * n)) < psnr + 0.3


def test_a_quality_out_of_reach():
    with pytest.raises(ValueError, match=r'psnr=90\.0 is more than the \d+\.\d dB that all regions have'):
        picture_to_svg(graphic(), Detail(psnr=90.))


def test_curves_where_they_pay():
    """Large discs: fewer bytes and nearer to the picture than polygons; a photograph has none to round."""
    disc = Image.new('RGB', (1200, 1200), '#fff')
    ImageDraw.Draw(disc).ellipse((90, 90, 1110, 1110), fill='#159')
    disc = disc.resize((300, 300), Image.Resampling.BOX)
    texts = {mode: picture_to_svg(disc, Detail(regions=2, mode=mode)) for mode in MODES}
    assert 'q' in texts['curve'] and 'q' not in texts['polygon'].partition('</title>')[2]
    assert texts['auto'] == min(texts['polygon'], texts['curve'], key=len)
    assert len(paths(picture_to_svg(photograph(), Detail(regions=300, mode='curve')))) == 300


def test_tolerance_makes_simpler_files():
    size = [len(picture_to_svg(photograph(), Detail(regions=60, tolerance=t))) for t in (0.1, 0.7, 3.)]
    assert size[0] > size[1] > size[2]


def test_borders_of_graphics_run_within_pixels():
    """The left end of the disc: 60 / 4 = 15 px, between those that a border between pixels could have."""
    picture = graphic()
    svg = picture_to_svg(picture)
    assert ET.fromstring(svg).attrib['viewBox'] == '0 0 384 256'
    assert len(paths(svg)) == 3
    assert ET.fromstring(picture_to_svg(photograph())).attrib['viewBox'] == '0 0 60 45'


def test_transparent_pixels_are_no_region():
    picture = photograph().convert('RGBA')
    alpha = np.zeros((45, 60), dtype=np.uint8)
    alpha[5:20, 5:30], alpha[30:40, 40:55], alpha[10:15, 10:20] = 255, 200, 90
    picture.putalpha(Image.fromarray(alpha))
    assert len(paths(picture_to_svg(picture, Detail(regions=2)))) == 2  # two parts that do not touch
    svg = picture_to_svg(picture, Detail(regions=9))
    assert len(paths(svg)) == 9 and not any(p['d'].startswith('m0 ') for p in paths(svg))
    picture.putalpha(0)
    assert paths(picture_to_svg(picture)) == []


@pytest.mark.parametrize('curved', [False, True])
@pytest.mark.parametrize('band', [1, 2, 3, 5])
def test_outer_corners_near_a_junction_are_whole(band, curved):
    """Regions end less than three pixels from the corners of an opaque square: no sample of its pixels stays bare."""
    pixels = np.zeros((45, 60, 4), dtype=np.uint8)
    pixels[8:40, 9:50] = 40, 90, 160, 255
    pixels[8:8 + band, 9:50, 0], pixels[40 - band:40, 9:50, 1], pixels[20:30, 50 - band:50, 2] = 200, 200, 20
    vectorizer = Vectorizer(Image.fromarray(pixels), Detail(regions=4))
    assert vectorizer.is_graphic
    painted = paint_shapes(vectorizer._shapes(vectorizer.tree.cut(4), curved), (60, 45), 4) >= 0
    assert (painted == (pixels[..., 3] > 0).repeat(4, 0).repeat(4, 1)).all()


def test_the_same_bytes_on_any_number_of_threads():
    before, texts = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            texts |= {picture_to_svg(photograph((300, 200)), Detail(regions=400)), }
    finally:
        torch.set_num_threads(before)
    assert len(texts) == 1


@pytest.mark.parametrize('name, value', [
    *(('regions', v) for v in (0, 2.5, -3, 10 ** 7)), *(('tolerance', v) for v in (0., -1., float('nan'), 1e6)),
    *(('max_kb', v) for v in (0., -1., float('nan'), float('inf'))), *(('psnr', v) for v in (0., float('nan'), 100.)),
    ('mode', "'spline'")])
def test_details_out_of_their_ranges(name, value):
    with pytest.raises(ValueError, match=f'{name}={value} must'):
        Detail(**{name: value.strip("'") if isinstance(value, str) else value})


def test_details_that_exclude_each_other():
    with pytest.raises(ValueError, match=r'regions=4 and max_kb=3\.0 exclude each other'):
        Detail(regions=4, max_kb=3.)
