from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
import torch
from drawing import place, read_photo, render
from PIL import Image

import timm_spot
from timm_spot.tasks.drawing.figure import GREY, to_picture

pytestmark = pytest.mark.usefixtures('default_style')


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours, as in the Web Content Accessibility Guidelines."""
    light, dark = sorted((
        float(np.dot([((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92 for v in matplotlib.colors.to_rgb(c)],
                     [0.2126, 0.7152, 0.0722])) for c in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize('page', ['white', '#0d1117', 'black'])
def test_text_is_legible_on_light_and_dark_pages(page):
    assert contrast(GREY, page) > 3.5
    image = read_photo('cowbike', 64, 64)
    drawn = np.asarray(render(timm_spot.draw_placement(image, place(4, image), 16).figure, page=page))
    assert (drawn[0, 0] == np.round(np.array(matplotlib.colors.to_rgb(page)) * 255)).all()  # transparent margins


def test_every_kind_of_image_is_the_same_picture():
    photo = read_photo('cowbike', 30, 20)
    array = np.array(photo)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = array / 255
    for image in (photo, array, tensor, tensor[None], tensor / 255, (tensor / 255)[None].requires_grad_()):
        np.testing.assert_allclose(to_picture(image), expected, atol=1e-6)
    low, high = expected.min(), expected.max()
    np.testing.assert_allclose(to_picture((tensor / 255 - 0.5) / 0.5), (expected - low) / (high - low), atol=1e-5)
    # Undoing a normalisation leaves [0, 1] by rounding: that must not stretch the picture.
    np.testing.assert_allclose(to_picture(tensor / 510 - 1e-6), expected / 2, atol=1e-5)
    grey = array[..., 0]
    for image in (Image.fromarray(grey), grey, torch.from_numpy(grey)[None]):
        np.testing.assert_allclose(to_picture(image), np.repeat(grey[..., None], 3, axis=2) / 255, atol=1e-6)


@pytest.mark.parametrize('image, error, match', [
    ('photo.jpg', TypeError, 'got str'),
    (np.zeros((4, 4, 3)), TypeError, 'array of float64, pass uint8'),
    (torch.zeros(2, 3, 4, 4), ValueError, r'\(2, 3, 4, 4\) is no single picture'),
    (torch.zeros(4, 4, 3), ValueError, r'\(4, 4, 3\) is no single picture'),
    (torch.full((3, 4, 4), math.nan), ValueError, 'NaN'),
])
def test_what_is_no_picture_is_refused(image, error, match):
    with pytest.raises(error, match=match):
        timm_spot.draw_placement(image, torch.zeros(1, 2), 2)
