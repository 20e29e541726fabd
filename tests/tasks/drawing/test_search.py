from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawing import read_photo, spirals
from PIL import Image

import timm_spot

pytestmark = pytest.mark.usefixtures('default_style')


def test_trajectory_has_start_path_and_end_of_every_token():
    image, result = torch.zeros(3, 50, 100), spirals(9, 20)
    picture, loss = timm_spot.draw_trajectory(image, result)
    start, end = (c.get_offsets() for c in picture.collections)
    for offsets, step in ((start, 0), (end, -1)):
        np.testing.assert_allclose(offsets, (result.trajectory[0, step] * torch.tensor([50, 100]) - 0.5).flip(-1))
    assert len(picture.lines) == 9 and all(len(line.get_xdata()) == 21 for line in picture.lines)
    np.testing.assert_allclose(loss.lines[0].get_ydata(), result.losses[0])
    assert [text.get_text() for text in picture.get_legend().get_texts()] == ['start', 'end']


def test_a_token_that_left_the_image_is_still_drawn():
    result = SimpleNamespace(
        trajectory=torch.tensor([[[[0.9, 0.1]], [[1.2, -0.1]]]]), losses=torch.tensor([[1., 0.5]]))
    picture, _ = timm_spot.draw_trajectory(torch.zeros(3, 100, 100), result)
    (left, right), (bottom, top) = picture.get_xlim(), picture.get_ylim()
    np.testing.assert_allclose((left, right, bottom, top), (-10.5, 99.5, 119.5, -0.5), rtol=1e-5)


def test_wrong_results_are_refused(tmp_path):
    image = torch.zeros(3, 32, 32)
    with pytest.raises(ValueError, match='record=True'):
        timm_spot.draw_trajectory(image, SimpleNamespace(trajectory=None, losses=torch.zeros(1, 2)))
    with pytest.raises(ValueError, match='index=2 does not exist, the result holds 2 images'):
        timm_spot.draw_trajectory(image, spirals(4, 3), index=2)
    with pytest.raises(ValueError, match=r"film\.avi' must end in \.gif or \.mp4"):
        timm_spot.animate(image, spirals(4, 3), 8, tmp_path / 'film.avi')


def test_film_has_a_frame_for_each_step(tmp_path):
    path = timm_spot.animate(read_photo('cowbike', 64, 64), spirals(4, 6), 8, str(tmp_path / 'film.gif'), fps=10)
    assert path == tmp_path / 'film.gif'
    with Image.open(path) as film:
        assert film.n_frames == 7 and film.info['duration'] == 100
        frames = []
        for i in range(7):
            film.seek(i)
            frames.append(np.asarray(film.convert('RGB'), dtype=int))
    assert all(np.abs(a - b).max() > 40 for a, b in itertools.pairwise(frames))


def test_film_without_ffmpeg_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(RuntimeError, match='needs the program ffmpeg'):
        timm_spot.animate(torch.zeros(3, 32, 32), spirals(4, 3), 8, tmp_path / 'film.mp4')
