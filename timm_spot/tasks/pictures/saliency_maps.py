"""Saliency for a task: maps from a folder, or whatever a command line's `--saliency` names."""
from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import Grayscale

from ...models._shallow import shallow_copy
from ...models.attention_saliency import attention_saliency
from ...models.loading import create_checked
from ...models.placement import SampledPlacer
from ...models.prior import Prior
from ...ops.saliency import energy, normalize_saliency, spectral_residual
from ...ops.samplers import get_sampler
from .files import open_regular, printable
from .images import model_normalization, picture_size, read_grey

SaliencySource = Callable[[torch.Tensor, Sequence[str | Path]], torch.Tensor]
SELF = 'self'  # the attention of the model itself
WITHOUT_WEIGHTS = {'spectral': spectral_residual, 'energy': energy}
_SUFFIXES = ('.npy', '.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')


def load_saliency(
        folder: str | Path,
        images: Sequence[str | Path],
        transform: Callable[[Image.Image], torch.Tensor],
) -> torch.Tensor:
    """Saliency maps of images from a folder that holds one file with the stem of each.

    A map is a grey picture (the brightness is the weight; 8 or 16 bit, or float TIFF) or a 2-D array in a .npy file,
    as saliency and segmentation models write them. Whatever its resolution, it covers its whole image and is resized
    and cropped with it; padding around the image gets no weight.

    Args:
        folder: Folder of maps, for example `maps/cat.png` for `photos/cat.jpg`.
        images: Files of the images.
        transform: The evaluation transform of the images, from `timm.data.create_transform`; its steps before the
            conversion to a tensor are applied to the maps.

    Returns:
        Maps (B, H, W), float32, not negative, each summing to one, in the order of `images`.

    Raises:
        FileNotFoundError: Maps are missing (the message lists the images without one), or the folder is.
        ValueError: A map is ambiguous, not 2-D, negative, not finite, or zero everywhere in the crop.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'folder={str(folder)!r} is no folder of saliency maps.')
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _SUFFIXES:
            found[path.stem].append(path)
    images = [Path(image) for image in images]
    missing = [image.name for image in images if image.stem not in found]
    if missing:
        listed = ', '.join(missing[:20]) + (f' and {len(missing) - 20} more' if len(missing) > 20 else '')
        raise FileNotFoundError(
            f'{folder} holds no saliency map for {len(missing)} of {len(images)} images: {listed}. A map has the stem '
            f"of its image and one of the suffixes {', '.join(_SUFFIXES)}.")
    maps = []
    for image in images:
        files = found[image.stem]
        if len(files) > 1:
            raise ValueError(f"{image.name} has several saliency maps: {', '.join(map(str, files))}.")
        maps.append(_transform_map(_read_map(files[0]), picture_size(image), transform))
        if not maps[-1].sum() > 0:
            raise ValueError(f'saliency map {files[0]} is zero wherever the model looks: nowhere to place a token.')
    return normalize_saliency(torch.stack(maps))


def _read_map(path: Path) -> np.ndarray:
    if path.suffix.lower() == '.npy':
        try:
            with open_regular(path) as file:
                values = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError, MemoryError) as e:
            raise ValueError(f'saliency map {printable(path)} is no array that can be read: {e}.') from e
    else:
        values = read_grey(path)
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in 'buif':
        raise ValueError(
            f'saliency map {path} has shape {values.shape}, expected (height, width), of {values.dtype}, expected '
            'numbers.')
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f'saliency map {path} holds NaN or infinity.')
    if values.min() < 0:
        raise ValueError(f'saliency map {path} must not be negative, its smallest value is {values.min():.3g}.')
    # Unit scale: sums over many 16-bit pixels keep their digits.
    return values / max(values.max(), np.finfo(np.float32).tiny)


def _transform_map(
        values: np.ndarray,
        size: tuple[int, int],
        transform: Callable[[Image.Image], torch.Tensor],
) -> torch.Tensor:
    """Take a map through what happens to its image of (width, height) pixels before that is a tensor."""
    picture = Image.fromarray(values).resize(size, Image.Resampling.BILINEAR)
    for step in transform.transforms:
        if isinstance(step, Grayscale):
            continue  # has one channel, and its values are no colours
        if hasattr(step, 'fill'):
            step = copy.copy(step)
            step.fill = 0
        result = step(picture)
        if not isinstance(result, Image.Image):
            break
        picture = result
    # Bicubic interpolation undershoots.
    return torch.from_numpy(np.array(picture)).clamp(min=0.)


def attention_model(source: str) -> nn.Module | None:
    """The ViT that 'attention:NAME' names, in eval mode with its weights; None for other sources."""
    kind, _, name = source.partition(':')
    return create_checked(name, pretrained=True).eval() if kind == 'attention' else None


def saliency_source(source: str, model: nn.Module, transform: Callable[[Image.Image], torch.Tensor]) -> SaliencySource:
    """What `--saliency` names, as a function from a batch and the files it came from to maps (B, H, W).

    Args:
        source: 'spectral', 'energy', 'attention:NAME' (a timm ViT with its pretrained weights), 'self' (what patches
            receive in the model's own last block at its full budget) or a folder of maps.
        model: The model for which the images are normalised.
        transform: The transform of the images, for a folder.

    Raises:
        FileNotFoundError: `source` is none of these.
    """
    if source in WITHOUT_WEIGHTS:
        return lambda images, paths: WITHOUT_WEIGHTS[source](images)
    if source == SELF:
        prior = Prior(window=model.patch_embed.window)
        full = shallow_copy(model, placer=SampledPlacer(prior, prior))
        return lambda images, paths: attention_saliency(full, images, queries='patches')
    vit = attention_model(source)
    if vit is not None:
        ours, its = model_normalization(model), model_normalization(vit)

        def attend(images: torch.Tensor, paths: Sequence[str | Path]) -> torch.Tensor:
            pictures = ours.undo(images)
            if len(ours.mean) != len(its.mean):  # one of the two reads grey
                pictures = pictures.mean(dim=1, keepdim=True).expand(-1, len(its.mean), -1, -1)
            return attention_saliency(vit.to(images.device), its(pictures))

        return attend
    if not Path(source).is_dir():
        raise FileNotFoundError(
            f"saliency={source!r} is none of: 'spectral', 'energy', 'self', 'attention:NAME', a folder of maps.")
    return lambda images, paths: load_saliency(source, paths, transform)


def choose_prior(
        model: nn.Module,
        sampler: str | None,
        saliency: str | None,
        transform: Callable[[Image.Image], torch.Tensor],
) -> Callable[[torch.Tensor, Sequence[str | Path]], None]:
    """Give a model the prior that a command line asks for.

    Args:
        model: A subpixel ViT.
        sampler: Its new sampler; by default its own, or 'salient' where `saliency` is given.
        saliency: See `saliency_source`; for a salient sampler by default the model's own, or 'spectral'.
        transform: The transform of the images.

    Returns:
        A function to call with each batch (images, files) before the model: it gives the model the batch's maps.

    Raises:
        ValueError: An unknown sampler, a saliency that the sampler has no use for, or either for a model whose placer
            looks for itself.
    """
    if not isinstance(model.placer, SampledPlacer):
        if sampler is not None or saliency is not None:
            raise ValueError(
                f'sampler={sampler!r} and saliency={saliency!r} are of no use: {model.placer.source} places tokens.')
        return lambda images, paths: None
    sampler = sampler or (model.placer.prior.sampler if saliency is None else 'salient')
    if 'saliency' not in get_sampler(sampler).keywords:
        if saliency is not None:
            raise ValueError(f"saliency={saliency!r} is of no use to sampler={sampler!r}: 'salient' draws from it.")
        model.set_placement(sampler=sampler)
        return lambda images, paths: None
    if saliency is None and model.placer.prior.saliency is not None:
        model.set_placement(sampler=sampler)
        return lambda images, paths: None
    source = saliency_source(saliency or 'spectral', model, transform)
    return lambda images, paths: model.set_placement(sampler=sampler, saliency=source(images, paths))
