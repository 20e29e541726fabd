"""Checkpoint files: their tensors and nothing else, or one error that says what is wrong and what would be right.

Every path by which weights reach a model reads them here first. Nothing is ever unpickled but tensors and plain values
(`weights_only=True`); code in a file never runs.
"""
from __future__ import annotations

import argparse
import os
import pickletools
import re
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from timm.models import clean_state_dict

StateDict = dict[str, torch.Tensor]

# In the order of timm's own loader: averaged weights first.
_ENTRIES = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
_WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COUNTER_TYPES = (torch.bool, torch.int32, torch.int64)  # of buffers; a weight of these is quantised
_EXPECTED = 'Expected is a safetensors file, or a state dict as torch.save writes it.'
_LFS_POINTER = b'version https://git-lfs'
_SIGNATURES = (
    (_LFS_POINTER, "a pointer of Git LFS, not the file itself: 'git lfs pull' brings that"),
    (b'\x1f\x8b', 'a gzip archive: unpack it first'),
    (b'BZh', 'a bzip2 archive: unpack it first'),
    (b'\xfd7zXZ', 'an xz archive: unpack it first'),
    (b'7z\xbc\xaf', 'a 7z archive: unpack it first'),
    (b'Rar!', 'a RAR archive: unpack it first'),
    (b'\x89HDF', 'an HDF5 file'),
    (b'\x93NUMPY', 'a NumPy array'),
    (b'PK', 'a zip archive that is cut off or damaged: download or copy it again'),
)


class Checkpoint(NamedTuple):
    """A checkpoint file: its weights, the entry they stood under, the run's arguments, what else it holds."""

    tensors: StateDict
    entry: str
    args: dict[str, Any]
    ignored: tuple[str, ...]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights in a checkpoint file; code in it is never run.

    Args:
        path: `.safetensors`, or a file of torch.save: a state dict, or a dict that holds one as `state_dict_ema`,
            `model_ema`, `state_dict` or `model` (the first of these is taken).

    Raises:
        FileNotFoundError, IsADirectoryError: There is no such file, or it is a folder.
        ValueError: The file is damaged or no checkpoint, or its weights are unusable, see `check_tensors`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, no checkpoint file: give the file in it, or 'local-dir:{path}'.")
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist.')
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f'{path} is no regular file. {_EXPECTED}')
    content = _read_safetensors(path) if path.suffix == '.safetensors' else _read_saved(path)
    tensors, entry = find_tensors(content, str(path))
    args = content.get('args') if entry else None
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    ignored = tuple(str(k) for k in content if k not in (entry, 'args')) if entry else ()
    return Checkpoint(tensors, entry, args, ignored)


def find_tensors(content: Any, where: str) -> tuple[StateDict, str]:
    """The state dict in what a checkpoint holds, and the entry under which it stands; checked, see `check_tensors`.

    Args:
        content: A state dict, or a dict with one, see `read_checkpoint`.
        where: What it was read from, for messages.
    """
    if not isinstance(content, dict):
        raise ValueError(f'{where} holds a {type(content).__name__}, not a state dict. {_EXPECTED}')
    entry = next((name for name in _ENTRIES if content.get(name) is not None), '')
    tensors = content[entry] if entry else content
    if not isinstance(tensors, dict):
        raise ValueError(f'{where} holds a {type(tensors).__name__} as {entry!r}, not a state dict. {_EXPECTED}')
    check_tensors(tensors, where)
    cleaned = clean_state_dict(tensors)
    if len(cleaned) < len(tensors):
        raise ValueError(f"{where} names weights twice, with and without 'module.' before them.")
    return cleaned, entry


