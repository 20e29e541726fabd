from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_spot
from timm_spot.ops.density import place_by_density
from timm_spot.tasks.drawing.density import animate_budgets, draw_density
from timm_spot.tasks.drawing.kinds import KINDS, Settings, Subject

pytestmark = pytest.mark.usefixtures('default_style')


def corner():
    """Three quarters of the density in the upper left quarter."""
    density = torch.full((4, 6), 0.25 / 24)
    density[:2, :3] += 0.75 / 6
    return density


def test_density_lattice_and_windows_of_one_placement():
    positions = place_by_density(timm_spot.sample_positions('isotropic', 9, (40, 60))[0], corner()[None])
    heat, lattice, windows = draw_density(torch.rand(3, 40, 60), corner(), positions, window=8)
    np.testing.assert_allclose(heat.images[1].get_array(), corner())
    assert heat.images[1].get_extent() == [-0.5, 59.5, 39.5, -0.5]  # on the whole picture
    assert windows.get_title().startswith('9 tokens cover')
    centres = (positions[0] * torch.tensor([40, 60]) - 0.5).flip(-1)
    np.testing.assert_allclose(windows.collections[1].get_offsets(), centres, rtol=1e-5, atol=1e-4)
    lines = [np.stack(line.get_data(), axis=-1) for line in lattice.lines[::2]]
    assert len(lines) == 24 and all(len(line) == 64 for line in lines)
    # A share of 0.5 / 12 + i / 12 of the density lies above each of the first lines, which are level.
    level = [line[:, 1] for line in lines[:12]]
    assert all(np.ptp(y) < 1e-4 for y in level)
    above = 0.75 + 0.25 / 2
    middle = (np.array([y[0] for y in level]) + 0.5) / 40
    np.testing.assert_allclose(
        middle, [share / above / 2 if share < above else 1 - (1 - share) / (1 - above) / 2
                 for share in (np.arange(12) + 0.5) / 12], rtol=1e-4)
    plt.close(heat.figure)
    with pytest.raises(ValueError, match=r'density must have shape \(h, w\), got \(1, 4, 6\)'):
        draw_density(torch.rand(3, 40, 60), corner()[None], positions, window=8)


def test_a_film_has_a_frame_for_each_budget(tmp_path):
    placements = [timm_spot.sample_positions('isotropic', n, (40, 60))[0] for n in (4, 9, 16)]
    path = animate_budgets(torch.zeros(3, 40, 60), placements, 8, tmp_path / 'film.gif', fps=5)
    with Image.open(path) as film:
        assert film.n_frames == 3 and film.info['duration'] == 200
        orange = []
        for i in range(3):
            film.seek(i)
            frame = np.asarray(film.convert('RGB')).astype(int)
            orange.append(((frame[..., 0] - frame[..., 2]) > 60).sum())
    assert orange == sorted(orange) and orange[0] > 0
    with pytest.raises(ValueError, match=r'must end in \.gif or \.mp4'):
        animate_budgets(torch.zeros(3, 40, 60), placements, 8, tmp_path / 'film.png')


def test_kinds_of_a_model_with_a_placer(tmp_path, monkeypatch):
    model = timm.create_model('spot_vit_pico_patch8_64', placer='density', n_tokens=9).eval()
    subject = Subject(model, torch.randn(1, 3, 64, 64))
    KINDS['density'].write(subject, Settings(), tmp_path / 'density.png')
    assert (tmp_path / 'density.png').stat().st_size > 1000
    monkeypatch.setattr('timm_spot.tasks.drawing.kinds.FILM_BUDGETS', (4, 9))
    KINDS['budgets'].write(subject, Settings(), tmp_path / 'budgets.gif')
    with Image.open(tmp_path / 'budgets.gif') as film:
        assert film.n_frames == 2
    assert model.n_tokens == 9
    plain = Subject(timm.create_model('spot_vit_pico_patch8_64', n_tokens=9).eval(), subject.images)
    with pytest.raises(ValueError, match="sampler 'isotropic' has no density: draw a model with placer='density'"):
        KINDS['density'].write(plain, Settings(), tmp_path / 'none.png')
