"""Checks of where weights come from: above all of downloads, of which the Hub's client compares sizes only."""
from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Optional, Union

from huggingface_hub.errors import EntryNotFoundError
from timm.models import PretrainedCfg

from ._timm import download_from_hf, resolve_pretrained_source


def check_source(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]] = None) -> None:
    """Make sure of the weights that a config names: a file that is there, a download as the Hub lists it.

    Weights on the Hub are downloaded and compared with the checksum that the Hub lists: its cache names a file by that
    SHA-256. Where the cache holds copies instead of links (Windows) nothing is compared.

    Args:
        cfg: Config; one that takes its weights from neither passes.
        cache_dir: Folder of the cache instead of the client's own.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The download is not the one that the Hub lists. It is removed from the cache.
    """
    if cfg.file and not Path(cfg.file).exists():
        raise FileNotFoundError(f'{cfg.file} does not exist.')
    source, location = resolve_pretrained_source(vars(cfg))
    if source != 'hf-hub':
        return
    hub_id, filename = (location, 'model.safetensors') if isinstance(location, str) else location
    try:
        path = Path(download_from_hf(hub_id, filename, cache_dir=cache_dir))
    except EntryNotFoundError:
        return  # timm knows other file names, and raises if there is none of them
    if not path.is_symlink():
        return
    # One link only: the blob itself may be a link into a store that names files otherwise.
    blob = path.parent / os.readlink(path)
    if not re.fullmatch('[0-9a-f]{64}', blob.name):
        return
    digest = hashlib.sha256()
    with blob.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != blob.name:
        path.unlink()
        blob.unlink()
        raise OSError(
            f'{filename} of {hub_id} arrived damaged: its SHA-256 is {digest.hexdigest()}, the Hub lists {blob.name}. '
            'It has been removed from the cache; try again.')
