from __future__ import annotations

import os
import tarfile

import numpy as np
import pytest
import torch
from picture_files import BAD, noise, write_all, write_classes
from PIL import ExifTags, Image

from timm_spot.tasks.pictures import sources
from timm_spot.tasks.pictures.datasets import Pictures
from timm_spot.tasks.pictures.images import PictureError


@pytest.fixture
def folder(tmp_path):
    return write_classes(tmp_path / 'data')


def to_tar(folder, tar):
    with tarfile.open(tar, 'w') as opened:
        opened.add(folder, '.')
    return str(tar)


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no folder or tar'):
        Pictures(str(tmp_path / 'missing'))


def test_pictures_of_a_folder_and_of_its_tar_are_the_same(folder, tmp_path):
    ours, tar = Pictures(str(folder)), Pictures(to_tar(folder, tmp_path / 'data.tar'))
    assert len(ours) == len(tar) == 20 and ours.class_to_idx == tar.class_to_idx == {str(i): i for i in range(10)}
    for i in range(20):
        (a, label), (b, other) = ours[i], tar[i]
        assert np.array_equal(a, b) and label == other == i // 2 and a.mode == 'RGB'
    assert ours.name(3) == str(folder / '1' / '1.png')
    assert tar.name(3) == f'{tmp_path}/data.tar/1/1.png'
    assert [label for _, label in ours] == [i // 2 for i in range(20)]
    with pytest.raises(IndexError):
        ours[20]


def test_several_processes_read_one_tar(folder, tmp_path):
    """Each opens it for itself: timm's reader shares an open file, and its place in it, with the processes it forks."""
    tar = Pictures(to_tar(folder, tmp_path / 'data.tar'))
    tar[0]
    loader = torch.utils.data.DataLoader(tar, batch_size=1, num_workers=2, collate_fn=list)
    for i, [(picture, label)] in enumerate(loader):
        assert np.array_equal(picture, tar[i][0]) and label == i // 2


@pytest.mark.parametrize('split, subfolder', [
    ('validation', 'val'), ('validation', 'validation'), ('train', 'training'), ('test', 'test')])
def test_a_subfolder_of_the_split_is_the_data_set(tmp_path, split, subfolder):
    write_classes(tmp_path / 'data' / subfolder, 1)
    (tmp_path / 'data' / 'other').mkdir()
    noise().save(tmp_path / 'data' / 'other' / 'a.png')
    assert len(Pictures(str(tmp_path / 'data'), split)) == 10
    assert len(Pictures([str(tmp_path / 'data')], split)) == 11  # pictures, whatever the splits


def test_several_sources_are_pictures_without_labels(folder, tmp_path):
    tar = to_tar(folder / '0', tmp_path / 'zeros.tar')
    pictures = Pictures([str(folder / '1'), str(folder / '1' / '0.png'), tar, str(folder / '2' / '*.png')])
    names = [os.path.relpath(pictures.name(i), tmp_path) for i in range(len(pictures))]
    assert names == [
        'data/1/0.png', 'data/1/1.png', 'zeros.tar/0.png', 'zeros.tar/1.png', 'data/2/0.png', 'data/2/1.png']
    assert not pictures.broken and not pictures.has_labels and {label for _, label in pictures} == {-1}


def test_the_good_ones_of_several_sources_are_read(folder):
    pictures = Pictures([str(folder / '1'), 'missing.png', str(folder / '2'), str(folder / 'none*.png')])
    assert len(list(pictures)) == 4
    assert ['missing.png' in pictures.broken[0], 'none*.png' in pictures.broken[1]] == [True, True]
    assert len(Pictures(['missing.png'])) == 0


def test_a_name_is_a_file_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sources._CANVASES_PER_DIGIT, 'held_out', 1)
    monkeypatch.chdir(tmp_path)
    assert len(Pictures(['digits'])) == 359
    (tmp_path / 'digits').mkdir()
    noise().save(tmp_path / 'digits' / 'a.png')
    assert len(Pictures(['digits'])) == 1
    assert len(Pictures('digits')) == 359  # as a data set it is the canvases


@pytest.mark.parametrize('make', list(BAD), ids=lambda make: make.__name__)
@pytest.mark.parametrize('source', ['folder', 'torch/image_folder'])
def test_a_bad_picture_is_an_error_with_its_name(folder, make, source):
    make(folder / '0' / '2.png')
    pictures = Pictures(str(folder)) if source == 'folder' else Pictures(source, root=str(folder))
    files = [pictures.name(i) for i in range(len(pictures))]
    # torchvision's folders list files of any kind, but for links that lead nowhere.
    index = files.index(str(folder / '0' / '2.png'))
    with pytest.raises(PictureError, match=rf'0/2\.png .*({BAD[make]})'):
        pictures[index]
    assert pictures[0][1] == 0


