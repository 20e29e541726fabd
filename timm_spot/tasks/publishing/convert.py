"""Convert a checkpoint into a folder that timm loads: safetensors, config.json, model card. Nothing is unpickled."""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pickle
import pickletools
import re
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import safetensors
import safetensors.torch
import timm
import torch
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as timm_filter_fn
from torch import nn

from ...models.spot_checkpoint import FOLDED, checkpoint_filter_fn, rename_authors_key
from ...models.spot_config import PROJECT_PAGE
from ...models.spot_retrofit import check_patch_grid, retrofit_in_place
from ...models.spot_vit import SubpixelVisionTransformer
from ...models.spot_zoo import default_cfgs
from ...ops.samplers import sample_positions
from .hub import save_folder

StateDict = Dict[str, torch.Tensor]

# In the order of timm's own loader: averaged weights first.
_ENTRIES = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
_SUFFIXES = ('.pth', '.tar', '.pt', '.bin', '.ckpt', '.safetensors')
_PARITY = 1e-3  # relative; single precision gives 1e-6, a wrong weight 1


class Checkpoint(NamedTuple):
    """A checkpoint file: its weights, the entry they stood under, the run's arguments, what else it holds."""

    tensors: StateDict
    entry: str
    args: Dict[str, Any]
    ignored: Tuple[str, ...]


@dataclasses.dataclass
class Conversion:
    """What `convert` did; `str()` of it is what the command prints."""

    architecture: str
    entry: str
    mapped: int
    renamed: Dict[str, str]
    folded: Dict[str, List[str]]
    added: List[str]
    dropped: List[str]
    difference: float

    def __str__(self) -> str:
        lines = [f'architecture  {self.architecture}']
        if self.entry:
            lines.append(f'read from     {self.entry!r}')
        lines.append(f'mapped        {self.mapped} tensors, bit for bit, {len(self.renamed)} of them under a new name')
        lines += [f'                {old} -> {new}' for old, new in list(self.renamed.items())[:3]]
        lines += [f'folded        {old} -> {", ".join(new)}' for old, new in self.folded.items()]
        lines += [f'added         {_shorten(self.added)}'] * bool(self.added)
        lines += [f'dropped       {_shorten(self.dropped)}'] * bool(self.dropped)
        lines.append(f'verified      loaded back, logits differ from the source by {self.difference:.1e} (relative)')
        return '\n'.join(lines)


def _shorten(names: List[str]) -> str:
    return ', '.join(names[:4]) + (f', ... ({len(names)} in all)' if len(names) > 4 else '')


