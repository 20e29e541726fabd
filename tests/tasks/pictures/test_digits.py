from __future__ import annotations

import pytest
import torch

from timm_spot.tasks.pictures.digits import CANVAS, draw_canvases, load_digits


def test_every_fifth_digit_is_held_out():
    (train, train_labels), (held_out, labels) = load_digits('train'), load_digits('held_out')
    assert train.shape == (1438, 8, 8) and held_out.shape == (359, 8, 8)
    assert train.min() == 0 and train.max() == 1
    assert set(labels.tolist()) == set(train_labels.tolist()) == set(range(10))
    with pytest.raises(ValueError, match="split='test'"):
        load_digits('test')


@pytest.mark.parametrize('distort', [False, True])
def test_canvases_follow_the_generator(distort):
    digits = load_digits('train')[0][:20]
    first, again, other = (
        draw_canvases(digits, torch.Generator().manual_seed(seed), distort) for seed in (0, 0, 1))
    assert first.shape == (20, CANVAS, CANVAS) and first.dtype == torch.uint8
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_digit_covers_24_to_40_pixels_inside_the_canvas():
    solid = torch.ones(200, 8, 8)
    blank = torch.zeros(200, 8, 8)
    # The same draws with and without ink: what differs is the digit.
    ink, rest = (draw_canvases(d, torch.Generator().manual_seed(0)).int() for d in (solid, blank))
    differs = (ink - rest) > 100
    for axis in (1, 2):
        extent = differs.any(dim=axis).sum(dim=1)
        assert extent.min() >= 22 and extent.max() <= 41