def test_pipes_and_links_to_nothing_among_the_pictures_do_not_stop_the_others(folder):
    bad = write_all(folder / '4')
    pictures, good, broken = Pictures(str(folder)), 0, []
    for i in range(len(pictures)):
        try:
            pictures[i]
            good += 1
        except PictureError as e:
            broken.append(str(e))
    assert good == 20 and len(broken) == len(bad)


def test_a_folder_that_cannot_be_searched_is_told(folder, monkeypatch):
    listdir = os.listdir

    def forbid(path):
        if os.path.basename(path) == '3':
            raise PermissionError(13, 'Permission denied')
        return listdir(path)

    monkeypatch.setattr(os, 'listdir', forbid)  # root may search any
    pictures = Pictures(str(folder))
    assert len(pictures) == 18 and '3 cannot be searched: Permission denied' in pictures.broken[0]


@pytest.mark.parametrize('source', ['folder', 'tar', 'torch/image_folder'])
def test_exif_orientation_is_applied_in_every_kind_of_data_set(tmp_path, source):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / 'data' / 'a').mkdir(parents=True)
    noise(40, 30).save(tmp_path / 'data' / 'a' / 'turned.jpg', exif=exif)
    folder = tmp_path / 'data'
    pictures = {
        'folder': lambda: Pictures(str(folder)), 'tar': lambda: Pictures(to_tar(folder, tmp_path / 'data.tar')),
        'torch/image_folder': lambda: Pictures(source, root=str(folder))}[source]()
    assert pictures[0][0].size == (30, 40)


def test_a_stream_is_upright_too(monkeypatch):
    picture = noise(40, 30)
    picture.getexif()[ExifTags.Base.Orientation] = 6

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield picture, 3

    monkeypatch.setattr(sources, 'create_dataset', lambda *args, **kwargs: Stream())
    stream = Pictures('wds/some', root='somewhere')
    assert stream.is_stream and len(stream) == 0
    assert [(p.size, label) for p, label in stream] == [((30, 40), 3)]


# ---------------------------------------------------------------------------------------------------------------------
# Digest


def test_the_digest_knows_names_and_labels(folder):
    before = Pictures(str(folder)).digest()
    assert Pictures(str(folder)).digest() == before
    (folder / '0' / '0.png').rename(folder / '1' / '7.png')
    assert Pictures(str(folder)).digest() != before


def test_the_digest_knows_sizes_and_times_of_change(folder, tmp_path):
    before = Pictures(str(folder)).digest()
    file = folder / '0' / '0.png'
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    touched = Pictures(str(folder)).digest()
    assert touched != before
    file.write_bytes(file.read_bytes() + b' ')
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert Pictures(str(folder)).digest() not in (before, touched)

    tar = to_tar(folder, tmp_path / 'data.tar')
    before = Pictures(tar).digest()
    assert Pictures(tar).digest() == before
    os.utime(tar, ns=(0, 0))
    assert Pictures(tar).digest() != before


def test_the_digest_knows_split_and_class_map(folder, tmp_path):
    class_map = tmp_path / 'map.txt'
    digests = {Pictures(str(folder)).digest(), Pictures(str(folder), 'test').digest()}
    for names in ('0123456789', '9876543210'):
        class_map.write_text('\n'.join(names))
        digests.add(Pictures(str(folder), class_map=str(class_map)).digest())
    assert len(digests) == 3  # the first class map is the order that the folders have anyway


def test_the_digest_of_a_data_set_by_name_knows_its_name_split_and_root(folder, monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    monkeypatch.setattr(sources, 'create_dataset', lambda *args, **kwargs: Stream())
    digests = {Pictures(name, split, root).digest() for name in ('wds/a', 'wds/b') for split in ('train', 'test')
               for root in (None, 'x')}
    assert len(digests) == 8


def test_the_digest_of_the_digits_is_that_of_earlier_versions(monkeypatch):
    """So that their rows in a results.csv are found."""
    import hashlib

    monkeypatch.setitem(sources._CANVASES_PER_DIGIT, 'held_out', 1)
    pictures = Pictures('digits')
    assert pictures.digest() == hashlib.sha256(pictures.canvases.numpy().tobytes()).hexdigest()[:12]


def test_names_that_are_no_utf8_have_a_digest(tmp_path):
    (tmp_path / 'a').mkdir()
    with open(bytes(tmp_path) + b'/a/\xff.png', 'wb') as file:
        noise().save(file, format='PNG')
    pictures = Pictures(str(tmp_path))
    assert len(pictures.digest()) == 12 and pictures[0][0].size == (40, 30)
