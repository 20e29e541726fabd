from __future__ import annotations

import os

import pytest
import timm
import torch
from picture_files import noise, write_all
from PIL import Image

from timm_spot.tasks.pictures.classes import class_names
from timm_spot.tasks.pictures.datasets import Pictures
from timm_spot.tasks.pictures.images import model_transform
from timm_spot.tasks.predict import looks_foreign, predict, read_batches


def test_predict_sorts_classes(pico):
    images = torch.randn(2, 3, 64, 64)
    rows = predict(pico, images, class_names(pico), topk=3)
    probabilities = pico(images).softmax(dim=1)
    for row, expected in zip(rows, probabilities):
        assert [s.label for s in row] == expected.topk(3).indices.tolist()
        assert row[0].probability == pytest.approx(expected.max().item())
    assert len(predict(pico, images, class_names(pico), topk=99)[0]) == 10


def test_batches_hold_the_good_pictures_in_order(tmp_path, pico):
    for i in range(5):
        noise(20 + i, 20).save(tmp_path / f'good{i}.png')
    bad = write_all(tmp_path)
    broken = []
    batches = list(read_batches(Pictures([str(tmp_path)]), pico, 2, broken))
    assert [os.path.basename(name) for batch in batches for name in batch.names] == [f'good{i}.png' for i in range(5)]
    assert all(1 <= len(batch.images) == len(batch.names) <= 2 for batch in batches)
    assert len(broken) == len(bad) and all(any(name in said for said in broken) for name in bad)
    transform = model_transform(pico)
    expected = torch.stack([transform(noise(20 + i, 20)) for i in range(5)])
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)


def test_a_stream_is_read_in_batches(tmp_path, pico, monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return ((noise(20 + i, 20), 0) for i in range(3))

    monkeypatch.setattr('timm_spot.tasks.pictures.sources.create_dataset', lambda *args, **kwargs: Stream())
    batches = list(read_batches(Pictures(['wds/some']), pico, 2, []))
    assert [batch.names for batch in batches] == [['wds/some 0', 'wds/some 1'], ['wds/some 2']]


@pytest.mark.parametrize('picture, foreign', [
    (Image.new('RGB', (64, 64), 'white'), False),
    (Image.new('RGB', (128, 100)), False),
    (Image.new('RGB', (129, 20)), True),  # more than twice as wide
    (Image.new('RGB', (64, 64), (40, 23, 30)), True),  # 17 between the channels
    (Image.new('RGB', (64, 64), (40, 25, 30)), False),
])
def test_what_is_clearly_no_canvas(picture, foreign):
    assert looks_foreign(picture) == foreign


def test_only_the_model_of_digits_minds_photographs(tmp_path):
    noise(300, 200).save(tmp_path / 'photo.png')
    Image.new('L', (64, 64)).save(tmp_path / 'canvas.png')
    for keywords, expected in ((dict(pretrained=True), ['photo.png']), (dict(num_classes=3), [])):
        model = timm.create_model('spot_vit_pico_patch8_64', **keywords).eval()
        batch, = read_batches(Pictures([str(tmp_path)]), model, 8, [])
        assert [os.path.basename(name) for name in batch.foreign] == expected
