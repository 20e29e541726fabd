from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from picture_files import noise

from timm_spot.tasks.pictures import sources
from timm_spot.tasks.pictures.images import PictureError
from timm_spot.tasks.pictures.sources import Named, is_named


class Reader:
    """Gives bytes, the last of which are no picture."""

    def __init__(self, fingerprint):
        self.class_to_idx, self.dataset = {'cat': 0, 'dog': 1}, SimpleNamespace(_fingerprint=fingerprint)

    def __getitem__(self, i):
        data = io.BytesIO(b'no picture')
        if i < 2:
            noise(20 + i, 20).save(data, format='PNG')
        return data, i % 2, 'a feature'


class Hub:
    """As timm has a data set of the Hugging Face Hub: a reader, and names for some of its pictures."""

    def __init__(self, fingerprint='a'):
        self.reader = Reader(fingerprint)

    def __len__(self):
        return 3

    def filename(self, i, absolute):
        return [None, 'b.png', 'c.png'][i]


class Cifar:
    """As torchvision has a small data set: all of it in memory."""

    def __init__(self, value=1, targets=(0, 1)):
        self.data, self.targets = np.full((2, 8, 8, 3), value, np.uint8), list(targets)
        self.class_to_idx = {'cat': 0, 'dog': 1}

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return noise(20, 20).convert('L'), self.targets[i]


def digest(part):
    fed = []
    part.feed(fed.append)
    return b''.join(fed)


def test_a_data_set_of_the_hub(monkeypatch):
    monkeypatch.setattr(sources, 'create_dataset', lambda *args, **kwargs: Hub())
    part = Named('hfds/pets', 'test', None, None)
    assert len(part) == 3 and not part.is_stream and part.class_to_idx == {'cat': 0, 'dog': 1}
    (first, label), (second, other) = part.read(0), part.read(1)
    assert (first.size, label, second.size, other) == ((20, 20), 0, (21, 20), 1)
    assert [part.name(i) for i in range(3)] == ['hfds/pets 0', 'b.png', 'c.png']
    with pytest.raises(PictureError, match=r'c\.png is no picture'):
        part.read(2)
    before = digest(part)
    monkeypatch.setattr(sources, 'create_dataset', lambda *args, **kwargs: Hub('another version'))
    assert digest(Named('hfds/pets', 'test', None, None)) != before


def test_a_data_set_in_memory(monkeypatch):
    found = set()
    for arguments in ((1, (0, 1)), (2, (0, 1)), (1, (1, 0))):
        monkeypatch.setattr(sources, 'create_dataset', lambda *_, arguments=arguments, **__: Cifar(*arguments))
        part = Named('torch/cifar10', 'test', 'somewhere', None)
        found.add(digest(part))
    assert len(found) == 3  # its pixels and its labels count
    picture, label = part.read(0)
    assert picture.mode == 'RGB' and label == 1 and part.name(1) == 'torch/cifar10 1'


@pytest.mark.parametrize('source, named', [
    ('digits', True), ('hfds/imagenet-1k', True), ('torch/cifar10', True), ('torch/image_folder', False),
    ('data/val', False), ('data.tar', False)])
def test_who_numbers_the_classes(source, named):
    assert is_named(source) == named
