from __future__ import annotations

import io
import os
import tarfile

import pytest
import torch
from picture_files import write_all, write_classes

from timm_spot.tasks.pictures import decoded as decoding
from timm_spot.tasks.pictures import sources
from timm_spot.tasks.pictures.datasets import Pictures
from timm_spot.tasks.pictures.decoded import Decoded
from timm_spot.tasks.pictures.digits import to_input
from timm_spot.tasks.pictures.images import model_transform
from timm_spot.tasks.processes import Processes

ALONE = Processes(0, 1, torch.device('cpu'))


@pytest.fixture
def folder(tmp_path):
    return write_classes(tmp_path / 'data')


def read(pictures, model, out, processes=ALONE, **options):
    decoded = Decoded(pictures, model, out, 8, processes, **options)
    decoded.decode(lambda count: None)
    return decoded, list(decoded)


def refuse(*args):
    raise AssertionError(f'called with {args}')


def test_what_is_decoded_is_what_the_transform_gives(pico, folder, tmp_path):
    pictures = Pictures(str(folder))
    decoded, batches = read(pictures, pico, tmp_path / 'out')
    assert torch.cat([b.index for b in batches]).tolist() == list(range(20))
    assert torch.cat([b.labels for b in batches]).tolist() == [i // 2 for i in range(20)]
    transform = model_transform(pico)
    for batch in batches:
        expected = torch.stack([transform(pictures[i][0]) for i in batch.index.tolist()])
        assert torch.equal(decoded.normalize(batch.pixels), expected)


def test_digits_are_the_canvases(pico, tmp_path, monkeypatch):
    monkeypatch.setitem(sources._CANVASES_PER_DIGIT, 'held_out', 1)
    pictures = Pictures('digits')
    assert len(pictures) == 359
    decoded, batches = read(pictures, pico, tmp_path)
    assert torch.equal(torch.cat([decoded.normalize(b.pixels) for b in batches]), to_input(pictures.canvases, pico))


def test_nothing_is_decoded_twice(pico, folder, tmp_path, monkeypatch):
    _, first = read(Pictures(str(folder)), pico, tmp_path)
    monkeypatch.setattr(Pictures, '__getitem__', refuse)  # whoever opens one again finds out
    _, second = read(Pictures(str(folder)), pico, tmp_path)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, second))


@pytest.mark.parametrize('count', [2, 3, 5])
def test_processes_share_the_pictures_without_rest(pico, folder, tmp_path, count):
    seen = []
    for rank in range(count):
        _, batches = read(Pictures(str(folder)), pico, tmp_path, _Shared(rank, count, torch.device('cpu')))
        seen += [i for batch in batches for i in batch.index.tolist()]
    assert sorted(seen) == list(range(20))


class _Shared(Processes):
    """One of several processes, without the others to talk to."""

    def gather(self, items):
        return items


def test_a_broken_picture_is_an_error_or_a_listed_skip(pico, folder, tmp_path):
    (folder / '3' / '0.png').write_bytes((folder / '3' / '0.png').read_bytes()[:200])
    with pytest.raises(ValueError, match=r'3/0\.png is damaged'):
        read(Pictures(str(folder)), pico, tmp_path)
    decoded, batches = read(Pictures(str(folder)), pico, tmp_path, skip_broken=True)
    assert torch.cat([b.index for b in batches]).tolist() == [i for i in range(20) if i != 6]
    assert len(decoded.broken) == 1 and '3/0.png' in decoded.broken[0]
    with pytest.raises(ValueError, match=r'--skip-broken leaves'):
        read(Pictures(str(folder)), pico, tmp_path)


def test_a_tar_is_read_as_its_folder(pico, folder, tmp_path):
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        for label in range(10):
            for i in range(2):
                tar.add(folder / str(label) / f'{i}.png', f'{label}/{i}.png')
        broken = tarfile.TarInfo('9/2.png')
        tar.addfile(broken, io.BytesIO())
    _, expected = read(Pictures(str(folder)), pico, tmp_path)
    pictures = Pictures(str(tmp_path / 'data.tar'))
    decoded, batches = read(pictures, pico, tmp_path, skip_broken=True)
    assert torch.equal(torch.cat([b.pixels for b in batches]), torch.cat([b.pixels for b in expected]))
    assert len(decoded.broken) == 1


