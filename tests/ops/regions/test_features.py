from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed

from timm_spot.ops.regions import features as rf

SEGMENTATION = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]])
SIZES = torch.tensor([7, 5])
BOXES = torch.tensor([[0, 0], [0, 2], [2, 2], [2, 3]])


def test_means_are_replaced():
    images, colors = torch.rand(1, 3, 3, 4), torch.rand(3, 2)
    injected = rf.inject_means(images, SEGMENTATION, SIZES, colors)
    assert injected.shape == (1, 3, 4, 3)
    torch.testing.assert_close(rf.region_means(injected.permute(0, 3, 1, 2), SEGMENTATION, SIZES), colors)
    torch.testing.assert_close(injected[0, 0, 0] - injected[0, 2, 2], images[0, :, 0, 0] - images[0, :, 2, 2])


def test_windows_by_hand():
    ramp = torch.arange(12.).view(1, 3, 4, 1)
    windows, masks = rf.region_windows(ramp, SEGMENTATION, BOXES, torch.zeros(2, dtype=torch.long), 3)
    assert windows[0, 0].tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert windows[1, 0].tolist() == [[2, 2.5, 3], [6, 6.5, 7], [10, 10.5, 11]]
    assert masks[0].tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert masks[1].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0.5, 1]]


def test_one_row_and_one_sample():
    images, segmentation = torch.rand(1, 1, 4, 3), torch.zeros(1, 1, 4, dtype=torch.long)
    box, image = torch.tensor([[0], [0], [0], [3]]), torch.tensor([0])
    windows, masks = rf.region_windows(images, segmentation, box, image, 4)
    torch.testing.assert_close(windows[0], images[0].permute(2, 0, 1).expand(-1, 4, -1))
    assert (masks == 1).all()
    windows, _ = rf.region_windows(images, segmentation, box, image, 1)
    torch.testing.assert_close(windows[0, :, 0, 0], images[0, 0, 0])


def test_histograms_by_hand():
    position = rf.position_histogram(SEGMENTATION, SIZES, 2, scale=32)
    assert position[0].flatten().tolist() == pytest.approx([4 / 7, 0, 2 / 7, 1 / 7])
    assert position[1].flatten().tolist() == pytest.approx([0, 4 / 5, 0, 1 / 5])
    assert rf.position_histogram(SEGMENTATION, SIZES, 2)[0, 0, 0].item() == pytest.approx(4 / 7 * 256)
    gradient = torch.zeros(1, 2, 3, 4)
    gradient[0, 0, 0, 0], gradient[0, 1, 0, 0] = -1., 0.9
    histogram = rf.gradient_histogram(SEGMENTATION, SIZES, gradient, 4) / 64.
    assert histogram[0, 0, 3].item() == pytest.approx(1 / 7)
    assert histogram[0, 2, 2].item() == pytest.approx(6 / 7)


def test_gradient_of_a_ramp():
    y, x = torch.meshgrid(torch.arange(5.), torch.arange(6.), indexing='ij')
    gradient = rf.scharr_gradient((0.1 * y + 0.3 * x).expand(1, 3, -1, -1))
    torch.testing.assert_close(gradient[0, 0, 1:-1, 1:-1], torch.full((3, 4), 0.1))
    torch.testing.assert_close(gradient[0, 1, 1:-1, 1:-1], torch.full((3, 4), 0.3))


def test_constant_image_has_constant_windows():
    windows, _ = rf.region_windows(
        torch.full((1, 3, 4, 3), 0.7), SEGMENTATION, BOXES, torch.zeros(2, dtype=torch.long), 8)
    torch.testing.assert_close(windows, torch.full_like(windows, 0.7))


@pytest.mark.parametrize('cells', [14, 16])
def test_fit_reproduces_a_table(cells):
    """Exactly on the ViT's own patches, whose histograms are those of real segmentations."""
    torch.manual_seed(0)
    table = F.interpolate(torch.randn(1, 8, 4, 4), (14, 14), mode='bicubic')[0].permute(1, 2, 0)
    weight = rf.fit_histogram_weights(table, cells, cells)
    patches = (torch.arange(224)[:, None] // 16 * 14 + torch.arange(224) // 16)[None]
    histogram = rf.position_histogram(patches, torch.full((196,), 256), cells).flatten(1)
    error = (histogram @ weight.T - table.flatten(0, 1)).norm() / table.norm()
    assert error < 2e-5


@pytest.mark.parametrize('kind, cells, expected', [('sines', 16, 0.011), ('random', 16, 0.49), ('random', 24, 0.093)])
def test_fit_between_the_patches(kind, cells, expected):
    """What docs/dht.md says of boxes between the patches, whose targets are the table's bicubic interpolation."""
    torch.manual_seed(0)
    table = build_sincos2d_pos_embed([14, 14], 768).view(14, 14, -1) if kind == 'sines' else torch.randn(14, 14, 64)
    weight = rf.fit_histogram_weights(table, cells, cells)
    at = (0.5 + 13 * torch.rand(2000, 2, dtype=torch.float64)) / 14
    target = F.grid_sample(
        table.double().permute(2, 0, 1)[None], 2 * at.flip(-1)[None, None] - 1, mode='bicubic',
        padding_mode='border', align_corners=False)[0, :, 0].T
    fitted = rf.box_histogram(at, (1 / 14, 1 / 14), cells, cells) @ weight.double().T
    assert ((fitted - target).norm() / target.norm()).item() == pytest.approx(expected, rel=0.1)
