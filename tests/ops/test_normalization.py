from __future__ import annotations

import pytest
import torch

from timm_spot.ops.normalization import Normalization

NORMALIZATION = Normalization(mean=(0.5, 0.25, 0.), std=(0.25, 0.5, 1.))


def test_by_hand():
    images = torch.tensor([0.75, 0.75, 0.75]).view(3, 1, 1).expand(2, 3, 4, 5)
    expected = torch.tensor([1., 1., 0.75]).view(3, 1, 1).expand(2, 3, 4, 5)
    torch.testing.assert_close(NORMALIZATION(images), expected)
    torch.testing.assert_close(NORMALIZATION.undo(expected), images)


def test_bytes_are_fractions_of_255():
    pixels = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    normalized = NORMALIZATION(pixels)
    assert normalized.dtype == torch.float32 and pixels.dtype == torch.uint8
    torch.testing.assert_close(normalized, NORMALIZATION(pixels / 255))


def test_what_is_given_is_left_as_it_was():
    images = torch.rand(3, 4, 5)
    before = images.clone()
    NORMALIZATION(images), NORMALIZATION.undo(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize('dtype', [torch.int16, torch.int32, torch.int64, torch.int8, torch.bool])
def test_integers_of_unknown_range_are_refused(dtype):
    with pytest.raises(TypeError, match=f'images are of {dtype}: pass floating point'):
        NORMALIZATION(torch.ones(3, 4, 5, dtype=dtype))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_floating_point_keeps_its_type(dtype):
    images = torch.rand(3, 4, 5).to(dtype)
    assert NORMALIZATION(images).dtype == NORMALIZATION.undo(images).dtype == dtype


def test_the_default_type_changes_nothing():
    pixels = torch.randint(256, (3, 4, 5), dtype=torch.uint8)
    expected = NORMALIZATION(pixels)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(NORMALIZATION(pixels), expected)  # the same operations in the same type
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_number_of_channels_has_the_average():
    assert NORMALIZATION.for_channels(3) == NORMALIZATION
    assert NORMALIZATION.for_channels(1) == Normalization((0.25,), ((0.25 + 0.5 + 1.) / 3,))
    assert len(NORMALIZATION.for_channels(4).mean) == 4
