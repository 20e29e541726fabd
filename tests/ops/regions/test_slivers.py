from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from timm_spot.ops.regions.slivers import unmix_edges
from timm_spot.ops.regions.zones import flat_zones


def unmixed(pixels):
    return unmix_edges(pixels, flat_zones(pixels, np.ones(pixels.shape[:2], dtype=bool)))


def test_anti_aliased_edges_of_three_colours():
    picture = Image.new('RGB', (320, 240), '#fff')
    draw = ImageDraw.Draw(picture)
    draw.ellipse((30, 20, 190, 180), fill='#e22')
    draw.polygon([(210, 30), (310, 220), (130, 200)], fill='#124')
    pixels = np.asarray(picture.resize((80, 60), Image.Resampling.BOX))
    few = unmixed(pixels)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 40
    assert len(np.unique(few.reshape(-1, 3), axis=0)) <= 12  # where three colours meet a few pixels stay
    crisp = np.asarray(picture.resize((80, 60), Image.Resampling.NEAREST))
    assert (few == crisp).all(2).mean() > 0.97


def test_lines_of_a_colour_of_their_own_stay():
    pixels = np.full((20, 20, 3), 255, dtype=np.uint8)
    pixels[:, 10:] = 0
    pixels[:, 9] = (255, 0, 0)
    pixels[4, 2:8] = 100
    assert (unmixed(pixels) == pixels).all()


def test_what_is_no_part_of_the_picture_is_not_mixed_with():
    pixels = np.full((8, 12, 3), 255, dtype=np.uint8)
    pixels[:, 6:] = 0
    pixels[:, 5] = 128
    drawn = np.arange(12) < 6
    zones = flat_zones(pixels, np.broadcast_to(drawn, (8, 12)))
    assert (unmix_edges(pixels, zones)[:, 5] == 128).all()
