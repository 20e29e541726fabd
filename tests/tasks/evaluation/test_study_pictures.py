from __future__ import annotations

import pytest
import torch
from PIL import Image

from timm_spot.tasks.evaluation.study_pictures import open_study_pictures


def test_one_canvas_of_each_of_the_first_digits(pico):
    few, more = open_study_pictures('digits', 5), open_study_pictures('digits', 7)
    assert len(few) == 5 and few.labels.tolist() == more.labels[:5].tolist()
    assert few.images(pico).shape == (5, 3, 64, 64) and few.digest != more.digest
    assert few.images(pico) is few.images(pico)  # read once


def test_pictures_spread_over_a_folder_of_which_there_are_fewer(tmp_path, pico):
    for label in range(10):
        (tmp_path / str(label)).mkdir()
        Image.effect_noise((64, 64), 20 + 9 * label).save(tmp_path / str(label) / '0.png')
    pictures = open_study_pictures(str(tmp_path), 4)
    assert pictures.labels.tolist() == [0, 3, 6, 9]
    everything = open_study_pictures(str(tmp_path), 100)
    assert len(everything) == 10
    assert torch.equal(everything.images(pico)[[0, 3, 6, 9]], pictures.images(pico))


def test_what_is_no_set_of_pictures_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        open_study_pictures(str(tmp_path / 'nowhere'), 4)
    (tmp_path / '0').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path / '0' / '0.png')
    with pytest.raises(ValueError, match='must have two pictures at least'):
        open_study_pictures(str(tmp_path), 4)
