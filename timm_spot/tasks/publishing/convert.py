"""Convert a checkpoint into a folder that timm loads: safetensors, config.json, model card. Nothing is unpickled."""
from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import safetensors
import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from ...models.checkpoint_file import StateDict, check_utf8, shorten
from ...models.pruning import features_for_head
from ...models.spot_checkpoint import FOLDED, rename_authors_key
from ...models.spot_retrofit import retrofit_in_place
from ...models.spot_vit import SubpixelVisionTransformer
from ...ops.placements import sample_positions
from ..kept import lock_output
from .hub import save_folder
from .sources import Source, load_source

_PARITY = 1e-3  # relative; single precision gives 1e-6, a wrong weight 1


@dataclasses.dataclass
class Conversion:
    """What `convert` did; `str()` of it is what the command prints."""

    architecture: str
    entry: str
    mapped: int
    renamed: dict[str, str]
    folded: dict[str, list[str]]
    added: list[str]
    dropped: list[str]
    difference: float

    def __str__(self) -> str:
        lines = [f'architecture  {self.architecture}']
        if self.entry:
            lines.append(f'read from     {self.entry!r}')
        lines.append(f'mapped        {self.mapped} tensors, bit for bit, {len(self.renamed)} of them under a new name')
        lines += [f'                {old} -> {new}' for old, new in list(self.renamed.items())[:3]]
        lines += [f'folded        {old} -> {", ".join(new)}' for old, new in self.folded.items()]
        lines += [f'added         {shorten(self.added)}'] * bool(self.added)
        lines += [f'dropped       {shorten(self.dropped)}'] * bool(self.dropped)
        lines.append(
            'verified      loaded back, features and logits differ from the source by '
            f'{self.difference:.1e} (relative)')
        return '\n'.join(lines)


def convert(
        source: str | Path,
        dest: str | Path,
        model: str | None = None,
) -> Conversion:
    """Convert a checkpoint into a folder with model.safetensors, config.json and a model card.

    The folder loads with `local-dir:` and, once pushed, with `hf-hub:`. What was written is loaded back and must give
    the source's features and logits before the folder appears under its name.

    Args:
        source: The authors' `.pth`; a timm checkpoint of a subpixel ViT or of any ViT that `retrofit` takes (`.pth`,
            `.pth.tar`, `.safetensors`); 'ORG/NAME' on the Hub, with or without 'hf-hub:' before it; or a folder that
            timm saved.
        dest: Folder to make; must not exist or be empty.
        model: timm name of what the weights belong to, where the source does not say: a subpixel ViT's, or that of
            the ViT to retrofit. With a tag the model card says what timm knows of those weights.

    Returns:
        What was mapped, folded, added and dropped.

    Raises:
        FileNotFoundError: There is no such source.
        FileExistsError: `dest` is not empty.
        BlockingIOError: Another conversion writes to `dest`.
        ValueError: The source cannot be used (see `read_checkpoint`, `retrofit`), or it is unclear whose weights it
            holds.
        OSError: A download failed, see `timm_spot.models.download`.
        RuntimeError: The model that was loaded back gives other features or logits than the source.
    """
    dest = Path(dest)
    _check_destination(dest)
    with lock_output(dest):
        origin = load_source(source, model)
        images, positions = _probe(origin.model)
        expected = _answer(origin.model, images)
        if positions is not None:
            origin.model = retrofit_in_place(origin.model, fold=True)
        conversion = _describe(origin)
        with _new_folder(dest) as folder:
            save_folder(origin.model, folder, origin.origin, origin.data, origin.data_config)
            del origin  # before its copy is loaded: two models at a time are enough
            again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
            conversion.difference = max(
                _difference(ours, theirs) for ours, theirs in zip(_answer(again, images, positions), expected))
            if not conversion.difference <= _PARITY:
                raise RuntimeError(
                    f'the model loaded back from {folder} gives other logits than {source}, or other features: they '
                    f'differ by {conversion.difference:.1e} (relative). Nothing was kept.')
    return conversion


def _check_destination(dest: Path) -> None:
    check_utf8(dest)
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise FileExistsError(f'{dest} exists already: give a new or an empty folder.')
    if not dest.absolute().parent.is_dir():
        raise FileNotFoundError(f'{dest.absolute().parent}, in which {dest.name} is to be made, is no folder.')


def _probe(model: VisionTransformer) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images to compare two models by, and for a ViT that is to be retrofitted the placement that is its grid."""
    embed = model.patch_embed
    images = torch.randn(1, model.in_chans, *embed.img_size, generator=torch.Generator().manual_seed(0))
    if isinstance(model, SubpixelVisionTransformer):
        return images, None
    return images, sample_positions('grid', embed.num_patches, embed.img_size, window=embed.patch_size[0])


@torch.inference_mode()
def _answer(
        model: VisionTransformer,
        images: torch.Tensor,
        positions: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Features in front of the head and logits: a head of zeros would hide everything before it."""
    tokens = features_for_head(model, images, **({} if positions is None else dict(positions=positions)))
    return [model.forward_head(tokens, pre_logits=True), model.forward_head(tokens)]


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest entry; of two tensors of zeros it is zero."""
    difference = (ours - theirs).abs().max()
    return (difference / theirs.abs().max()).item() if difference != 0 else 0.


def _describe(source: Source) -> Conversion:
    """Say where each tensor of the model comes from; 'mapped' are those that are equal."""
    tensors, model = source.tensors, source.model
    mapped, made = _find_equal(tensors, model)
    folded = {old: [k for k in new if k in made] for old, new in FOLDED.items() if old in tensors}
    folded.update({k: [k] for k in made if k in tensors and not any(k in new for new in folded.values())})
    from_folding = {k for new in folded.values() for k in new}
    used = {*mapped.values(), *folded, *from_folding}
    return Conversion(
        architecture=model.pretrained_cfg['architecture'],
        entry=source.entry,
        mapped=len(mapped),
        renamed={old: new for new, old in mapped.items() if old != new},
        folded=folded,
        added=[k for k in made if k not in from_folding],
        dropped=[*(k for k in tensors if k not in used), *source.ignored],
        difference=float('nan'),
    )


def _find_equal(tensors: StateDict, model: nn.Module) -> tuple[dict[str, str], list[str]]:
    """Names of a model's tensors that equal one of the source's, with that one's name, and those of all others."""
    origin = {rename_authors_key(k): k for k in tensors}
    mapped: dict[str, str] = {}
    made: list[str] = []
    for key, value in model.state_dict().items():
        old = origin.get(key) or origin.get(key.replace('fc_norm.', 'norm.'))
        same = old is not None and tensors[old].shape == value.shape
        if same and torch.equal(tensors[old].to(value.dtype), value):
            mapped[key] = old
        else:
            made.append(key)
    return mapped, made


@contextlib.contextmanager
def _new_folder(dest: Path) -> Iterator[Path]:
    """A folder beside `dest` that takes its name once it is complete, or vanishes; needs the lock of `dest`."""
    dest = dest.absolute()
    for leftover in dest.parent.glob(f'.{glob.escape(dest.name)}.*.tmp'):  # of a conversion that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    folder = dest.with_name(f'.{dest.name}.{os.getpid()}.tmp')
    folder.mkdir()
    try:
        yield folder
        folder.replace(dest)
    except safetensors.SafetensorError as e:
        raise OSError(f'{dest} cannot be written: {e}.') from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
