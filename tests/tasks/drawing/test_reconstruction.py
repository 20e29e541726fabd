from __future__ import annotations

import numpy as np
import pytest
import torch

import timm_spot
from timm_spot.models.spot_mae import Reconstruction
from timm_spot.tasks.drawing.figure import BLANK

pytestmark = pytest.mark.usefixtures('default_style')

# 4 x 6 pixels of 0 .. 1, windows of 2 x 2 on the patch grid.
IMAGE = torch.arange(24.).view(1, 4, 6) / 23
KEPT = torch.tensor([[[0.25, 1 / 6]]])  # rows 0 and 1, columns 0 and 1
DROPPED = torch.tensor([[[0.75, 5 / 6], [0.25, 0.5]]])  # rows 2 and 3, columns 4 and 5; rows 0 and 1, columns 2 and 3


def result(predicted: torch.Tensor, kept: torch.Tensor = KEPT, dropped: torch.Tensor = DROPPED) -> Reconstruction:
    kept, dropped = (p.expand(len(predicted), -1, -1) for p in (kept, dropped))
    return Reconstruction(torch.zeros(()), predicted, torch.zeros_like(predicted), kept, dropped)


def arrays(axes: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(ax.images[0].get_array()) for ax in axes]


def test_a_window_lies_where_it_was_taken_with_its_own_mean_and_contrast():
    predicted = torch.zeros(1, 2, 4)
    predicted[0, 1] = torch.tensor([1., -1., 0., 0.])
    axes = timm_spot.draw_reconstruction(IMAGE, result(predicted))
    whole, seen, made = arrays(axes)
    pixels = IMAGE[0].numpy()
    np.testing.assert_allclose(whole, np.repeat(pixels[..., None], 3, axis=2), atol=1e-6)
    assert (seen[2:] == BLANK).all() and (seen[:, 2:] == BLANK).all()
    np.testing.assert_allclose(seen[:2, :2, 0], pixels[:2, :2], atol=1e-6)
    assert (made[2:, :4] == BLANK).all() and (made[:2, 4:] == BLANK).all()
    np.testing.assert_array_equal(made[:2, :2], seen[:2, :2])  # put in
    # Nothing but zeros: the mean of the window. The other: its mean plus and minus its standard deviation.
    np.testing.assert_allclose(made[2:, 4:, 0], pixels[2:, 4:].mean(), atol=1e-6)
    mean, std = pixels[:2, 2:4].mean(), pixels[:2, 2:4].std(ddof=1)
    np.testing.assert_allclose(made[:2, 2:4, 0], [[mean + std, mean - std], [mean, mean]], atol=1e-6)
    assert [ax.get_title() for ax in axes] == ['image', '1 windows seen', 'and 2 reconstructed']


def test_the_image_asked_for_is_drawn():
    predicted = torch.stack([torch.zeros(2, 4), -torch.ones(2, 4)])
    first, second = (
        arrays(timm_spot.draw_reconstruction(IMAGE, result(predicted), index))[2][2:, 4:, 0] for index in (0, 1))
    window = IMAGE[0, 2:, 4:]
    np.testing.assert_allclose(first - second, window.std(), atol=1e-6)
    with pytest.raises(ValueError, match='index=2 does not exist, the result holds 2 images'):
        timm_spot.draw_reconstruction(IMAGE, result(predicted), 2)


def test_where_windows_overlap_their_average_is_drawn():
    twice = result(torch.tensor([[[1.] * 4, [-1.] * 4]]), dropped=DROPPED[:, :1].expand(1, 2, 2))
    made = arrays(timm_spot.draw_reconstruction(IMAGE, twice))[2]
    np.testing.assert_allclose(made[2:, 4:, 0], IMAGE[0, 2:, 4:].mean(), atol=1e-6)


def test_windows_beyond_the_edge_are_cut():
    out = result(torch.zeros(1, 3, 4), dropped=torch.tensor([[[1., 1.], [3., 0.5], [-2., -2.]]]))
    made = arrays(timm_spot.draw_reconstruction(IMAGE, out))[2]
    shown = made[..., 3] == 1.
    assert shown[3, 5] and shown[:2, :2].all() and shown.sum() == 1 + 4  # and the window seen


def test_stretched_windows_lie_half_a_pixel_further():
    """Under `spot` position 0.5 of 8 pixels is pixel 4, not the edge between pixels 3 and 4."""
    image = torch.zeros(1, 8, 8)
    middle = torch.tensor([[[0.5, 0.5]]])
    one = result(torch.zeros(1, 1, 9), middle, middle)
    made = arrays(timm_spot.draw_reconstruction(image, one, convention='spot'))[2]
    shown = np.zeros((8, 8), bool)
    shown[3:6, 3:6] = True
    assert ((made[..., 3] == 1.) == shown).all()
