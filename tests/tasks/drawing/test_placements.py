"""Pictures of placements, and the golden images of all kinds.

`python tests/tasks/drawing/test_placements.py` draws the golden images anew, to be looked at before a commit.
"""
from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawing import place, read_photo, render, spirals
from PIL import Image

import timm_spot
from timm_spot.ops import energy
from timm_spot.ops.placements import sample_placement

pytestmark = pytest.mark.usefixtures('default_style')

GOLDEN = Path(__file__).parents[2] / 'data' / 'draw'


def paint(kind: str, folder: Path) -> Image.Image:
    cyclist, kitchen = read_photo('cowbike', 224, 224), read_photo('oldkitchen', 320, 200)
    if kind == 'placement':
        return render(timm_spot.draw_placement(cyclist, place(25, cyclist), 16).figure)
    if kind == 'seen':
        return render(timm_spot.draw_seen(kitchen, place(49, kitchen), 16).figure, page='#0d1117')
    if kind == 'trajectory':
        return render(timm_spot.draw_trajectory(kitchen, spirals(9, 20))[0].figure)
    if kind == 'priors':
        return render(timm_spot.draw_priors(cyclist)[0, 0].figure)
    if kind == 'priors_blank':
        return render(timm_spot.draw_priors()[0, 0].figure)
    path = timm_spot.animate(cyclist, spirals(16, 4), 16, folder / 'film.gif')
    with Image.open(path) as film:
        film.seek(4)
        return film.convert('RGB').reduce(2)


CHANGED = 0.003  # share of the pixels that may look different
KINDS = ('placement', 'seen', 'trajectory', 'priors', 'priors_blank', 'film')


@pytest.mark.parametrize('kind', KINDS)
def test_golden_image(kind, tmp_path):
    with Image.open(GOLDEN / f'{kind}.png') as golden:
        expected = np.asarray(golden.convert('RGB'), dtype=float)
    drawn = np.asarray(paint(kind, tmp_path), dtype=float)
    assert drawn.shape == expected.shape
    # Another version of FreeType or libjpeg moves a few edges and colours a little.
    difference = np.abs(drawn - expected).max(axis=-1)
    assert difference.mean() < 3 and (difference > 40).mean() < CHANGED


def test_a_moved_window_would_be_noticed():
    """The tolerance of the golden images is no wider than one token in 25."""
    image = read_photo('cowbike', 224, 224)
    positions = place(25, image)[0]
    before = np.asarray(render(timm_spot.draw_placement(image, positions, 16).figure), dtype=float)
    positions[3] = torch.tensor([0.9, 0.7])
    after = np.asarray(render(timm_spot.draw_placement(image, positions, 16).figure), dtype=float)
    assert (np.abs(after - before).max(axis=-1) > 40).mean() > CHANGED


def test_windows_lie_where_the_model_reads():
    image = torch.zeros(3, 40, 80)
    positions = torch.tensor([[0.25, 0.75]])
    patch, spot = (
        timm_spot.draw_placement(image, positions, 8, convention=convention).collections[0].get_paths()[0].get_extents()
        for convention in ('patch', 'spot'))
    # Pixel i is drawn from i - 0.5 to i + 0.5; the centre of the patch window is pixel edge (10, 60).
    assert patch.bounds == (55.5, 5.5, 8, 8)
    # Under `spot` the centre is pixel (10, 60), and a window is stretched with the image: 8 * 2 L / 120.
    np.testing.assert_allclose(spot.bounds, (60 - 16 / 3, 10 - 8 / 3, 32 / 3, 16 / 3))


@pytest.mark.parametrize('convention, centre', [('patch', (59.5, 9.5)), ('spot', (60., 10.))])
def test_a_dot_marks_the_centre_of_a_window(convention, centre):
    ax = timm_spot.draw_placement(torch.zeros(3, 40, 80), torch.tensor([[0.25, 0.75]]), 8, convention=convention)
    np.testing.assert_allclose(ax.collections[1].get_offsets(), [centre])


def test_coverage_counts_pixels_once():
    image = torch.zeros(3, 40, 80)
    positions = torch.tensor([[0.1, 0.05], [0.1, 0.05], [0.9, 0.95], [0., 0.5]])
    # 8 x 8 pixels in two corners (one of them twice) and the lower half of a window across the upper edge.
    assert timm_spot.draw_placement(image, positions, 8).get_title() == f'4 tokens cover {(64 + 64 + 32) / 3200:.0%}'
    assert timm_spot.draw_seen(image, positions, 8).get_title() == '5% of the pixels'


