from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

import timm_spot
from timm_spot.tasks.drawing.figure import DARK

pytestmark = pytest.mark.usefixtures('default_style')


def test_pruning_outlines_survivors_and_numbers_the_others_by_stage():
    positions = timm_spot.sample_positions('isotropic', 4, (32, 32))[0]
    kept = [torch.tensor([[0, 2, 3]]), torch.tensor([[2]])]
    ax = timm_spot.draw_pruning(Image.new('RGB', (32, 32), 'white'), positions, kept, 16)
    numbers = {tuple(text.get_position()): text.get_text() for text in ax.texts}
    assert numbers == {(7.5, 7.5): '2', (23.5, 7.5): '1', (23.5, 23.5): '2'}
    assert [p.get_xy() for p in ax.patches if not p.get_fill()] == [(-0.5, 15.5)]
    shades = {p.get_xy(): p.get_alpha() for p in ax.patches if p.get_fill()}
    # The sooner a token falls, the darker.
    assert shades == {(15.5, -0.5): 0.85, (-0.5, -0.5): 0.425, (15.5, 15.5): 0.425}
    assert all(p.get_facecolor()[:3] == pytest.approx(to_rgb(DARK)) for p in ax.patches if p.get_fill())
    assert ax.get_title() == '4 → 3 → 1 tokens'
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ['falls at stage 1', 'falls at stage 2', 'stays']
    assert [patch.get_alpha() for patch in legend.get_patches()] == [0.85, 0.425, None]
    with pytest.raises(ValueError, match='kept is empty'):
        timm_spot.draw_pruning(Image.new('RGB', (32, 32)), positions, [], 16)
    with pytest.raises(ValueError, match='kept holds index 4, positions only 4 tokens'):
        timm_spot.draw_pruning(Image.new('RGB', (32, 32)), positions, [torch.tensor([4])], 16)
    with pytest.raises(ValueError, match='kept holds index -1, positions only 4 tokens'):
        timm_spot.draw_pruning(Image.new('RGB', (32, 32)), positions, [torch.tensor([-1, 2])], 16)


@pytest.mark.parametrize('convention, window', [('patch', (55.5, 5.5, 8, 8)), ('spot', (54.667, 7.333, 10.667, 5.333))])
def test_windows_lie_where_the_model_reads(convention, window):
    """A dropped one and a kept one at the same place: (0.25, 0.75) of 40 x 80 pixels."""
    positions = torch.tensor([[0.25, 0.75], [0.25, 0.75]])
    ax = timm_spot.draw_pruning(torch.zeros(3, 40, 80), positions, [torch.tensor([1])], 8, convention=convention)
    drawn = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in ax.patches]
    np.testing.assert_allclose(drawn, [window, window], atol=1e-3)
    assert [patch.get_fill() for patch in ax.patches] == [True, False]
    assert ax.get_title() == '2 → 1 tokens'


def test_windows_have_their_size():
    placement = torch.tensor([[0.5, 0.25, 2., 3.], [0.25, 0.75, 1., 1.]])
    ax = timm_spot.draw_pruning(torch.zeros(3, 40, 80), placement, [torch.tensor([1])], 8)
    drawn = [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in ax.patches]
    assert drawn == [(7.5, 11.5, 24, 16), (55.5, 5.5, 8, 8)]