def test_a_stream_is_read_in_order_by_one_process(pico, folder, tmp_path, monkeypatch):
    kept = Pictures(str(folder))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (kept[i] for i in range(20))

    monkeypatch.setattr(sources, 'create_dataset', lambda *args, **kwargs: Stream())
    stream = Pictures('wds/some', root='somewhere')
    _, batches = read(stream, pico, tmp_path)
    _, expected = read(kept, pico, tmp_path)
    assert torch.equal(torch.cat([b.pixels for b in batches]), torch.cat([b.pixels for b in expected]))
    assert torch.cat([b.labels for b in batches]).tolist() == [i // 2 for i in range(20)]
    with pytest.raises(ValueError, match='wds/some is a stream'):
        read(stream, pico, tmp_path, _Shared(0, 2, torch.device('cpu')))


def test_all_kinds_of_bad_pictures_are_left_out_by_name(pico, folder, tmp_path):
    bad = write_all(folder / '3')
    decoded, batches = read(Pictures(str(folder)), pico, tmp_path, skip_broken=True)
    assert sum(len(b.index) for b in batches) == 20
    assert len(decoded.broken) == len(bad)
    assert all(any(name in said for said in decoded.broken) for name in bad)


def test_none_that_can_be_read_is_an_error(pico, tmp_path):
    for label in range(10):
        (tmp_path / 'data' / str(label)).mkdir(parents=True)
        (tmp_path / 'data' / str(label) / 'a.png').write_text('no picture')
    with pytest.raises(ValueError, match=r'data holds no picture that can be read: .*0/a\.png'):
        read(Pictures(str(tmp_path / 'data')), pico, tmp_path, skip_broken=True)


# ---------------------------------------------------------------------------------------------------------------------
# Kept


def test_a_batch_appears_whole_or_not_at_all(pico, folder, tmp_path, monkeypatch):
    """A kill in the midst of a file: a run that goes on makes it again, and ends with the same pixels."""
    pictures = Pictures(str(folder))
    _, expected = read(pictures, pico, tmp_path / 'whole')
    save, written = decoding.save_file, []

    def half(tensors, path, **options):
        save(tensors, path, **options)
        written.append(path)
        if len(written) == 2:
            whole = path.read_bytes()
            path.write_bytes(whole[:len(whole) // 2])
            monkeypatch.setattr(os, 'replace', refuse)
            raise KeyboardInterrupt

    monkeypatch.setattr(decoding, 'save_file', half)
    killed = Decoded(pictures, pico, tmp_path / 'killed', 8, ALONE)
    with pytest.raises(KeyboardInterrupt):
        killed.decode(lambda count: None)
    monkeypatch.undo()
    assert killed.parts.file(0).exists() and not killed.parts.file(1).exists()
    assert all(path.name not in {killed.parts.file(b).name for b in range(3)} for path in written)
    done = []
    again = Decoded(pictures, pico, tmp_path / 'killed', 8, ALONE)
    again.decode(done.append)
    assert done == [8, 8, 4]  # the first was there
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(again, expected))


def test_leftovers_of_a_kill_go_at_the_next_run(pico, folder, tmp_path):
    pictures = Pictures(str(folder))
    decoded, _ = read(pictures, pico, tmp_path)
    leftover = decoded.parts.file(1).with_name('.000000001.4711.tmp.safetensors')
    leftover.write_bytes(b'half a batch')
    read(pictures, pico, tmp_path)
    assert not leftover.exists() and decoded.parts.file(1).exists()


@pytest.mark.parametrize('damage', [lambda data: data[:100], lambda data: b'', lambda data: b'x' * len(data)])
def test_a_damaged_batch_is_made_again(pico, folder, tmp_path, damage):
    pictures = Pictures(str(folder))
    decoded, batches = read(pictures, pico, tmp_path)
    expected = [batch.pixels.clone() for batch in batches]  # what is read lies in the file itself
    file = decoded.parts.file(1)
    file.write_bytes(damage(file.read_bytes()))
    _, again = read(pictures, pico, tmp_path)
    assert all(torch.equal(a.pixels, b) for a, b in zip(again, expected))


def test_other_contents_under_the_same_names_are_decoded_anew(pico, folder, tmp_path):
    _, before = read(Pictures(str(folder)), pico, tmp_path)
    (folder / '0' / '0.png').write_bytes((folder / '9' / '1.png').read_bytes())
    _, after = read(Pictures(str(folder)), pico, tmp_path)
    assert not torch.equal(before[0].pixels[0], after[0].pixels[0])
    assert torch.equal(after[0].pixels[0], after[-1].pixels[-1])
    assert torch.equal(before[0].pixels[1:], after[0].pixels[1:])


def test_a_changed_class_map_gives_changed_labels(pico, folder, tmp_path):
    """A run killed under one class map and resumed under another joined both."""
    class_map = tmp_path / 'map.txt'
    labels = []
    for names in ('0123456789', '9876543210'):
        class_map.write_text('\n'.join(names))
        _, batches = read(Pictures(str(folder), class_map=str(class_map)), pico, tmp_path)
        labels.append(torch.cat([b.labels for b in batches]))
    assert torch.equal(labels[0], 9 - labels[1])
