from __future__ import annotations

import io
import subprocess
import warnings

import numpy as np
import pytest
import timm
import torch
from picture_files import BAD, chunk, noise, write_png
from PIL import ExifTags, Image, features
from timm.data import create_transform, resolve_model_data_config

from timm_spot.tasks.pictures.images import (
    PictureError,
    denormalize,
    load_image,
    model_normalization,
    model_transform,
    picture_channels,
    picture_size,
    read_grey,
    read_picture,
    to_rgb,
)

# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read


@pytest.mark.parametrize('make', list(BAD), ids=lambda make: make.__name__)
def test_a_bad_picture_is_one_error_with_its_name(tmp_path, make):
    path = tmp_path / 'some picture.png'
    make(path)
    with pytest.raises(PictureError, match=rf'some picture\.png .*({BAD[make]})'):
        read_picture(path)


@pytest.mark.parametrize('format, options', [
    ('PNG', {}), ('JPEG', {}), ('GIF', {}), ('TIFF', {}), ('BMP', {}), ('WEBP', {}), ('PPM', {}),
    pytest.param('AVIF', {}, marks=pytest.mark.skipif(not features.check('avif'), reason='this PIL reads no AVIF')),
    pytest.param(
        'JPEG2000', {}, marks=pytest.mark.skipif(not features.check('jpg_2000'), reason='this PIL reads no JPEG 2000')),
])
def test_a_damaged_file_of_any_format_is_named_or_read(tmp_path, format, options):
    """Cut anywhere, or with a byte changed anywhere: a picture or an error with the name, never another error."""
    whole = io.BytesIO()
    noise().save(whole, format=format, **options)
    whole = whole.getvalue()
    rng = np.random.default_rng(1)
    cut = [whole[:n] for n in rng.integers(1, len(whole), 12)]
    changed = []
    for at, value in zip(rng.integers(0, len(whole), 40), rng.integers(0, 256, 40)):
        changed.append(whole[:at] + bytes([value]) + whole[at + 1:])
    errors = 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of PIL, about the damage
        for i, data in enumerate([*cut, *changed]):
            path = tmp_path / f'picture{i}.bin'
            path.write_bytes(data)
            try:
                read_picture(path)
            except PictureError as e:
                assert path.name in str(e) and '\n' not in str(e)
                errors += 1
    assert errors >= 6  # half of the cuts, at the least


def test_no_program_is_ever_started(tmp_path, monkeypatch):
    """PIL hands an EPS to Ghostscript, whatever the suffix of the file."""
    def refuse(*args, **kwargs):
        raise AssertionError('a program was started')

    monkeypatch.setattr(subprocess, 'Popen', refuse)
    path = tmp_path / 'a.jpg'
    path.write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 30\n%%EndComments\nshowpage\n')
    with pytest.raises(PictureError, match=r'is no picture that can be read \(.*PNG'):
        read_picture(path)


def test_a_large_photograph_is_no_bomb(tmp_path):
    """PIL warns of pictures of half the size that it refuses; warnings are errors here."""
    Image.new('1', (9_500, 9_500)).save(tmp_path / 'large.png')
    assert read_picture(tmp_path / 'large.png').size == (9_500, 9_500)


def test_names_of_members_stand_in_errors():
    with pytest.raises(PictureError, match=r'data\.tar/a\.png is no picture'):
        read_picture(io.BytesIO(b'no picture'), 'data.tar/a.png')


def test_a_name_that_is_no_utf8_is_told(tmp_path):
    path = bytes(tmp_path) + b'/\xff\n.png'
    with open(path, 'w') as file:
        file.write('no picture')
    with pytest.raises(PictureError, match=r'\\xff\\n\.png is no picture') as error:
        read_picture(path.decode('utf-8', 'surrogateescape'))
    str(error.value).encode()


# ---------------------------------------------------------------------------------------------------------------------
# The way up


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
def test_exif_orientation_is_applied(tmp_path, orientation, format):
    """Where the red corner, top left in the file, comes to lie: EXIF's table of rows and columns, written out."""
    picture = Image.new('RGB', (16, 8))
    picture.paste('red', (0, 0, 8, 4))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f'picture.{format.lower()}'
    picture.save(path, exif=exif)
    read = read_picture(path)
    assert read.size == picture_size(path) == ((8, 16) if orientation > 4 else (16, 8))
    bottom, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    pixels = np.asarray(read).astype(int)
    red, green, _ = pixels[-3 if bottom else 2, -3 if right else 2]
    assert red > 150 and green < 100
    grey = read_grey(path)
    assert grey.shape == pixels.shape[:2] and grey[-3 if bottom else 2, -3 if right else 2] > 50


