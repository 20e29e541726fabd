"""Files of pictures that tests read: good ones, and those that are none, each in its own way."""
from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def noise(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_classes(folder: Path, count: int = 2) -> Path:
    """Ten folders of classes, 0 to 9, of so many pictures each."""
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for i in range(count):
            Image.effect_noise((80, 70), 40 + label).save(folder / str(label) / f'{i}.png')
    return folder


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def write_png(path: Path, size: tuple[int, int], *chunks: bytes) -> None:
    """A PNG header, black pixels of two bits to the byte or so, and whatever chunks lie between."""
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', *size, 8, 0, 0, 0, 0))
    pixels = chunk(b'IDAT', zlib.compress(bytes(4096)))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + header + b''.join(chunks) + pixels + chunk(b'IEND', b''))


def bomb(path: Path) -> None:
    write_png(path, (20_000, 20_000))


def garbage_between_chunks(path: Path) -> None:
    write_png(path, (30, 30), b'\x00\x00\x00\x07\xff\xfe\xfd\xfcgarbage')


def text_chunk_too_large(path: Path) -> None:
    write_png(path, (30, 30), chunk(b'zTXt', b'Comment\0\0' + zlib.compress(bytes(80 * 2 ** 20))))


def truncated(path: Path) -> None:
    noise().save(path)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def text(path: Path) -> None:
    path.write_text('no picture')


def empty(path: Path) -> None:
    path.write_bytes(b'')


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_nothing(path: Path) -> None:
    path.symlink_to('nowhere.png')


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to('/dev/zero')


def postscript(path: Path) -> None:
    path.write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 30\n%%EndComments\nshowpage\n')


def strip(path: Path) -> None:
    Image.new('L', (5000, 2)).save(path)


def signed(path: Path) -> None:
    Image.fromarray(np.full((9, 9), 7, np.int32)).save(path, format='TIFF')


# By what an error says of them; all may be called .png or .jpg, for it is the contents that decide.
BAD = {
    bomb: 'exceeds limit',
    garbage_between_chunks: 'is damaged|no picture',
    text_chunk_too_large: 'too large',
    truncated: 'is damaged',
    text: 'is no picture',
    empty: 'is no picture',
    pipe: 'no regular file',
    device: 'no regular file',
    link_to_nothing: 'No such file',
    link_to_itself: 'symbolic link',
    postscript: 'is no picture',
    strip: 'no side may be 1,000 times the other',
    signed: 'its pixels have 32 bits',
}


def write_all(folder: Path) -> list[str]:
    """One of each kind as a .png in a folder; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for make in BAD:
        make(folder / f'bad_{make.__name__}.png')
    return [f'bad_{make.__name__}.png' for make in BAD]