def test_what_a_stretched_window_covers():
    # 40 x 80 pixels, a window of 16 under `spot`: 10.7 x 21.3 pixels around pixel (10, 60), rows 5..15, columns 50..70.
    image, positions = torch.zeros(3, 40, 80), torch.tensor([[0.25, 0.75]])
    assert timm_spot.draw_placement(image, positions, 16, convention='spot').get_title() == '1 tokens cover 7%'
    ax = timm_spot.draw_seen(image, positions, 16, convention='spot')
    shown = ax.images[0].get_array()[..., 3] == 1
    inside = np.zeros((40, 80), bool)
    inside[5:16, 50:71] = True
    assert (shown == inside).all()
    assert ax.get_title() == f'{11 * 21 / 3200:.0%} of the pixels' == '7% of the pixels'
    # And under `patch`, 16 x 16 of them: rows 2..17, columns 52..67.
    shown = timm_spot.draw_seen(image, positions, 16).images[0].get_array()[..., 3] == 1
    inside[:] = False
    inside[2:18, 52:68] = True
    assert (shown == inside).all()


def test_seen_shows_windows_and_nothing_else():
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = timm_spot.draw_seen(image, torch.tensor([[0.5, 0.25]]), 8).images[0].get_array()
    inside = np.zeros((32, 32), bool)
    inside[12:20, 4:12] = True
    np.testing.assert_allclose(seen[inside][:, :3], image.permute(1, 2, 0).numpy()[inside])
    assert (seen[inside][:, 3] == 1).all() and (seen[~inside] == (0.5, 0.5, 0.5, 0.25)).all()


def test_priors_are_those_of_the_sampler():
    axes = timm_spot.draw_priors()
    assert [ax.get_title() for ax in axes.flat] == ['uniform', 'gaussian', 'sobol', 'isotropic', 'center', 'grid']
    assert [len(ax.collections[0].get_paths()) for ax in axes.flat] == [25] * 6
    centre = timm_spot.sample_positions('center', 25, (224, 224))[0].flip(-1) * 224 - 0.5
    np.testing.assert_allclose(axes[1, 1].collections[1].get_offsets(), centre, rtol=1e-5)
    with pytest.raises(ValueError, match='exceeds the 2 x 2 patches'):
        timm_spot.draw_priors(torch.zeros(3, 32, 32))


def test_every_prior_of_an_image_is_drawn_as_it_is_sampled():
    image = torch.zeros(3, 48, 96)
    image[:, 30:34, 70:76] = 1.  # a small bright thing, to the right below
    axes = timm_spot.draw_priors(image, n_tokens=7, window=8)
    panels = {ax.get_title(): ax for ax in axes.flat}
    assert list(panels) == [
        'uniform', 'gaussian', 'sobol', 'isotropic', 'center', 'grid', 'salient', 'salient_sobol', 'salient_inverse',
        'salient_lattice', 'spectral residual', 'energy']
    maps = timm_spot.spectral_residual(image[None])
    np.testing.assert_allclose(panels.pop('spectral residual').images[0].get_array(), maps[0])
    np.testing.assert_allclose(panels.pop('energy').images[0].get_array(), energy(image[None])[0])
    for name, ax in panels.items():
        positions = timm_spot.sample_positions(
            name, 7, (48, 96), saliency=maps, generator=torch.Generator().manual_seed(0), window=8)
        centres = (positions[0] * torch.tensor([48, 96]) - 0.5).flip(-1)
        np.testing.assert_allclose(ax.collections[1].get_offsets(), centres, rtol=1e-5, atol=1e-5)
        windows = [path.get_extents() for path in ax.collections[0].get_paths()]
        np.testing.assert_allclose([(w.width, w.height) for w in windows], [(8, 8)] * 7, rtol=1e-5)


