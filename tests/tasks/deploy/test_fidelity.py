from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import timm_spot
from timm_spot.tasks.deploy.fidelity import Fidelity, compare, read_batches
from timm_spot.tasks.pictures.datasets import Pictures


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Nine pictures in folders of the classes' names, and a file that is none."""
    folder = tmp_path_factory.mktemp('pictures')
    for i in range(9):
        label = folder / 'ape bee cow'.split()[i % 3]
        label.mkdir(exist_ok=True)
        Image.effect_noise((70, 64), 30 * (i + 1)).convert('RGB').save(label / f'{i}.png')
    (folder / 'bee' / 'z.png').write_bytes(b'none')
    return folder


@pytest.mark.parametrize('measured, says', [
    (dict(agreement=97.), ''),
    (dict(agreement=96.), ''),  # 4 +- 1.9
    (dict(agreement=94.), '6.0 % of its answers on 400 pictures are not those of the model, more than 3.0'),
    (dict(agreement=50., accuracy=80., model_accuracy=80.5, error=0.), ''),
    (dict(agreement=99., accuracy=80., model_accuracy=81.), 'loses 1.0 points of accuracy on 400 pictures'),
    (dict(agreement=99., accuracy=80., model_accuracy=81., error=0.3), ''),
    (dict(agreement=99., accuracy=82., model_accuracy=81.), ''),
    (dict(agreement=10., source='', cosine=0.95), ''),
    (dict(agreement=99., source='', cosine=0.85), 'cosine of its logits to the model.s is 0.850, below 0.9'),
])
def test_what_is_refused(measured, says):
    verdict = Fidelity(**dict(dict(source='folder', pictures=400, cosine=0.99), **measured)).verdict
    assert (says in verdict.replace("'", '.')) if says else verdict == ''


def test_a_float_file_answers_alike(tiny, float_file, folder):
    found = compare(tiny, timm_spot.OnnxModel(float_file, threads=1), Pictures(str(folder)))
    assert (found.pictures, found.agreement, found.error) == (9, 100., 0.)
    assert found.cosine == pytest.approx(1.) and found.accuracy == found.model_accuracy
    assert '100.0 % of the answers' in str(found) and 'accuracy' in str(found) and str(folder) in str(found)
    other = compare(tiny, timm_spot.OnnxModel(float_file, threads=1), None)
    assert other.pictures == 64 and other.accuracy is None and 'say little: give real ones' in str(other)


def test_right_answers_are_counted(tiny, float_file, folder):
    """Of a file that always says `bee`."""
    class Bees(timm_spot.OnnxModel):
        def __call__(self, images, positions):
            return np.tile(np.array([[0., 1., 0.]], np.float32), (len(images), 1))

    found = compare(tiny, Bees(float_file), Pictures(str(folder)))
    assert found.accuracy == pytest.approx(100 / 3)


def test_halves_of_a_folder_share_no_picture(float_file, folder):
    pictures, file = Pictures(str(folder)), timm_spot.OnnxModel(float_file, threads=1)
    halves = [sum(len(images) for images, _ in read_batches(file, pictures, first, 2)) for first in (0, 1)]
    assert sum(halves) == 9 and len(pictures) == 10
    images, labels = next(read_batches(file, pictures, most=3))
    assert images.shape == (3, 3, 64, 64) and images.dtype == np.uint8 and labels == [0, 1, 2]
