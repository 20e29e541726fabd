from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
from picture_files import noise
from timm.data import ImageNetInfo

from timm_spot.tasks.pictures.classes import (
    check_classes,
    check_same_classes,
    class_mismatch,
    class_names,
    label_names,
    load_class_map,
)
from timm_spot.tasks.pictures.datasets import Pictures

WORDS = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']


@pytest.fixture(scope='module')
def digits_model():
    return timm.create_model('spot_vit_pico_patch8_64', pretrained=True)


def test_class_names(digits_model):
    assert class_names(digits_model) == list('0123456789')
    assert class_names(timm.create_model('spot_vit_pico_patch8_64', num_classes=3)) == ['0', '1', '2']
    names = class_names(timm.create_model('spot_vit_tiny_patch16_in21k', depth=1))
    assert len(names) == 1000 and 'tench' in names[0]


def write(folder, names, count=1):
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise(8, 8).save(folder / name / f'{i}.png')
    return str(folder)


def named(names, num_classes=None):
    """A model that knows the names of its classes."""
    return SimpleNamespace(
        pretrained_cfg=dict(label_names=names), num_classes=num_classes or len(names), in_chans=3)


def listed(names, is_named=True, class_map=''):
    """A data set, by the names of its classes in their order."""
    return SimpleNamespace(
        source='data', class_to_idx={name: i for i, name in enumerate(names)}, has_labels=True, is_named=is_named,
        class_map=class_map)


def test_folders_of_the_models_own_names_fit(tmp_path, digits_model):
    assert label_names(digits_model) == list('0123456789')
    check_classes(Pictures(write(tmp_path, '0123456789')), digits_model)


def test_other_names_are_an_error_with_both_lists_and_the_remedy(tmp_path, digits_model):
    """In words the digits are sorted by the alphabet: 7.5 % right, without a word."""
    pictures = Pictures(write(tmp_path / 'data', WORDS))
    with pytest.raises(ValueError) as error:
        check_classes(pictures, digits_model)
    said = str(error.value)
    assert 'has the classes eight, five, four, nine, one and 5 more' in said
    assert "the model's are 0, 1, 2, 3, 4 and 5 more" in said and "number 0 is 'eight' and '0'" in said
    assert 'give --class-map' in said
    (tmp_path / 'map.txt').write_text('\n'.join(WORDS))
    mapped = Pictures(str(tmp_path / 'data'), class_map=str(tmp_path / 'map.txt'))
    check_classes(mapped, digits_model)
    assert [mapped[i][1] for i in range(10)] == [8, 5, 4, 9, 1, 7, 6, 3, 2, 0]


def test_the_same_names_in_another_order_are_an_error():
    pictures = listed(['cat', 'dog'], is_named=False)
    assert class_mismatch(pictures, named(['cat', 'dog'])) == ''
    assert "number 0 is 'cat' and 'dog'" in class_mismatch(pictures, named(['dog', 'cat']))


def test_numbers_name_their_classes():
    assert class_mismatch(listed(['0', '1'], is_named=False), named(['dog', 'cat'])) == ''
    assert 'labels would be wrong' in class_mismatch(listed(['1', '2'], is_named=False), named(['dog', 'cat']))


def test_one_wrong_name_of_many_is_an_error_for_folders_only():
    """A data set by name has numbers of its own, and its spelling may differ here and there."""
    names = [f'class {i}' for i in range(9)] + ['tench, Tinca tinca']
    other = [f'Class_{i}' for i in range(8)] + ['something else', 'tench']
    assert class_mismatch(listed(names), named(other)) == ''
    assert class_mismatch(listed(names, is_named=False), named(other)) != ''
    assert class_mismatch(listed(names), named(WORDS)) != ''


def test_names_of_imagenet_are_known_of_a_model_with_as_many_classes():
    model = SimpleNamespace(pretrained_cfg={}, num_classes=1000, in_chans=3)
    synsets = ImageNetInfo().label_names()
    descriptions = ImageNetInfo().label_descriptions()
    assert class_mismatch(listed(synsets, is_named=False), model) == ''
    assert class_mismatch(listed(descriptions), model) == ''  # two of them are cranes
    assert 'number 0' in class_mismatch(listed(synsets[::-1], is_named=False), model)
    alphabet = sorted(descriptions)  # the cranes are one folder
    assert 'number 0' in class_mismatch(listed([*dict.fromkeys(alphabet), 'zzz'], is_named=False), model)
    # Of another data set of a thousand classes nobody knows the names.
    assert class_mismatch(listed([f'bird {i:04d}' for i in range(1000)], is_named=False), model) == ''


def test_another_number_of_classes(tmp_path, digits_model):
    folder = write(tmp_path, '012356789')
    with pytest.raises(ValueError, match=r'has 9 classes, the model 10: labels would be wrong'):
        check_classes(Pictures(folder), SimpleNamespace(pretrained_cfg={}, num_classes=10, in_chans=3))
    with pytest.raises(ValueError, match=r'has 9 classes, the model 10 \(missing: 4\)'):
        check_classes(Pictures(folder), digits_model)


