"""From pictures on disk to class names and probabilities."""
from __future__ import annotations

import glob
from pathlib import Path
from typing import Callable, Dict, List, Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, get_img_extensions, resolve_model_data_config
from torch import nn


def find_images(sources: Sequence[str]) -> List[Path]:
    """Pictures named by files, folders (searched recursively) and glob patterns, in order, each once.

    Raises:
        FileNotFoundError: A source names nothing, or a folder holds no picture.
    """
    extensions = get_img_extensions()
    found: Dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = sorted(f for f in path.rglob('*') if f.suffix.lower() in extensions)
            if not files:
                raise FileNotFoundError(f'folder {source} holds no picture ({", ".join(sorted(extensions))}).')
        elif path.is_file():
            files = [path]
        else:
            files = [Path(f) for f in sorted(glob.glob(source, recursive=True)) if Path(f).is_file()]
            if not files:
                raise FileNotFoundError(f'{source} is no file, no folder and matches nothing.')
        found.update(dict.fromkeys(files))
    return list(found)


def model_transform(model: nn.Module) -> Callable[[Image.Image], torch.Tensor]:
    """The evaluation transform of a model's own data config: picture to normalised (C, H, W)."""
    return create_transform(**resolve_model_data_config(model), is_training=False)


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in 8-bit RGB: grey three times, 16 bits scaled down, transparency left out, as timm does.

    Raises:
        ValueError: Its values are 32-bit integers or floating point, of which nobody knows what is white.
    """
    if picture.mode.startswith('I;16') or (picture.mode == 'I' and picture.format == 'PNG'):  # the latter in older PIL
        # PIL's own conversion makes everything from 255 of 65,535 white.
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode in ('I', 'F'):
        raise ValueError(
            f'its pixels have 32 bits (mode {picture.mode}), which do not say what is black and what is white: '
            'save it with 8 or 16 bits')
    if 'transparency' in picture.info:
        picture = picture.convert('RGBA')  # PIL warns of a direct conversion
    return picture.convert('RGB')


def load_image(path: Path, transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """Read one picture as (C, H, W).

    Raises:
        ValueError: The file is no picture, damaged, or of an unknown range; names the file.
    """
    try:
        with Image.open(path) as image:
            try:
                picture = to_rgb(image)
            except ValueError as e:
                raise ValueError(f'{path} cannot be used: {e}.') from e
            return transform(picture)
    except UnidentifiedImageError as e:
        raise ValueError(f'{path} is no picture that can be read.') from e
    except OSError as e:
        raise ValueError(f'{path} is damaged: {e}.') from e


def denormalize(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What a model sees of pictures: normalised images (..., C, H, W) back in [0, 1]."""
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    return (images * std + mean).clamp(0., 1.)