@pytest.mark.parametrize('width, height', [(64, 64), (640, 90), (90, 640), (17, 23)])
@pytest.mark.parametrize('kind', ['placement', 'seen', 'trajectory', 'priors'])
def test_nothing_overlaps_and_the_aspect_is_kept(kind, width, height):
    image = read_photo('cowbike', width, height)
    if kind == 'trajectory':
        axes = timm_spot.draw_trajectory(image, spirals(4, 3))
    elif kind == 'priors':
        axes = timm_spot.draw_priors(image, n_tokens=1).flatten()
    else:
        axes = [dict(placement=timm_spot.draw_placement, seen=timm_spot.draw_seen)[kind](image, place(4, image), 16)]
    figure = axes[0].figure
    figure.canvas.draw()
    page = figure.bbox
    boxes = []
    for ax in axes:
        box = ax.get_window_extent()
        if ax.images:
            shown = np.abs(np.diff([ax.get_xlim(), ax.get_ylim()]))
            assert box.width / box.height == pytest.approx((shown[0] / shown[1]).item(), rel=0.02)
        texts = [ax.title]
        if not ax.images:  # ticks beyond the limits are not drawn
            (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
            texts += [ax.xaxis.label, *(t for t in ax.get_xticklabels() if left <= t.get_position()[0] <= right),
                      *(t for t in ax.get_yticklabels() if bottom <= t.get_position()[1] <= top)]
        boxes += [box, *(text.get_window_extent() for text in texts if text.get_text())]
        boxes += [ax.get_legend().get_window_extent()] if ax.get_legend() else []
    for i, a in enumerate(boxes):
        assert a.x0 >= page.x0 - 1 and a.y0 >= page.y0 - 1 and a.x1 <= page.x1 + 1 and a.y1 <= page.y1 + 1
        for b in boxes[:i]:
            across = min(a.x1, b.x1) - max(a.x0, b.x0)
            down = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert across < 1 or down < 1, (a, b)


def test_windows_are_drawn_at_their_size():
    image, placement = torch.zeros(3, 40, 80), torch.tensor([[0.5, 0.25, 2., 3.], [0.25, 0.75, 1., 1.]])
    ax = timm_spot.draw_placement(image, placement, 8)
    large, small = (path.get_extents().bounds for path in ax.collections[0].get_paths())
    assert large == (20 - 12 - 0.5, 20 - 8 - 0.5, 24, 16) and small == (55.5, 5.5, 8, 8)
    assert ax.get_title() == f'2 tokens cover {(24 * 16 + 64) / 3200:.0%}'
    placement = sample_placement('isotropic', 8, (40, 80), window=8, coverage=1.)
    assert timm_spot.draw_placement(image, placement, 8).get_title() == '8 tokens cover 100%'
    assert timm_spot.draw_seen(image, placement, 8).get_title() == '100% of the pixels'
    with pytest.raises(ValueError, match="positions hold spacings, but under convention='spot' windows have one size"):
        timm_spot.draw_placement(image, placement, 8, convention='spot')


def test_what_is_seen_is_as_sharp_as_its_window():
    image = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    # All of it by 8 x 8 samples, 4 x 8 pixels each, and a quarter pixel below its middle a window of single pixels.
    placement = torch.tensor([[0.5 + 0.25 / 32, 0.5, 1., 1.], [0.5, 0.5, 4., 8.]])
    seen = torch.from_numpy(timm_spot.draw_seen(image, placement, 8).images[0].get_array()[..., :3].copy())
    coarse = F.interpolate(F.avg_pool2d(image, (4, 8)), (32, 64), mode='bilinear')[0].permute(1, 2, 0).clone()
    coarse[12:20, 28:36] = image[0, :, 12:20, 28:36].permute(1, 2, 0)
    torch.testing.assert_close(seen.float(), coarse, rtol=0., atol=1e-5)


def test_an_axes_of_ones_own_is_used():
    figure, ax = plt.subplots(facecolor='red')
    ax.set_ylabel('mine')
    image = read_photo('cowbike', 64, 64)
    assert timm_spot.draw_placement(image, place(4, image), 8, ax=ax) is ax
    assert timm_spot.draw_seen(image, place(4, image), 8, ax) is ax
    assert figure.get_facecolor() == (1, 0, 0, 1)
    assert ax.axison and ax.get_ylabel() == 'mine'
    figure, axes = plt.subplots(1, 2)
    assert (timm_spot.draw_trajectory(image, spirals(4, 3), axes=axes) == axes).all()


def test_wrong_positions_are_refused():
    image = torch.zeros(3, 32, 32)
    with pytest.raises(ValueError, match=r'shape \(N, 2\), one placement, got \(2, 9, 2\)'):
        timm_spot.draw_placement(image, torch.zeros(2, 9, 2), 8)
    with pytest.raises(ValueError, match=r'positions of shape \(1, 2\) hold NaN'):
        timm_spot.draw_seen(image, torch.tensor([[0.5, float('nan')]]), 8)
    with pytest.raises(ValueError, match="convention='patches' is unknown"):
        timm_spot.draw_placement(image, torch.zeros(1, 2), 8, convention='patches')


if __name__ == '__main__':
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        paint(kind, GOLDEN).save(GOLDEN / f'{kind}.png', optimize=True)
    (GOLDEN / 'film.gif').unlink()
