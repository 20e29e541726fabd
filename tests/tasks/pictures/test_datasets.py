from __future__ import annotations

import io
import tarfile

import pytest
import timm
import torch
from PIL import Image

from timm_spot.tasks.pictures import datasets as data
from timm_spot.tasks.pictures.datasets import Pictures, check_classes
from timm_spot.tasks.pictures.decoded import Decoded
from timm_spot.tasks.pictures.digits import to_input
from timm_spot.tasks.pictures.images import model_transform
from timm_spot.tasks.processes import Processes

ALONE = Processes(0, 1, torch.device('cpu'))


@pytest.fixture
def folder(tmp_path):
    """Ten class folders of two pictures each."""
    for label in range(10):
        (tmp_path / 'data' / str(label)).mkdir(parents=True)
        for i in range(2):
            Image.effect_noise((80, 70), 40 + label).save(tmp_path / 'data' / str(label) / f'{i}.png')
    return tmp_path / 'data'


def read(pictures, model, out, processes=ALONE, **options):
    decoded = Decoded(pictures, model, out, 8, processes, **options)
    decoded.decode(lambda count: None)
    return decoded, list(decoded)


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
    monkeypatch.setitem(data._CANVASES_PER_DIGIT, 'held_out', 1)
    pictures = Pictures('digits')
    assert len(pictures) == 359
    decoded, batches = read(pictures, pico, tmp_path)
    assert torch.equal(torch.cat([decoded.normalize(b.pixels) for b in batches]), to_input(pictures.canvases, pico))


def test_nothing_is_decoded_twice(pico, folder, tmp_path):
    pictures = Pictures(str(folder))
    _, first = read(pictures, pico, tmp_path)
    for file in folder.rglob('*.png'):
        file.write_text('')  # whoever opens it again finds out
    _, second = read(pictures, pico, tmp_path)
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


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # timm leaves its tar open
@pytest.mark.filterwarnings('ignore::ResourceWarning')
def test_a_tar_is_read_as_its_folder(pico, folder, tmp_path):
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        for label in range(10):
            for i in range(2):
                tar.add(folder / str(label) / f'{i}.png', f'{label}/{i}.png')
        broken = tarfile.TarInfo('9/2.png')
        tar.addfile(broken, io.BytesIO())
    _, expected = read(Pictures(str(folder)), pico, tmp_path)
    pictures = Pictures(str(tmp_path / 'data.tar'))
    check_classes(pictures, pico)
    decoded, batches = read(pictures, pico, tmp_path, skip_broken=True)
    assert torch.equal(torch.cat([b.pixels for b in batches]), torch.cat([b.pixels for b in expected]))
    assert len(decoded.broken) == 1


def test_a_stream_is_read_in_order_by_one_process(pico, folder, tmp_path, monkeypatch):
    kept = Pictures(str(folder))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (kept[i] for i in range(20))

    monkeypatch.setattr(data, 'create_dataset', lambda *args, **kwargs: Stream())
    stream = Pictures('wds/some', root='somewhere')
    _, batches = read(stream, pico, tmp_path)
    _, expected = read(kept, pico, tmp_path)
    assert torch.equal(torch.cat([b.pixels for b in batches]), torch.cat([b.pixels for b in expected]))
    assert torch.cat([b.labels for b in batches]).tolist() == [i // 2 for i in range(20)]
    with pytest.raises(ValueError, match='wds/some is a stream'):
        read(stream, pico, tmp_path, _Shared(0, 2, torch.device('cpu')))


def test_missing_class_folder(pico, folder):
    check_classes(Pictures(str(folder)), pico)
    for file in (folder / '4').iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r'has 9 classes, the model 10 \(missing: 4\)'):
        check_classes(Pictures(str(folder)), timm.create_model('spot_vit_pico_patch8_64', pretrained=True))


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no folder or tar'):
        Pictures(str(tmp_path / 'missing'))


def test_the_digest_knows_names_and_labels(folder):
    before = Pictures(str(folder)).digest()
    assert Pictures(str(folder)).digest() == before
    (folder / '0' / '0.png').rename(folder / '1' / '7.png')
    assert Pictures(str(folder)).digest() != before