def check_tensors(tensors: dict[Any, Any], where: str) -> None:
    """Check that a state dict holds weights that a model can be filled with.

    Raises:
        ValueError: It is empty, has keys that are no strings or values that are no tensors, or tensors without data,
            that claim more numbers than there are, quantised, sparse or complex ones, NaN or infinity.
    """
    if not tensors:
        raise ValueError(f'{where} holds no weights at all. {_EXPECTED}')
    strange = [f'{k!r:.40} ({type(k).__name__})' for k in tensors if not isinstance(k, str)]
    if strange:
        raise ValueError(f'{where} has keys that are no names: {shorten(strange)}. {_EXPECTED}')
    faults: dict[str, list[str]] = {}
    for name, value in tensors.items():
        fault = _fault(name, value)
        if fault:
            faults.setdefault(fault, []).append(
                name if isinstance(value, torch.Tensor) else f'{name} ({type(value).__name__})')
    for fault, names in faults.items():
        raise ValueError(f'{where} {fault} {shorten(names)}.')


def _fault(name: str, value: Any) -> str:
    """What is wrong with a tensor, as the middle of a sentence; '' if nothing is."""
    if not isinstance(value, torch.Tensor):
        return 'holds other things than tensors among its weights:'
    if value.layout != torch.strided or value.is_quantized:
        return 'holds sparse or quantised tensors, give the plain weights:'
    if value.is_meta or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return 'holds tensors without the data for their shape:'
    if value.dtype in _WEIGHT_TYPES:
        return '' if value.isfinite().all() else 'holds NaN or infinity in'
    if value.dtype not in _COUNTER_TYPES or name.endswith(('weight', 'bias')):
        return f"holds weights as {str(value.dtype).removeprefix('torch.')}, which must be floating point:"
    return ''


def shorten(names: list[str], shown: int = 4) -> str:
    """Names for a message: the first few, each on one line and not too long, and how many there are."""
    listed = [ascii(n)[1:-1] if not n.isprintable() else n for n in names[:shown]]
    listed = [n if len(n) <= 100 else f'{n[:97]}...' for n in listed]
    return ', '.join(listed) + (f', ... ({len(names)} in all)' if len(names) > shown else '')


def check_utf8(path: str | Path) -> None:
    """Raise ValueError unless a path can be opened by safetensors and ONNX Runtime, which take UTF-8 only."""
    try:
        os.fsencode(os.path.realpath(path)).decode('utf-8')
    except UnicodeDecodeError:
        raise ValueError(
            f'{path} lies under a name that is no UTF-8, which neither safetensors nor ONNX Runtime opens: '
            'give another name.') from None


def _read_safetensors(path: Path) -> Any:
    check_utf8(path)
    try:
        return safetensors.torch.load_file(path)
    except PermissionError:
        raise
    except Exception as e:  # whatever a damaged header leads the reader to
        if zipfile.is_zipfile(path):
            raise ValueError(f'{path} is a file of torch.save, not safetensors: give it the suffix .pth.') from e
        raise ValueError(
            f'{path} is damaged: {path.name} is no intact safetensors file ({_describe(path) or _reason(e)}). '
            'Download or copy it again.') from e


