"""The one way in which weights come from somewhere: found, downloaded, and compared with what the Hub lists.

The Hub's client compares sizes only, and without a connection it waits for two minutes.
"""
from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.models import PretrainedCfg

from ._timm import (
    FOLDER_FILES,
    FOLDER_SUFFIXES,
    HF_WEIGHTS_NAME,
    check_cached_file,
    download_cached_file,
    get_safe_alternatives,
    hf_split,
    resolve_pretrained_source,
)
from .checkpoint_file import find_tensors, read_checkpoint

_INSTEAD = 'or give the weights as a file: --weights FILE, in Python pretrained_cfg_overlay=dict(file=FILE)'


class CheckedSource(NamedTuple):
    """Weights that were found and checked."""

    cfg: PretrainedCfg  # with the file as the only place of the weights
    keys: tuple[str, ...] = ()  # names of the tensors


def prefer_file(overlay: dict[str, Any] | None) -> dict[str, Any]:
    """A `pretrained_cfg_overlay` whose `file` counts; timm itself prefers the repository that a config came from."""
    overlay = dict(overlay or {})
    return {'source': None, **overlay} if overlay.get('file') else overlay


def check_source(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> CheckedSource:
    """Make sure of the weights that a config names: that they are there, whole, as the Hub lists them, and usable.

    Args:
        cfg: Config; one without weights passes.
        cache_dir: Folder of the cache instead of the client's own.

    Returns:
        The config with the file that was checked, and the names of the tensors in it.

    Raises:
        FileNotFoundError: There is no such file.
        ConnectionError: It is on the Hub, which cannot be reached, and not in the cache.
        OSError: The download failed, or is not what the Hub lists. It is removed from the cache.
        ValueError: The file is no checkpoint, or its weights are unusable, see `read_checkpoint`.
    """
    source, location = resolve_pretrained_source(vars(cfg))
    if source == 'state_dict':
        return CheckedSource(cfg, tuple(find_tensors(location, 'state_dict')[0]))
    if source == 'hf-hub':
        file = download_weights(*([location] if isinstance(location, str) else location), cache_dir=cache_dir)
    elif source == 'local-dir':
        file = find_in_folder(Path(location))
    elif source == 'url':
        file = _download_url(location, cache_dir)
    elif source == 'file':
        file = Path(location)
    else:
        return CheckedSource(cfg)
    if cfg.custom_load and (source in ('file', 'url') or cfg.custom_load == 'hf'):
        # A format of JAX, which the model's own loader reads.
        return CheckedSource(dataclasses.replace(cfg, file=str(file), source=None, custom_load=True))
    try:
        keys = tuple(read_checkpoint(file).tensors)
    except ValueError as e:
        if source != 'hf-hub':
            raise
        raise ValueError(f'{file.name} of {cfg.hf_hub_id} on the Hugging Face Hub cannot be used: {e}') from e
    return CheckedSource(dataclasses.replace(cfg, file=str(file), source=None, custom_load=False), keys)


def download_weights(
        hub_id: str,
        filename: str = HF_WEIGHTS_NAME,
        cache_dir: str | Path | None = None,
) -> Path:
    """Download the weights of a repository: safetensors where there are some, as timm prefers them.

    Args:
        hub_id: 'ORG/NAME' or 'ORG/NAME@REVISION'.
        filename: Of the weights; by default model.safetensors or pytorch_model.bin.
        cache_dir: Folder of the cache.

    Raises:
        As `download`.
    """
    return download(hub_id, [*get_safe_alternatives(filename), filename], cache_dir)


def download(hub_id: str, names: Iterable[str], cache_dir: str | Path | None = None) -> Path:
    """Download the first of some files that a repository on the Hugging Face Hub has, and compare its checksum.

    The cache is asked where there is no connection. Where it holds copies instead of links (Windows) and there is no
    connection, nothing tells what the checksum should be.

    Args:
        hub_id: 'ORG/NAME' or 'ORG/NAME@REVISION'.
        names: Files, the best first.
        cache_dir: Folder of the cache.

    Raises:
        FileNotFoundError: The repository has none of them, or there is no such repository.
        ConnectionError: No connection, and the cache holds none of them.
        OSError: The download failed, or is not what the Hub lists: it is removed from the cache.
        ValueError: `hub_id` is no such name.
    """
    names = list(names)
    if hub_id.count('@') > 1:
        raise ValueError(f"{hub_id!r} must be 'ORG/NAME' or 'ORG/NAME@REVISION'.")
    repo, revision = hf_split(hub_id)
    validate_repo_id(repo)
    for name in names:
        what = f'{name} of {hub_id}'
        listed = None
        try:
            listed = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), library_name='timm_spot').etag
        except EntryNotFoundError:
            continue
        except (RepositoryNotFoundError, RevisionNotFoundError) as e:
            missing = 'revision' if isinstance(e, RevisionNotFoundError) else 'repository'
            cached = _find_cached(repo, revision, [name], cache_dir)
            if cached:
                return _verify(cached, None, what)
            raise FileNotFoundError(
                f"{what}: the Hugging Face Hub has no such {missing}, or it is private or gated. Mend the name, log in "
                f"('hf auth login'), {_INSTEAD}.") from e
        except HfHubHTTPError:
            pass  # the Hub answers, with trouble of its own: its client knows how to wait
        except Exception as e:  # no answer: which errors say so goes with the client's HTTP library
            cached = _find_cached(repo, revision, names, cache_dir)
            if cached:
                return _verify(cached, None, f'{cached.name} of {hub_id}')
            reason = 'HF_HUB_OFFLINE is set' if HF_HUB_OFFLINE else 'there is no connection to the Hugging Face Hub'
            raise ConnectionError(
                f'{what}: {reason}, and the cache does not hold the file. Connect, {_INSTEAD}.') from e
        return _verify(_fetch(repo, revision, name, cache_dir, what), listed, what)
    raise FileNotFoundError(
        f"{hub_id} on the Hugging Face Hub has no {' or '.join(names)}. Give another repository, {_INSTEAD}.")