def test_pictures_without_folders_have_no_labels(tmp_path, pico):
    for i in range(3):
        noise(8, 8).save(tmp_path / f'{i}.png')
    for source in (tmp_path, tmp_path / '0.png', tmp_path / '*.png'):
        pictures = Pictures(str(source))
        assert not pictures.has_labels and pictures[0][1] == -1
        with pytest.raises(ValueError, match='has no labels'):
            check_classes(pictures, pico)


def test_a_model_of_other_channels_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r'spot_vit_pico_patch8_64 reads images of 4 channels'):
        check_classes(
            Pictures(write(tmp_path, '0123456789')), timm.create_model('spot_vit_pico_patch8_64', in_chans=4))


def test_neighbours_of_other_classes_are_an_error():
    """Labels were compared by their numbers alone."""
    data = listed(['ant', 'bee', 'cat'], is_named=False)
    check_same_classes(data, data)
    check_same_classes(listed(['ant', 'bee'], is_named=False), data)  # one has no pictures
    for other in (['bee', 'ant', 'cat'], ['ant', 'cat'], ['ant', 'bee', 'dog'], ['ant', 'bee']):
        with pytest.raises(ValueError, match=r'has the classes ant, bee, cat, data, .*: labels would be wrong'):
            check_same_classes(data, listed(other, is_named=False))
    check_same_classes(data, listed([]))  # one side has no names
    check_same_classes(listed(['Ant', 'honey_bee, bee', 'cat']), listed(['ant', 'bee', 'cat']))
    unlabelled = SimpleNamespace(**{**vars(data), 'has_labels': False})
    with pytest.raises(ValueError, match='data has no labels'):
        check_same_classes(data, unlabelled)


# ---------------------------------------------------------------------------------------------------------------------
# Class maps


def test_a_class_map_is_one_name_a_line(tmp_path):
    (tmp_path / 'map.txt').write_text('\ufeffcat\r\n guinea pig \ndog\n\n', encoding='utf-8')
    expected = {'cat': 0, 'guinea pig': 1, 'dog': 2}
    assert load_class_map(str(tmp_path / 'map.txt')) == expected
    assert load_class_map('map.txt', str(tmp_path)) == expected


@pytest.mark.parametrize('name, contents, error, says', [
    ('none.txt', None, FileNotFoundError, 'is no file'),
    ('map', b'cat\n', ValueError, r'must be a \.txt'),
    ('map.pkl', b'\x80\x04}.', ValueError, r'must be a \.txt'),
    ('map.txt', b'', ValueError, 'it is empty'),
    ('map.txt', b'cat\n\ndog\n', ValueError, 'line 2 is empty'),
    ('map.txt', b'cat\ndog\ncat\n', ValueError, 'line 3 is there twice'),
    ('map.txt', b'\xff\xfe\xfd', ValueError, 'no text in UTF-8'),
])
def test_a_class_map_that_is_none_is_one_error(tmp_path, name, contents, error, says):
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    folder = write(tmp_path / 'data', ['cat', 'dog'])
    with pytest.raises(error, match=f'class_map=.*{name} {says}|class_map=.*{name} .*{says}'):
        Pictures(folder, class_map=str(tmp_path / name))


def test_a_folder_as_class_map_is_one_error(tmp_path):
    folder = write(tmp_path / 'data', ['cat', 'dog'])
    with pytest.raises(FileNotFoundError, match='is no file'):
        Pictures(folder, class_map=folder)


def test_a_class_map_of_another_data_set_is_one_error(tmp_path):
    folder = write(tmp_path / 'data', ['cat', 'dog'])
    (tmp_path / 'map.txt').write_text('apple\npear\n')
    with pytest.raises(ValueError, match=r"names no folder of .*data: it has 'apple', 'pear' .*'cat', 'dog'"):
        Pictures(folder, class_map=str(tmp_path / 'map.txt'))


def test_folders_beside_the_class_map_are_told(tmp_path):
    folder = write(tmp_path / 'data', ['cat', 'cow', 'dog'])
    (tmp_path / 'map.txt').write_text('dog\ncat\n')
    with pytest.warns(UserWarning, match='1 folders of .*data are not in the class map and left out: cow'):
        pictures = Pictures(folder, class_map=str(tmp_path / 'map.txt'))
    assert [pictures[i][1] for i in range(len(pictures))] == [1, 0]


def test_a_class_map_where_it_is_of_no_use(tmp_path):
    (tmp_path / 'map.txt').write_text('dog\ncat\n')
    with pytest.raises(ValueError, match='is of no use to torch/image_folder'):
        Pictures('torch/image_folder', root=str(tmp_path), class_map=str(tmp_path / 'map.txt'))