def read_checkpoint(path: Union[str, Path]) -> Checkpoint:
    """Read the weights in a checkpoint file; code in it is never run.

    Args:
        path: `.safetensors`, or a file of torch.save: a state dict, or a dict that holds one as `state_dict_ema`,
            `model_ema`, `state_dict` or `model` (the first of these is taken).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or its weights are no tensors or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} is no file.')
    if path.suffix == '.safetensors':
        try:
            content = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as e:
            raise ValueError(f'{path} is no intact safetensors file: {e}.') from e
    else:
        content = _load_tensors(path)
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds a {type(content).__name__}, not a state dict.')

    entry = next((name for name in _ENTRIES if isinstance(content.get(name), dict)), '')
    args = content.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    tensors = clean_state_dict(content[entry] if entry else content)
    others = [f'{k} ({type(v).__name__})' for k, v in tensors.items() if not isinstance(v, torch.Tensor)]
    if others:
        raise ValueError(f'{path} holds other things than tensors among its weights: {_shorten(others)}.')
    broken = [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise ValueError(f'{path} holds NaN or infinity in {_shorten(broken)}.')
    ignored = tuple(k for k in content if k not in (entry, 'args')) if entry else ()
    return Checkpoint(tensors, entry, args, ignored)


def _load_tensors(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='Detected pickle protocol')
            # Mapped, not read: of a training checkpoint only the weights that are used ever reach memory.
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        objects = _foreign_objects(path, e)
        raise ValueError(
            f"{path} holds objects that are no weights: {', '.join(objects) or 'unreadable ones'}. They could run any "
            'code, so nothing was loaded. Ask its makers for a file with the tensors alone (torch.save of a '
            'state_dict), or for safetensors.') from e
    except (RuntimeError, EOFError, OSError) as e:
        raise ValueError(f'{path} cannot be read as a checkpoint: {str(e).splitlines()[0] if str(e) else e!r}') from e


def _foreign_objects(path: Path, error: pickle.UnpicklingError) -> List[str]:
    """Names of the classes and functions that a pickle asks for, without loading it."""
    if zipfile.is_zipfile(path):
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    names = re.findall(r'GLOBAL (\S+)', str(error))
    if names:
        return names
    strings: List[str] = []
    try:
        with path.open('rb') as file:
            for opcode, arg, _ in pickletools.genops(file):
                if opcode.name == 'STACK_GLOBAL':
                    return ['.'.join(strings[-2:])]
                if isinstance(arg, str):
                    strings.append(arg)
    except ValueError:  # no pickle at all
        pass
    return []


def convert(
        source: Union[str, Path],
        dest: Union[str, Path],
        model: Optional[str] = None,
) -> Conversion:
    """Convert a checkpoint into a folder with model.safetensors, config.json and a model card.

    The folder loads with `local-dir:` and, once pushed, with `hf-hub:`. What was written is loaded back and must give
    the source's logits before the folder appears under its name.

    Args:
        source: The authors' `.pth`; a timm checkpoint of a subpixel ViT or of any ViT that `retrofit` takes (`.pth`,
            `.pth.tar`, `.safetensors`); 'ORG/NAME' on the Hub, with or without 'hf-hub:' before it; or a folder that
            timm saved.
        dest: Folder to make; must not exist or be empty.
        model: timm name of what the weights belong to, where the source does not say: a subpixel ViT's, or that of
            the ViT to retrofit.

    Returns:
        What was mapped, folded, added and dropped.

    Raises:
        FileNotFoundError: There is no such source.
        FileExistsError: `dest` is not empty.
        ValueError: The source cannot be used (see `read_checkpoint`, `retrofit`), or it is unclear whose weights it
            holds.
        RuntimeError: The model that was loaded back gives other logits than the source.
    """
    dest = Path(dest)
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise FileExistsError(f'{dest} exists already: give a new or an empty folder.')
    if not dest.absolute().parent.is_dir():
        raise FileNotFoundError(f'{dest.absolute().parent}, in which {dest.name} is to be made, is no folder.')

    origin = _timm_name(source)
    if origin:
        checkpoint = Checkpoint({}, '', {}, ())
        built = timm.create_model(origin, pretrained=True)
        # Prefix tokens are changed in place below.
        tensors = {k: v.clone() if k in ('cls_token', 'reg_token') else v for k, v in built.state_dict().items()}
    else:
        checkpoint = read_checkpoint(source)
        tensors = checkpoint.tensors
        name = model or checkpoint.args.get('model') or _recognise(tensors, source)
        if _is_authors(tensors):
            name = _with_authors_tag(name)
        built = _load(name, checkpoint, source)
        origin = f'the file {Path(source).name}, weights of {name}'
        if _is_authors(tensors):
            origin += f', as released by its authors at {PROJECT_PAGE}'

    built.eval()
    images = torch.randn(
        1, built.in_chans, *built.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    positions = None
    if not isinstance(built, SubpixelVisionTransformer):
        positions = sample_positions(
            'grid', built.patch_embed.num_patches, built.patch_embed.img_size, window=built.patch_embed.patch_size[0])
    with torch.inference_mode():
        expected = built(images)
    if positions is not None:
        built = retrofit_in_place(built, fold=True)
    conversion = _compare(tensors, built, checkpoint)

    with _new_folder(dest) as folder:
        data_config = resolve_data_config(checkpoint.args, model=built) if checkpoint.args else None
        save_folder(built, folder, origin, checkpoint.args.get('dataset'), data_config)
        # The source goes before its copy is loaded: two models at a time are enough.
        del built, tensors, checkpoint
        again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        with torch.inference_mode():
            logits = again(images, positions)
        conversion.difference = ((logits - expected).abs().max() / expected.abs().max()).item()
        if not conversion.difference <= _PARITY:
            raise RuntimeError(
                f'the model loaded back from {folder} gives other logits than {source}: they differ by '
                f'{conversion.difference:.1e} (relative). Nothing was kept.')
    return conversion


def _timm_name(source: Union[str, Path]) -> Optional[str]:
    """The source as `timm.create_model` names it, if it is a model folder or a repository; None for a file."""
    if str(source).startswith(('hf-hub:', 'local-dir:')):
        return str(source)
    path = Path(source)
    if path.is_dir():
        return f'local-dir:{path}'
    if not path.exists() and str(source).count('/') == 1 and path.suffix not in _SUFFIXES:
        return f'hf-hub:{source}'
    return None


def _is_authors(tensors: StateDict) -> bool:
    return 'embedder.emb.weight' in tensors


def _recognise(tensors: StateDict, source: Union[str, Path]) -> str:
    """Name of the model whose weights these are; only the authors' tell it themselves."""
    if _is_authors(tensors):
        base = tensors['embedder.emb.weight'].shape == (768, 1024) and 'blocks.11.norm1.weight' in tensors
        if base and 'fc_norm.weight' in tensors:
            return 'spot_vit_base_patch16_mae.spot_in1k'
        if base:
            raise ValueError(
                f"{source} fits two models: say whether it is model='spot_vit_base_patch16_in21k.spot_in21k_ft_in1k' "
                "or model='spot_vit_base_patch16_in1k.spot_in1k' (--model).")
    raise ValueError(
        f'{source} does not say whose weights it holds: give the name that timm has for them as model= (--model). '
        f'Its first keys are {_shorten(list(tensors))}.')