def _read_saved(path: Path) -> Any:
    """What torch.save wrote, as far as it is tensors and plain values."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_archive(path)
    elif path.stat().st_size and _is_tar(path):  # torch would unpack it
        raise ValueError(f'{path} is a tar archive: unpack it first. {_EXPECTED}')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of old forms of files, which are read all the same
            # Mapped, not read: of a training checkpoint only the weights that are used ever reach memory.
            return torch.load(path, map_location='cpu', weights_only=True, mmap=is_zip)
    except PermissionError:
        raise
    except Exception as e:  # a damaged file can lead the unpickler to any error
        objects = _foreign_objects(path, is_zip, e)
        if objects:
            raise ValueError(
                f'{path} holds objects that are no weights: {shorten(objects)}. They could run any code, so nothing '
                'was loaded. Ask its makers for a file with the tensors alone (torch.save of a state_dict), or for '
                'safetensors.') from e
        if _looks_like_safetensors(path):
            raise ValueError(f'{path} is a safetensors file: give it the suffix .safetensors.') from e
        if (protocol := _protocol(path, is_zip)) > 2:
            raise ValueError(
                f'{path} is pickled by protocol {protocol}, which is not read: save it as torch.save does by default '
                '(pickle_protocol=2), or as safetensors.') from e
        wrong = f'a damaged archive ({_reason(e)})' if is_zip and _reason(e) else _describe(path)
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is {wrong or 'cut off, damaged, or of another kind'}. "
            f'{_EXPECTED}') from e


def _check_archive(path: Path) -> None:
    """Raise ValueError unless a zip archive is one of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as e:
        raise ValueError(f'{path} is a damaged zip archive ({_reason(e)}). {_EXPECTED}') from e
    names = {member.filename.rpartition('/')[2] for member in members}
    if 'constants.pkl' in names:
        raise ValueError(f'{path} is a TorchScript archive, which holds code: save the state_dict() of its model.')
    if 'data.pkl' not in names:
        kind = 'a NumPy archive' if any(n.endswith('.npy') for n in names) else 'a zip archive'
        raise ValueError(f"{path} is {kind} without a checkpoint in it (torch.save writes 'data.pkl'). {_EXPECTED}")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError(f'{path} was packed again, compressed: torch.save writes its archives without. {_EXPECTED}')


def _is_tar(path: Path) -> bool:
    with path.open('rb') as file:
        try:
            with tarfile.open(fileobj=file, mode='r:') as archive:
                return archive.next() is not None
        except tarfile.TarError:
            return False


def _reason(error: Exception) -> str:
    """The first line of an error; '' where it is only torch's advice to give up safety, or nothing."""
    line = next(iter(str(error).splitlines()), '').strip()
    return '' if 'weights_only' in line or 'weights only' in line.lower() else line[:200]


def _looks_like_safetensors(path: Path) -> bool:
    with path.open('rb') as file:
        start = file.read(9)
    return start.endswith(b'{') and start[4:8] == bytes(4)  # the length of a JSON header in eight bytes, and it


def _describe(path: Path) -> str:
    """What a file that is no checkpoint looks like, to end 'it is ...'; '' if like nothing known."""
    with path.open('rb') as file:
        start = file.read(256)
    if not start:
        return 'empty (0 bytes)'
    for signature, description in _SIGNATURES:
        if start.startswith(signature):
            return description
    text = start.decode('utf-8', errors='ignore').strip()
    if len(text) > 0.9 * len(start) and text.replace('\n', '').replace('\t', '').replace('\r', '').isprintable():
        return f'a text file that begins with {text.splitlines()[0][:60]!r}'
    return ''


def _protocol(path: Path, is_zip: bool) -> int:
    """Pickle protocol of a file of torch.save, 0 where it names none."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.rpartition('/')[2] == 'data.pkl')
            with archive.open(name) as member:
                start = member.read(2)
    else:
        with path.open('rb') as file:
            start = file.read(2)
    return start[1] if len(start) == 2 and start[:1] == b'\x80' and start[1] <= 5 else 0


def _foreign_objects(path: Path, is_zip: bool, error: Exception) -> list[str]:
    """Names of the classes and functions that a pickle asks for, without loading it."""
    if is_zip:
        try:
            return torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # the pickle is damaged as well: then that is what there is to say
            return []
    names = re.findall(r'GLOBAL ([\w.]+\.\w+)', str(error))
    if names:
        return names
    strings: list[str] = []
    try:
        with path.open('rb') as file:
            for opcode, arg, _ in pickletools.genops(file):
                if opcode.name == 'STACK_GLOBAL':
                    return ['.'.join(strings[-2:])]
                if opcode.name in ('GLOBAL', 'INST') and str(arg).partition(' ')[0] not in ('torch', 'collections'):
                    return [str(arg).replace(' ', '.')]
                if isinstance(arg, str):
                    strings.append(arg)
    except Exception:  # no pickle at all
        pass
    return []
