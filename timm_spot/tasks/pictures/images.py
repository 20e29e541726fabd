"""One picture: read whole or refused by name, upright, in 8-bit RGB; and as a model takes it.

Every command reads pictures here. Only raster formats are opened (PIL would hand an EPS file to Ghostscript), only
regular files (a pipe has no end), and whatever a decoder raises for a damaged file becomes one error with its name.
"""
from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision import transforms

from ...ops.normalization import Normalization
from .files import open_regular, printable

_T = TypeVar('_T')

FORMATS = ('AVIF', 'BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP')
MAX_RATIO = 1000  # of the sides: resized to a model's input, a longer picture would not fit in memory
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture that cannot be read; says which one and why."""


def read_picture(
        file: str | os.PathLike | BinaryIO,
        name: str | None = None,
        alpha: bool = False,
) -> Image.Image:
    """Read one picture: the first one of its file, upright (EXIF), in 8-bit RGB.

    Args:
        file: Path, or a file opened for reading its bytes.
        name: What errors call it; by default its path.
        alpha: Read transparency as well, in RGBA, where it has some.

    Raises:
        PictureError: It is no picture, damaged, larger than PIL's limit, longer than `MAX_RATIO` times its other
            side, or of an unknown range of values.
    """
    return _read(file, name, _to_upright_rgba if alpha else to_upright_rgb)


def picture_size(file: str | os.PathLike | BinaryIO, name: str | None = None) -> tuple[int, int]:
    """Width and height of a picture as `read_picture` gives it."""
    return _read(file, name, lambda picture: upright(picture, picture).size)


def read_grey(file: str | os.PathLike) -> np.ndarray:
    """Brightness (H, W) of a picture, upright, at the depth at which it is stored: 8, 16 or 32 bits."""
    def convert(picture: Image.Image) -> np.ndarray:
        deep = picture.mode in ('F', 'I') or picture.mode.startswith('I;16')
        return np.asarray(upright(picture, picture if deep else picture.convert('L')))

    return _read(file, None, convert)


def _read(
        file: str | os.PathLike | BinaryIO,
        name: str | None,
        convert: Callable[[Image.Image], _T],
) -> _T:
    said = printable(file if name is None else name)
    Image.init()
    formats = [f for f in FORMATS if f in Image.OPEN]  # some builds of PIL lack one
    try:
        with (file if hasattr(file, 'read') else open_regular(file)) as opened, warnings.catch_warnings():
            # A large photograph is no attack; PIL's error comes at twice the size.
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(opened, formats=formats) as picture:
                _check_ratio(picture)
                picture.load()
                return convert(picture)
    except UnidentifiedImageError as e:
        raise PictureError(f'{said} is no picture that can be read ({", ".join(formats)}).') from e
    except (ValueError, Image.DecompressionBombError) as e:
        raise PictureError(f'{said} cannot be used: {str(e).rstrip(".")}.') from e
    except OSError as e:
        reason = f'cannot be read: {e.strerror}' if e.strerror else f'is damaged: {str(e).rstrip(".")}'
        raise PictureError(f'{said} {reason}.') from e
    except Exception as e:  # for damaged files decoders raise whatever their parsing comes upon, SyntaxError included
        raise PictureError(f'{said} is damaged: {str(e).rstrip(".") or type(e).__name__}.') from e


def _check_ratio(picture: Image.Image) -> None:
    width, height = picture.size
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f'it has {width} x {height} pixels, and no side may be {MAX_RATIO:,} times the other')


def to_upright_rgb(picture: Image.Image) -> Image.Image:
    """A picture as all is read: of any mode in 8-bit RGB, turned as its EXIF data say, which it then has no more.

    Raises:
        ValueError: See `to_rgb`.
    """
    picture = upright(picture, to_rgb(picture))
    picture.info.clear()  # whoever turns pictures after us must not do it twice
    return picture


def _to_upright_rgba(picture: Image.Image) -> Image.Image:
    """`to_upright_rgb`, with the transparency of a picture that has some."""
    converted = to_upright_rgb(picture)
    if picture.has_transparency_data:
        converted.putalpha(upright(picture, picture.convert('RGBA').getchannel('A')))
    return converted


def upright(picture: Image.Image, converted: Image.Image) -> Image.Image:
    """`converted`, which was made of `picture`, turned as the EXIF data of `picture` say."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a damaged block says nothing about the way up, and the pixels are whole
        orientation = None
    return converted.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else converted


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in 8-bit RGB: grey three times, 16 bits scaled down, transparency left out, as timm does.

    Raises:
        ValueError: Its values are integers of an unknown range or floating point, of which nobody knows what is white.
    """
    # Modes: PNG of 16 bits in older versions of PIL, and PPM of more than 8, which PIL scales to 16.
    if picture.mode.startswith('I;16') or (picture.mode == 'I' and picture.format in ('PNG', 'PPM')):
        _check_sixteen_bits(picture)
        # PIL's own conversion makes everything from 255 of 65,535 white.
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode in ('I', 'F'):
        raise ValueError(
            f'its pixels have 32 bits (mode {picture.mode}), which do not say what is black and what is white: '
            'save it with 8 or 16 bits')
    if 'transparency' in picture.info:
        picture = picture.convert('RGBA')  # PIL warns of a direct conversion
    return picture.convert('RGB')


def _check_sixteen_bits(picture: Image.Image) -> None:
    """PIL gives TIFFs of 12 bits, and those whose zero is white, the same mode and leaves their values as they are."""
    tags = getattr(picture, 'tag_v2', {})
    bits, zero_is_white = tags.get(258, (16,)), tags.get(262) == 0
    if tuple(bits) != (16,) or zero_is_white:
        what = 'its zero is white' if zero_is_white else f'its pixels have {bits[0]} bits'
        raise ValueError(f'{what}, which is not understood: save it with 8 bits, or 16 whose zero is black')


def load_image(path: str | os.PathLike, transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """Read one picture and take it through a transform, to (C, H, W).

    Raises:
        PictureError: See `read_picture`.
    """
    return transform(read_picture(Path(path)))


# ---------------------------------------------------------------------------------------------------------------------
# As a model takes it


def picture_channels(model: nn.Module) -> int:
    """Channels of the pictures that a model reads: 3, or 1 for a model of grey ones (`in_chans=1`).

    Raises:
        ValueError: It reads another number, which pictures do not have.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    channels = getattr(model, 'in_chans', None)
    if channels is None:  # not every family of timm keeps it
        channels = getattr(dict(model.named_modules()).get(cfg.get('first_conv')), 'in_channels', None)
    channels = 3 if channels is None else channels
    if channels not in (1, 3):
        raise ValueError(
            f"{cfg.get('architecture') or type(model).__name__} reads images of {channels} channels "
            f'(in_chans={channels}); pictures have 3, or 1 where they are read as grey.')
    return channels


def model_normalization(model: nn.Module) -> Normalization:
    """Normalization of pictures for a model, by its own data config; a grey model has one value of each."""
    config = resolve_model_data_config(model)
    return Normalization(tuple(config['mean']), tuple(config['std'])).for_channels(picture_channels(model))


def model_transform(model: nn.Module, normalize: bool = True) -> transforms.Compose:
    """The evaluation transform of a model's own data config: RGB picture to (C, H, W).

    Args:
        model: Any timm model; one with `in_chans=1` sees the picture in grey.
        normalize: To normalised floating point, else to uint8.
    """
    config, normalization = resolve_model_data_config(model), model_normalization(model)
    config.update(mean=normalization.mean, std=normalization.std)
    transform = create_transform(**config, is_training=False, use_prefetcher=not normalize)
    if len(normalization.mean) == 1:
        transform.transforms.insert(0, transforms.Grayscale())
    return transform


def denormalize(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What a model sees of pictures: normalised images (..., C, H, W) back in [0, 1]."""
    return model_normalization(model).undo(images).clamp(0., 1.)