def _with_authors_tag(name: str) -> str:
    """The tag of the authors' weights brings the preprocessing that goes with them."""
    known = default_cfgs.get(name)  # of names without a tag
    tags = [tag for tag, cfg in known.cfgs.items() if cfg.convention == 'spot'] if known else []
    return f'{name}.{tags[0]}' if tags else name


def _load(name: str, checkpoint: Checkpoint, source: Union[str, Path]) -> VisionTransformer:
    """Build the named model as the checkpoint's run did and fill it."""
    tensors, args = checkpoint.tensors, checkpoint.args
    kwargs = dict(args.get('model_kwargs') or {})
    kwargs.update({k: args[arg] for k, arg in (('global_pool', 'gp'), ('in_chans', 'in_chans')) if args.get(arg)})
    head = tensors.get('head.weight')
    kwargs['num_classes'] = 0 if head is None else head.shape[0]
    model = timm.create_model(name, **kwargs)
    if isinstance(model, SubpixelVisionTransformer):
        tensors = checkpoint_filter_fn(tensors, model)
    else:
        check_patch_grid(model)
        tensors = timm_filter_fn(tensors, model, adapt_layer_scale=True)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:
        raise ValueError(f'the weights in {source} are not those of {name}: {e}') from e
    return model


def _compare(tensors: StateDict, model: nn.Module, checkpoint: Checkpoint) -> Conversion:
    """Say where each tensor of the model comes from; 'mapped' are those that are equal."""
    origin = {rename_authors_key(k): k for k in tensors}
    mapped: Dict[str, str] = {}
    made: List[str] = []
    for key, value in model.state_dict().items():
        old = origin.get(key) or origin.get(key.replace('fc_norm.', 'norm.'))
        same = old is not None and tensors[old].shape == value.shape
        if same and torch.equal(tensors[old].to(value.dtype), value):
            mapped[key] = old
        else:
            made.append(key)
    folded = {old: [k for k in new if k in made] for old, new in FOLDED.items() if old in tensors}
    folded.update({k: [k] for k in made if k in tensors and not any(k in new for new in folded.values())})
    from_folding = {k for new in folded.values() for k in new}
    used = {*mapped.values(), *folded, *from_folding}
    return Conversion(
        architecture=model.pretrained_cfg['architecture'],
        entry=checkpoint.entry,
        mapped=len(mapped),
        renamed={old: new for new, old in mapped.items() if old != new},
        folded=folded,
        added=[k for k in made if k not in from_folding],
        dropped=[*(k for k in tensors if k not in used), *checkpoint.ignored],
        difference=float('nan'),
    )


@contextlib.contextmanager
def _new_folder(dest: Path) -> Iterator[Path]:
    """A folder beside `dest` that takes its name once it is complete, and vanishes if anything fails."""
    folder = dest.absolute().with_name(f'.{dest.name}.{os.getpid()}')
    folder.mkdir()
    try:
        yield folder
        folder.replace(dest)
    except safetensors.SafetensorError as e:
        raise OSError(f'{dest} cannot be written: {e}.') from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
