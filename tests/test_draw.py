from __future__ import annotations

import matplotlib
import pytest
import torch

from timm_spot.tasks.draw import draw_placement

matplotlib.use('Agg')


def test_windows_lie_where_they_are_read():
    ax = draw_placement(torch.rand(3, 32, 64), torch.tensor([[0.25, 0.5], [1., 1.]]), 8)
    first, second = (path.vertices for path in ax.collections[0].get_paths())
    # Pixel 0 spans -0.5 to 0.5, so p = 0.25 of 32 px lies at 7.5; (x, y) order.
    assert first.min(axis=0).tolist() == pytest.approx([27.5, 3.5])
    assert first.max(axis=0).tolist() == pytest.approx([35.5, 11.5])
    assert second.max(axis=0).tolist() == pytest.approx([67.5, 35.5])
    assert ax.get_xlim() == (-0.5, 63.5) and ax.get_ylim() == (31.5, -0.5)
    matplotlib.pyplot.close('all')
