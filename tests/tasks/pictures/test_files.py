from __future__ import annotations

import os
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture_files import noise
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils import natural_key

from timm_spot.tasks.pictures.files import (
    find_images,
    find_pictures,
    list_folder,
    list_source,
    natural_order,
    open_regular,
    printable,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'in').mkdir()
    for name in ('b.png', 'a.jpg', 'in/c.png'):
        noise(8, 6).save(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('no picture')
    return tmp_path


def refuse(message):
    raise AssertionError(message)


def test_files_folders_and_globs(folder):
    def names(*sources):
        return [f.name for f in find_images([str(folder / s) for s in sources])]

    assert names('b.png') == ['b.png']
    assert names('') == ['a.jpg', 'b.png', 'c.png']
    assert names('*.png') == ['b.png']
    assert names('**/*.png') == ['b.png', 'c.png']
    assert names('b.png', '') == ['b.png', 'a.jpg', 'c.png']


def test_nothing_there(folder):
    (folder / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='empty holds no picture'):
        find_images([folder / 'empty'])
    with pytest.raises(FileNotFoundError, match='no file, no folder and matches nothing'):
        find_images([folder / '*.tiff'])


def test_what_is_missing_in_a_list_is_told_and_the_rest_is_found(folder):
    found, broken = find_pictures([folder / 'b.png', folder / 'missing.png', folder / 'in'])
    assert [entry.name for entry in found] == [str(folder / 'b.png'), str(folder / 'in' / 'c.png')]
    assert len(broken) == 1 and 'missing.png is no file' in broken[0]


def test_a_name_with_the_signs_of_a_pattern_is_a_file(folder):
    noise(8, 6).save(folder / 'b[1].png')
    assert [f.name for f in find_images([folder / 'b[1].png'])] == ['b[1].png']


def test_a_folder_with_the_name_of_a_picture_is_a_folder(folder):
    (folder / 'x.png').mkdir()
    noise(8, 6).save(folder / 'x.png' / 'd.png')
    names = ['a.jpg', 'b.png', 'c.png', 'd.png']
    assert [f.name for f in find_images([folder])] == names
    assert [f.name for f in find_images([folder / '*.png'])] == ['b.png']
    assert [f.name for f in find_images([folder / 'x.png'])] == ['d.png']


def test_links_to_folders_are_followed_and_loops_are_not(folder):
    (folder / 'link').symlink_to(folder / 'in')
    (folder / 'in' / 'loop').symlink_to(folder)
    (folder / 'in' / 'self').symlink_to('self')
    found = list_folder(str(folder), refuse)
    assert [os.path.relpath(entry.name, folder) for entry in found] == ['a.jpg', 'b.png', 'in/c.png', 'link/c.png']
    assert [entry.folder for entry in found] == ['', '', 'in', 'link']


def test_pipes_and_links_to_nothing_are_listed_for_whoever_reads_them(folder):
    os.mkfifo(folder / 'pipe.png')
    (folder / 'lost.png').symlink_to('nowhere')
    assert {'pipe.png', 'lost.png'} < {f.name for f in find_images([folder])}
    with pytest.raises(ValueError, match='no regular file'):
        open_regular(folder / 'pipe.png')
    assert find_images([folder / 'pipe.png', folder / 'lost.png']) == [folder / 'pipe.png', folder / 'lost.png']


def test_a_folder_that_cannot_be_searched_is_told(folder, monkeypatch):
    listdir = os.listdir

    def forbid(path):
        if os.path.basename(path) == 'in':
            raise PermissionError(13, 'Permission denied')
        return listdir(path)

    monkeypatch.setattr(os, 'listdir', forbid)  # root may search any
    told = []
    assert [os.path.basename(e.name) for e in list_folder(str(folder), told.append)] == ['a.jpg', 'b.png']
    assert told == [f'folder {folder}/in cannot be searched: Permission denied.']


def test_the_order_is_that_of_timm(tmp_path):
    for name in ('10/1.png', '9/10.png', '9/9.png', 'B/a.png', 'a/Z.png', 'a/b.png', '9/x2y10.png', '9/x2y9.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise(2, 2).save(tmp_path / name)
    reader = ReaderImageFolder(str(tmp_path))
    assert [entry.name for entry in list_folder(str(tmp_path), refuse)] == [name for name, _ in reader.samples]


@given(st.text('ab12²:/.', max_size=12))
def test_natural_order_is_that_of_timm_where_it_has_one(name):
    try:
        expected = natural_key(name)
    except ValueError:  # of superscripts, which are digits but no decimals
        return
    assert natural_order(name) == expected


def test_superscripts_have_an_order():
    assert sorted(['1²10', '1²9', '1'], key=natural_order) == ['1', '1²9', '1²10']


def test_a_tar_lists_its_members_and_those_of_tars_inside(folder, tmp_path):
    with tarfile.open(tmp_path / 'inner.tar', 'w') as tar:
        tar.add(folder / 'in' / 'c.png', 'c.png')
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        tar.add(folder / 'b.png', 'x/b.png')
        tar.add(tmp_path / 'inner.tar', 'y.tar')
        tar.add(folder / 'notes.txt', 'x/notes.txt')
    entries = {os.path.basename(e.name): e for e in list_source(str(tmp_path / 'data.tar'), refuse)}
    assert {name: entry.folder for name, entry in entries.items()} == {'b.png': 'x', 'c.png': 'y'}
    assert entries['b.png'].name == f'{tmp_path}/data.tar/x/b.png'
    for name, file in (('b.png', folder / 'b.png'), ('c.png', folder / 'in' / 'c.png')):
        with entries[name].open() as opened:
            assert opened.read() == file.read_bytes()


@pytest.mark.parametrize('contents', [b'', b'no tar at all', bytes(10_240)])
def test_a_tar_that_is_none_is_named(tmp_path, contents):
    (tmp_path / 'data.tar').write_bytes(contents)
    with pytest.raises(ValueError, match=r'data\.tar is no tar of pictures that can be read'):
        list_source(str(tmp_path / 'data.tar'), refuse)


@pytest.mark.parametrize('name, shown', [
    ('photo é.png', 'photo é.png'),
    (os.fsdecode(b'\xff\xfe.png'), '\\xff\\xfe.png'),
    ('a\nb\x1b[31m.png', 'a\\nb\\x1b[31m.png'),
])
def test_any_name_can_be_printed(name, shown):
    assert printable(name) == shown
    shown.encode('utf-8')
