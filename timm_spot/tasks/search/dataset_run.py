"""The oracle over a whole dataset, resumable: parts are written as it goes, a restart does only what is missing.

A part is a batch of images that are neighbours in the dataset. It is written whole or not at all, and depends on
nothing but the settings, so a run that was killed ends with the same bytes as one that was not.
"""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import torch
from PIL import Image
from safetensors import safe_open
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..kept import weights_digest
from ..pictures.images import load_image, model_transform
from ..pictures.saliency_maps import saliency_source
from .draws import draw_placements
from .optimize import optimize_positions
from .result import OracleResult

_HEADER = 'timm_spot'


def open_dataset(
        model: nn.Module,
        root: Optional[str],
        name: str = '',
        split: str = 'validation',
        class_map: str = '',
) -> Tuple[Dataset, bool]:
    """A dataset with the model's evaluation transform, and whether it has labels for that model.

    A folder has labels when its pictures lie in as many subfolders as the model has classes, or a class map tells which
    is which.

    Args:
        model: The model that will see the images.
        root: Folder of the pictures or of the dataset.
        name: As in timm's `create_dataset`, '' for a folder of pictures.
        split: As there.
        class_map: File of class names, one a line in the order of the classes (folders only).

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not name and not Path(root).exists():
        raise FileNotFoundError(f'there is no folder {root}.')
    dataset = create_dataset(name, root=root, split=split, class_map=class_map)
    transform = model_transform(model)
    reader = getattr(dataset, 'reader', dataset)
    classes = getattr(reader, 'class_to_idx', None)
    labels = bool(class_map) or not classes or len(classes) == model.num_classes
    if isinstance(reader, ReaderImageFolder):
        return _Pictures(reader, transform), labels
    dataset.transform = transform
    return dataset, labels


class _Pictures(Dataset):
    """A folder of pictures; timm's own dataset puts the next one into the place of one that cannot be read."""

    def __init__(self, reader: ReaderImageFolder, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.samples = reader.samples
        self.names = reader.filenames()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        path, target = self.samples[index]
        return load_image(Path(path), self.transform), target


def run_oracle(
        model: nn.Module,
        dataset: Dataset,
        out: Union[str, Path],
        *,
        labels: bool = True,
        init: str = 'isotropic',
        saliency: Optional[str] = None,
        n_tokens: Optional[int] = None,
        batch_size: int = 32,
        seed: int = 0,
        workers: int = 0,
        progress: Optional[Callable[[int], None]] = None,
        **search: Any,
) -> OracleResult:
    """Search the placement of every image of a dataset; continues where an earlier run with the same `out` ended.

    Parts lie in the folder `<out>.parts` until all are done; then they are joined into `out` and removed. The header
    of `out` holds the settings and, for a folder of pictures, their names, one for each row.

    Args:
        model: A subpixel ViT, on the device to use.
        dataset: Of (image (C, H, W), label) pairs, all of one size.
        out: The safetensors file to write, see `OracleResult`.
        labels: Whether the dataset's labels are used.
        init: Sampler of the start; stochastic ones draw for each image by `seed` and its index in the dataset.
        saliency: Where the maps of a salient `init` come from, see `saliency_source`; by default the model's own.
        n_tokens: Budget, by default the model's.
        batch_size: Images searched at a time, and the size of a part.
        seed: For stochastic samplers.
        workers: Processes that read pictures.
        progress: Called with the number of images whenever some are done, or found done.
        **search: For `optimize_positions`; must be plain values, no functions or tensors.

    Returns:
        The result of all images, as written.

    Raises:
        ValueError: `out` or its parts come from other settings (names which), an empty dataset, or any error of
            `optimize_positions`.
    """
    out = Path(out)
    parts = out.with_name(f'{out.name}.parts')
    count = len(dataset)
    if not count:
        raise ValueError('dataset is empty, or does not know its length.')
    settings = dict(
        model=model.pretrained_cfg.get('architecture'), weights=weights_digest(model),
        images=getattr(dataset, 'names', count),
        transform=repr(getattr(dataset, 'transform', None)), labels=labels, init=init, saliency=saliency,
        n_tokens=n_tokens, batch_size=batch_size, seed=seed, search=search)
    settings = json.loads(json.dumps(settings, default=str))
    if out.exists():
        with safe_open(out, 'pt') as file:
            _check_settings(out, json.loads((file.metadata() or {}).get(_HEADER, '{}')), settings)
    else:
        parts.mkdir(parents=True, exist_ok=True)
        record = parts / 'settings.json'
        if record.exists():
            _check_settings(parts, json.loads(record.read_text()), settings)
        else:
            partial = record.with_suffix('.tmp')
            partial.write_text(json.dumps(settings))
            partial.replace(record)

        files = [parts / f'{first:09d}.safetensors' for first in range(0, count, batch_size)]
        missing = [i for i, file in enumerate(files) if not file.exists()]
        if progress is not None:
            progress(count - sum(min(batch_size, count - i * batch_size) for i in missing))
        device = next(model.parameters()).device
        read_maps = saliency_source(saliency, model, model_transform(model)) if saliency else None
        for i, images, targets in _batches(dataset, batch_size, missing, workers):
            images, first = images.to(device), i * batch_size
            maps = None
            if read_maps is not None:
                maps = read_maps(images, _paths(dataset, first, len(images)))
            start = draw_placements(
                model, images, init, n_tokens, maps, torch.arange(first, first + len(images)), seed)
            try:
                result = optimize_positions(model, images, targets if labels else None, init=start, **search)
            except ValueError as e:
                raise ValueError(f'in the batch whose image 0 is number {first} of the dataset: {e}') from e
            result.to_safetensors(files[i])
            if progress is not None:
                progress(len(images))
        # The header holds one entry: the order of several would vary.
        joined = OracleResult.concat([OracleResult.from_safetensors(file) for file in files])
        joined.to_safetensors(out, metadata={_HEADER: json.dumps(settings)})
    if parts.exists():
        shutil.rmtree(parts)
    return OracleResult.from_safetensors(out)


def _batches(
        dataset: Dataset,
        batch_size: int,
        wanted: List[int],
        workers: int,
) -> Iterator[Tuple[int, torch.Tensor, torch.Tensor]]:
    """Batches by their number, in order; of a dataset without random access the others are read and passed over."""
    if isinstance(dataset, IterableDataset):
        batches = DataLoader(dataset, batch_size) if wanted else ()
        for i, (images, targets) in enumerate(batches):
            if i in wanted:
                yield i, images, targets
    else:
        rows = [range(i * batch_size, min((i + 1) * batch_size, len(dataset))) for i in wanted]
        for i, (images, targets) in zip(wanted, DataLoader(dataset, batch_sampler=rows, num_workers=workers)):
            yield i, images, targets


def _paths(dataset: Dataset, first: int, count: int) -> List[str]:
    """Files of `count` images, by which a folder of maps finds theirs; other datasets than folders have none."""
    return [path for path, _ in dataset.samples[first:first + count]] if isinstance(dataset, _Pictures) else []


def _check_settings(where: Path, found: Dict[str, Any], settings: Dict[str, Any]) -> None:
    differing = [key for key in settings if found.get(key) != settings[key]]
    if differing:
        raise ValueError(
            f"{where} was made with other settings ({', '.join(differing)}): remove it, or write to another file.")
