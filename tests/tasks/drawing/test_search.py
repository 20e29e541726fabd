from __future__ import annotations

import itertools
from types import SimpleNamespace

import matplotlib.pyplot as plt
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


def test_trajectory_follows_the_convention_of_the_windows():
    result = SimpleNamespace(trajectory=torch.tensor([[[[0.25, 0.75]], [[0.5, 0.5]]]]), losses=torch.ones(1, 2))
    for convention, offset in (('patch', 0.5), ('spot', 0.)):
        picture, _ = timm_spot.draw_trajectory(torch.zeros(3, 40, 80), result, convention=convention)
        start, end = (c.get_offsets() for c in picture.collections)
        np.testing.assert_allclose(start, [[60 - offset, 10 - offset]])
        np.testing.assert_allclose(end, [[40 - offset, 20 - offset]])
        line, = picture.lines
        np.testing.assert_allclose(line.get_xydata(), [[60 - offset, 10 - offset], [40 - offset, 20 - offset]])


def test_the_image_asked_for_is_drawn():
    result = spirals(4, 3)
    picture, loss = timm_spot.draw_trajectory(torch.zeros(3, 50, 100), result, index=1)
    assert all(np.ptp(line.get_xydata(), axis=0).max() == 0 for line in picture.lines)  # nothing moves in the second
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [[0, 1], [1, 1], [2, 1], [3, 1]])
    assert (loss.get_title(), loss.get_xlabel()) == ('loss', 'step')
    _, loss = timm_spot.draw_trajectory(torch.zeros(3, 50, 100), result, objective='entropy')
    assert loss.get_title() == 'loss: entropy' and loss.get_box_aspect() == 0.6


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


@pytest.mark.parametrize('convention, first', [('patch', (55.5, 5.5, 8, 8)), ('spot', (54.667, 7.333, 10.667, 5.333))])
def test_frames_show_the_windows_of_their_step(tmp_path, monkeypatch, convention, first):
    result = SimpleNamespace(
        trajectory=torch.tensor([[[[0., 0.]], [[0., 0.]]], [[[0.25, 0.75]], [[0.5, 0.5]]]]),
        losses=torch.tensor([[9., 9.], [1.5, 0.25]]))
    frames = []

    def record(self, **kwargs):
        ax, = self.fig.axes
        window, = ax.collections[0].get_paths()
        frames.append((ax.get_title(), window.get_extents().bounds, ax.get_xlim()))

    monkeypatch.setattr('matplotlib.animation.PillowWriter.grab_frame', record)
    monkeypatch.setattr('matplotlib.animation.PillowWriter.finish', lambda self: open(self.outfile, 'w').close())
    timm_spot.animate(torch.zeros(3, 40, 80), result, 8, tmp_path / 'film.gif', 1, convention=convention)
    assert [title for title, _, _ in frames] == ['step 0, loss 1.500', 'step 1, loss 0.250']
    np.testing.assert_allclose(frames[0][1], first, atol=1e-3)
    moved = np.add(first, (-20, 10, 0, 0))
    np.testing.assert_allclose(frames[1][1], moved, atol=1e-3)
    assert frames[0][2] == frames[1][2]  # the view stays


def test_a_film_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(self):
        self.outfile.write_bytes(b'half of it')
        raise OSError('disk full')

    (tmp_path / 'film.gif').write_text('mine')
    monkeypatch.setattr('matplotlib.animation.PillowWriter.finish', fail)
    with pytest.raises(OSError, match='disk full'):
        timm_spot.animate(torch.zeros(3, 32, 32), spirals(4, 3), 8, tmp_path / 'film.gif')
    assert [path.name for path in tmp_path.iterdir()] == ['film.gif']
    assert (tmp_path / 'film.gif').read_text() == 'mine'
    assert not plt.get_fignums()


def test_film_without_ffmpeg_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(RuntimeError, match='needs the program ffmpeg'):
        timm_spot.animate(torch.zeros(3, 32, 32), spirals(4, 3), 8, tmp_path / 'film.mp4')
