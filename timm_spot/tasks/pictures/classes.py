"""Do the labels of a data set mean what a model's classes mean? As far as both say."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from .files import printable
from .images import picture_channels

_SHOWN = 5


class Labelled(Protocol):
    """What `Pictures` say of their labels."""

    source: str
    class_map: str
    class_to_idx: dict[str, int]
    has_labels: bool
    is_named: bool


def load_class_map(file: str, root: str = '') -> dict[str, int]:
    """Names of classes and their numbers, from a text file with a name a line in the order of the classes.

    Args:
        file: The file, or its name inside `root`.
        root: Folder of the data set.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no list of names.
    """
    path = next((p for p in (Path(file), Path(root, file)) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f'class_map={printable(file)} is no file.')
    if path.suffix.lower() != '.txt':
        raise ValueError(
            f'class_map={printable(file)} must be a .txt, with the name of a class on each line, in their order.')
    try:
        names = [line.strip() for line in path.read_text(encoding='utf-8-sig').rstrip().splitlines()]
    except UnicodeDecodeError as e:
        raise ValueError(f'class_map={printable(file)} is no text in UTF-8: {e}.') from e
    wrong = [i for i, name in enumerate(names) if not name or name in names[:i]]
    if wrong or not names:
        what = f'line {wrong[0] + 1} is {"empty" if not names[wrong[0]] else "there twice"}' if wrong else 'it is empty'
        raise ValueError(f'class_map={printable(file)} must name each class once, one a line: {what}.')
    return {name: i for i, name in enumerate(names)}


def label_names(model: nn.Module) -> list[str]:
    """Names that the folders of a model's classes have: its config's own; none where it does not say."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    return list(names) if names and len(names) == model.num_classes else []


def class_names(model: nn.Module) -> list[str]:
    """Names of a model's classes for people: its config's own, else timm's ImageNet tables, else the numbers."""
    names = label_names(model) or getattr(model, 'class_names', [])
    if names:
        return list(names)
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [str(i) for i in range(model.num_classes)]


def check_classes(pictures: Labelled, model: nn.Module) -> None:
    """Check that a model can read the pictures of a data set, and that their labels are its classes.

    Raises:
        ValueError: A model of other channels than pictures have, or see `class_mismatch`.
    """
    picture_channels(model)
    mismatch = class_mismatch(pictures, model)
    if mismatch:
        raise ValueError(mismatch)


def class_mismatch(pictures: Labelled, model: nn.Module) -> str:
    """Why the labels of a data set are not a model's classes; '' where they are, as far as both say.

    They are where both have the same names under the same numbers; a name that is its own number is right as well.
    Under a class map, and where one side has no names, only their number is compared. Names are known of a model whose
    config has `label_names`, and of one with as many classes as an ImageNet if one name is an ImageNet's.
    """
    source, found = printable(pictures.source), pictures.class_to_idx
    if not pictures.has_labels:
        return f'{source} has no labels: its pictures lie in no folders that name their classes.'
    if not found or not model.num_classes:
        return ''
    remedy = ('labels would be wrong. Every class needs its folder; or give --class-map, a .txt with the names of the '
              "folders in the order of the model's classes, one a line.")
    wanted = label_names(model) or _imagenet_names(model, found)
    names = [''] * (max(found.values()) + 1)
    for name, i in found.items():
        names[i] = name
    if len(names) != model.num_classes:
        missing = [name for name in wanted if name not in found]
        said = f' (missing: {_shorten(missing)})' if wanted and set(found) < set(wanted) else ''
        return f'{source} has {len(names)} classes, the model {model.num_classes}{said}: {remedy}'
    wrong = [] if pictures.class_map or not wanted else _differing(names, wanted, pictures.is_named)
    if not wrong:
        return ''
    return (f"{source} has the classes {_shorten(names)}; the model's are {_shorten(wanted)} (number {wrong[0]} is "
            f'{names[wrong[0]]!r} and {wanted[wrong[0]]!r}): {remedy}')


def check_same_classes(pictures: Labelled, train: Labelled) -> None:
    """Check that labels of a data set and of that of its neighbours mean the same, as far as both say.

    Raises:
        ValueError: They do not, or the second has no labels.
    """
    source, bank = printable(pictures.source), printable(train.source)
    if not train.has_labels:
        raise ValueError(f'{bank} has no labels: its pictures lie in no folders that name their classes.')
    found, theirs = ({i: name for name, i in one.class_to_idx.items()} for one in (pictures, train))
    if not found or not theirs:
        return
    freely = pictures.is_named or train.is_named
    numbers = range(max(found) + 1)
    names, others = ([side.get(i, '') for i in numbers] for side in (found, theirs))
    wrong = _differing(names, others, freely) or [
        i for i, (name, other) in enumerate(zip(names, others))
        if name != other and name.isdigit() and other.isdigit()]
    if wrong:
        i = wrong[0]
        raise ValueError(
            f'{source} has the classes {_shorten(list(pictures.class_to_idx))}, {bank}, in which neighbours are looked '
            f'for, has {_shorten(list(train.class_to_idx))} (number {i} is {found.get(i, "")!r} and '
            f'{theirs.get(i, "")!r}): labels would be wrong. Both need the same folders; or give --class-map, a .txt '
            'with the names of all folders, one a line.')


def _imagenet_names(model: nn.Module, found: Sequence[str]) -> list[str]:
    """Names of an ImageNet's classes as a data set writes them, synsets or descriptions; none where it is another."""
    subset = infer_imagenet_subset(model)
    if not subset:
        return []
    info = ImageNetInfo(subset)
    for names in (info.label_names(), info.label_descriptions()):
        if not set(found).isdisjoint(names):
            return list(names)
    return []


def _differing(names: Sequence[str], wanted: Sequence[str], freely: bool) -> list[int]:
    """Numbers of the classes with other names.

    Of a data set that numbers its classes itself (`freely`) names may be spelled otherwise, and a few may differ: those
    of folders get their numbers by their names, which therefore must all agree.
    """
    wrong = [
        i for i, (name, other) in enumerate(zip(names, wanted)) if name not in (other, str(i))
        and not (freely and _spellings(name) & _spellings(other))]
    return [] if freely and 2 * len(wrong) < len(names) else wrong


def _spellings(name: str) -> set[str]:
    """`Tench, Tinca tinca` has two."""
    return {part.strip().casefold().replace('_', ' ') for part in name.split(',')}


def _shorten(names: Sequence[str]) -> str:
    shown = ', '.join(name or "''" for name in names[:_SHOWN])
    return shown + (f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else '')
