from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_spot.tasks.pictures.files import find_images
from timm_spot.tasks.pictures.images import denormalize, load_image, model_transform, to_rgb
from timm_spot.tasks.predict import class_names, predict


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'in').mkdir()
    for name in ('b.png', 'a.jpg', 'in/c.png'):
        Image.new('RGB', (80, 60), 'white').save(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('no picture')
    return tmp_path


def test_files_folders_and_globs(folder):
    def names(*sources):
        return [f.name for f in find_images([str(folder / s) for s in sources])]

    assert names('b.png') == ['b.png']
    assert names('') == ['a.jpg', 'b.png', 'c.png']
    assert names('*.png') == ['b.png']
    assert names('**/*.png') == ['b.png', 'c.png']
    assert names('b.png', '') == ['b.png', 'a.jpg', 'c.png']


def test_nothing_to_predict(folder):
    (folder / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='empty holds no picture'):
        find_images([str(folder / 'empty')])
    with pytest.raises(FileNotFoundError, match='no file, no folder and matches nothing'):
        find_images([str(folder / '*.tiff')])


def test_no_picture_and_damaged_picture(folder, pico):
    transform = model_transform(pico)
    with pytest.raises(ValueError, match=r'notes\.txt is no picture'):
        load_image(folder / 'notes.txt', transform)
    whole = (folder / 'a.jpg').read_bytes()
    (folder / 'a.jpg').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=r'a\.jpg is damaged'):
        load_image(folder / 'a.jpg', transform)


def test_sixteen_bits_are_scaled_down(tmp_path):
    """PIL's own conversion makes everything from 255 of 65,535 white."""
    deep = np.array([[0, 257, 32896], [25700, 65278, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / 'deep.png')
    loaded = load_image(tmp_path / 'deep.png', np.asarray)
    expected = [[[v] * 3 for v in row] for row in ([0, 1, 128], [100, 254, 255])]
    assert loaded.tolist() == expected
    older = Image.fromarray(deep.astype(np.int32))
    older.format = 'PNG'  # as older versions of PIL open the same file
    assert np.asarray(to_rgb(older)).tolist() == expected


def indexed(index, transparency):
    picture = Image.new('P', (2, 2), index)
    picture.putpalette([9, 8, 7, 3, 2, 1])
    picture.info['transparency'] = transparency
    return picture


@pytest.mark.parametrize('picture, expected', [
    (Image.new('1', (2, 2), 1), (255, 255, 255)),
    (Image.new('L', (2, 2), 7), (7, 7, 7)),
    (Image.new('LA', (2, 2), (7, 0)), (7, 7, 7)),
    (Image.new('RGBA', (2, 2), (9, 8, 7, 0)), (9, 8, 7)),
    (indexed(1, bytes([0, 128])), (3, 2, 1)),
    (indexed(0, 0), (9, 8, 7)),
    (Image.new('CMYK', (2, 2), (0, 0, 0, 255)), (0, 0, 0)),
])
def test_every_mode_becomes_rgb(picture, expected):
    assert to_rgb(picture).getpixel((1, 1)) == expected


@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_values_of_unknown_range_are_refused(tmp_path, dtype, pico):
    Image.fromarray(np.full((70, 70), 9, dtype)).save(tmp_path / 'depth.tiff')
    with pytest.raises(ValueError, match=r'depth\.tiff cannot be used: its pixels have 32 bits'):
        load_image(tmp_path / 'depth.tiff', model_transform(pico))


def test_transform_is_that_of_the_model(folder, pico):
    image = load_image(folder / 'b.png', model_transform(pico))
    assert image.shape == (3, 64, 64)
    mean, std = pico.pretrained_cfg['mean'][0], pico.pretrained_cfg['std'][0]
    torch.testing.assert_close(image, torch.full((3, 64, 64), (1 - mean) / std))


def test_class_names(pico):
    assert class_names(pico) == list('0123456789')
    assert class_names(timm.create_model('spot_vit_pico_patch8_64', num_classes=3)) == ['0', '1', '2']
    names = class_names(timm.create_model('spot_vit_tiny_patch16_in21k', depth=1))
    assert len(names) == 1000 and 'tench' in names[0]


def test_predict_sorts_classes(pico):
    images = torch.randn(2, 3, 64, 64)
    rows = predict(pico, images, class_names(pico), topk=3)
    probabilities = pico(images).softmax(dim=1)
    for row, expected in zip(rows, probabilities):
        assert [s.label for s in row] == expected.topk(3).indices.tolist()
        assert row[0].probability == pytest.approx(expected.max().item())
    assert len(predict(pico, images, class_names(pico), topk=99)[0]) == 10


def test_denormalize_undoes_the_transform_of_a_picture():
    model = timm.create_model('spot_vit_pico_patch8_64', pretrained=True)
    picture = torch.rand(2, 3, 64, 64)
    images = (picture - 0.1) / 0.25  # the mean and std of the digits model
    torch.testing.assert_close(denormalize(model, images), picture)
    assert denormalize(model, torch.full((3, 64, 64), 9.)).max() == 1