def _find_cached(repo: str, revision: str | None, names: list[str], cache_dir: str | Path | None) -> Path | None:
    for name in names:
        path = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision)
        if isinstance(path, str):
            return Path(path)
    return None


def _fetch(repo: str, revision: str | None, name: str, cache_dir: str | Path | None, what: str) -> Path:
    try:
        return Path(hf_hub_download(repo, name, revision=revision, cache_dir=cache_dir, library_name='timm_spot'))
    except Exception as e:  # whatever the client ends in, it is a failed download
        reason = next(iter(str(e).splitlines()), '') or type(e).__name__
        raise OSError(
            f'{what}: the download from the Hugging Face Hub failed ({reason}). Try again, {_INSTEAD}.') from e


def _verify(path: Path, listed: str | None, what: str) -> Path:
    """Compare a cached file with its checksum: that which the Hub lists, or else the name of the file behind a link."""
    # One link only: the blob itself may be a link into a store that names files otherwise.
    blob = path.parent / os.readlink(path) if path.is_symlink() else path
    expected = listed or blob.name
    sums = _checksums(path, expected)
    if not sums or expected in sums:
        return path
    for file in (path.resolve(), blob, path):
        file.unlink(missing_ok=True)
    raise OSError(
        f'{what} arrived damaged: its checksum is {sums[0]}, the Hub lists {expected}. It has been removed from the '
        f'cache; try again, {_INSTEAD}.')


def _checksums(path: Path, expected: str) -> list[str]:
    """Checksums of a file of the kind of an expected one; none where it is no checksum."""
    if re.fullmatch('[0-9a-f]{64}', expected):  # what the Hub keeps in its large file storage
        digests = [hashlib.sha256()]
    elif re.fullmatch('[0-9a-f]{40}', expected):  # what lies in the git repository: as git has it, or plain
        header = f'blob {path.stat().st_size}\0'.encode()
        digests = [hashlib.sha1(header, usedforsecurity=False), hashlib.sha1(usedforsecurity=False)]
    else:
        return []
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            for digest in digests:
                digest.update(chunk)
    return [digest.hexdigest() for digest in digests]


def _download_url(url: str | tuple[str, str], cache_dir: str | Path | None) -> Path:
    """Download a file whose name may end in the start of its SHA-256, as timm's do, and compare that."""
    address = url if isinstance(url, str) else url[0]
    try:
        file = Path(download_cached_file(url, check_hash=True, cache_dir=cache_dir))
        if not check_cached_file(url, check_hash=True, cache_dir=cache_dir):  # it was there, and is damaged
            file.unlink()
            file = Path(download_cached_file(url, check_hash=True, cache_dir=cache_dir))
    except Exception as e:
        raise OSError(f'{address}: the download failed ({e}). Try again, {_INSTEAD}.') from e
    return file


def find_in_folder(folder: Path) -> Path:
    """The weights in a model folder, as timm chooses among several.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no weights.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} is no folder.')
    for name in FOLDER_FILES:
        if (folder / name).exists():
            return folder / name
    for suffix in FOLDER_SUFFIXES:
        for path in sorted(folder.glob(f'*{suffix}')):
            return path
    raise FileNotFoundError(f'{folder} holds no weights: expected is model.safetensors.')