def test_damaged_exif_says_nothing(tmp_path):
    noise().save(tmp_path / 'a.jpg', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of PIL
        assert read_picture(tmp_path / 'a.jpg').size == (40, 30)


# ---------------------------------------------------------------------------------------------------------------------
# Modes and depths


def test_sixteen_bits_are_scaled_down(tmp_path):
    """PIL's own conversion makes everything from 255 of 65,535 white."""
    deep = np.array([[0, 257, 32896], [25700, 65278, 65535]], dtype=np.uint16)
    expected = [[[v] * 3 for v in row] for row in ([0, 1, 128], [100, 254, 255])]
    for suffix in ('png', 'tiff', 'pgm'):
        Image.fromarray(deep).save(tmp_path / f'deep.{suffix}')
        assert load_image(tmp_path / f'deep.{suffix}', np.asarray).tolist() == expected
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


def write_tiff(path, values, bits, photometric=1, sample_format=1):
    """An uncompressed grey TIFF by hand: PIL writes neither signed nor 12-bit ones."""
    data = values.tobytes()
    entries = [(256, values.shape[-1]), (257, len(values)), (258, bits), (259, 1), (262, photometric), (273, 8),
               (277, 1), (278, len(values)), (279, len(data)), (339, sample_format)]
    directory = b''.join(
        np.array([tag, 4 if tag in (273, 279) else 3], '<u2').tobytes() + np.array([1, value], '<u4').tobytes()
        for tag, value in entries)
    path.write_bytes(
        b'II*\0' + np.uint32(8 + len(data)).tobytes() + data + np.uint16(len(entries)).tobytes() + directory + bytes(4))


@pytest.mark.parametrize('arguments, says', [
    (dict(bits=16), None),
    (dict(bits=16, sample_format=2), '32 bits'),  # signed: PIL reads them as 32
    (dict(bits=16, photometric=0), 'its zero is white'),
    (dict(bits=12), 'its pixels have 12 bits'),
])
def test_integers_that_are_no_plain_sixteen_bits_are_refused(tmp_path, arguments, says):
    values = np.full((4, 4), 257 * 9, np.int16)
    write_tiff(tmp_path / 'a.tiff', values, **arguments)
    if says is None:
        assert np.asarray(read_picture(tmp_path / 'a.tiff')).max() == 9
    else:
        with pytest.raises(PictureError, match=rf'a\.tiff cannot be used: .*{says}'):
            read_picture(tmp_path / 'a.tiff')


def test_text_beside_the_pixels_is_passed_over(tmp_path):
    write_png(tmp_path / 'a.png', (30, 30), chunk(b'tEXt', b'Comment\0a few words'))
    assert read_picture(tmp_path / 'a.png').size == (30, 30)


# ---------------------------------------------------------------------------------------------------------------------
# As a model takes it


def test_transform_is_that_of_the_model(tmp_path, pico):
    Image.new('RGB', (80, 60), 'white').save(tmp_path / 'b.png')
    image = load_image(tmp_path / 'b.png', model_transform(pico))
    assert image.shape == (3, 64, 64)
    mean, std = pico.pretrained_cfg['mean'][0], pico.pretrained_cfg['std'][0]
    torch.testing.assert_close(image, torch.full((3, 64, 64), (1 - mean) / std))


def test_bytes_and_the_normalization_are_the_transform():
    """The very operations of timm's, so equal to the last bit."""
    model = timm.create_model('vit_tiny_patch16_224', depth=1, pretrained_cfg_overlay=dict(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))
    theirs = create_transform(**resolve_model_data_config(model), is_training=False)
    picture = noise(300, 260)
    assert torch.equal(model_transform(model)(picture), theirs(picture))
    pixels = model_transform(model, normalize=False)(picture)
    assert pixels.dtype == torch.uint8
    assert torch.equal(model_normalization(model)(pixels), theirs(picture))


def test_a_grey_model_reads_grey():
    model = timm.create_model('spot_vit_pico_patch8_64', in_chans=1).eval()
    assert picture_channels(model) == 1
    image = model_transform(model)(Image.new('RGB', (64, 64), (255, 0, 0)))
    assert image.shape == (1, 64, 64)
    # Luminance of red, 0.299 of 255 rounded to 76, and this model's mean of 0.1 and std of 0.25.
    torch.testing.assert_close(image, torch.full((1, 64, 64), (76 / 255 - 0.1) / 0.25))
    torch.testing.assert_close(denormalize(model, image), torch.full((1, 64, 64), 76 / 255))
    assert model(image[None]).shape == (1, 10)


@pytest.mark.parametrize('name', ['spot_vit_pico_patch8_64', 'vit_tiny_patch16_224', 'test_resnet', 'test_convnext'])
def test_other_channels_than_pictures_have_are_refused_by_name(name):
    model = timm.create_model(name, in_chans=4)
    with pytest.raises(ValueError, match=rf'{name} reads images of 4 channels \(in_chans=4\)'):
        model_transform(model)
    assert picture_channels(timm.create_model(name, in_chans=1)) == 1


def test_denormalize_undoes_the_transform_of_a_picture():
    model = timm.create_model('spot_vit_pico_patch8_64', pretrained=True)
    picture = torch.rand(2, 3, 64, 64)
    images = (picture - 0.1) / 0.25  # the mean and std of the digits model
    torch.testing.assert_close(denormalize(model, images), picture)
    assert denormalize(model, torch.full((3, 64, 64), 9.)).max() == 1
