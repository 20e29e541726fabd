"""The oracle over a whole data set, resumable: parts are written as it goes, a restart does only what is missing.

A part is a batch of images that are neighbours in the data set. It is written whole or not at all, and depends on
nothing but the plan's key, so a run that was killed ends with the same bytes as one that was not, on the same processor
with the same number of threads.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from ..kept import KeptParts, check_key, check_output, lock_output, remove_leftovers, whole_file
from ..pictures.datasets import Loaded, Pictures, Transformed
from ..pictures.saliency_maps import SaliencySource, saliency_source
from .draws import draw_placements
from .optimize import optimize_positions
from .plan import Plan, make_plan
from .result import OracleResult
from .settings import Search

_HEADER = 'timm_spot'
_OF_ROWS = ('images', 'broken')  # entries of the header of a result that are not of the key
Progress = Callable[[int], Any]


def run_oracle(
        model: nn.Module,
        pictures: Pictures,
        out: str | Path,
        *,
        init: str = 'isotropic',
        saliency: str | None = None,
        n_tokens: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
        workers: int = 0,
        skip_broken: bool = False,
        progress: Progress = lambda count: None,
        **search: Any,
) -> OracleResult:
    """Search the placement of every image of a data set, and go on where an earlier run with the same `out` ended.

    Everything is checked before anything is written. Parts lie in the folder `<out>.parts` until all are done; then
    they are joined into `out` and removed. The header of `out` holds the key, the names of the pictures, one for each
    row (their number, where they are no files), and what is wrong with those left out.

    Args:
        model: A subpixel ViT in eval mode, on the device to use.
        pictures: The data set. Its labels are used where they are the model's classes.
        out: The safetensors file to write, see `OracleResult`.
        init: Sampler of the start, which draws by `seed` and an image's number, or the name of the model's own placer.
        saliency: Where the maps of a salient `init` come from, see `saliency_source`; by default the model's own.
        n_tokens: Budget, by default the model's.
        seed: For stochastic samplers.
        batch_size: Images searched at a time, and the size of a part.
        workers: Processes that read pictures.
        skip_broken: Leave out pictures that cannot be read; else they are an error.
        progress: Called with the number of pictures whenever some are done, or found done.
        **search: Of `Search`; plain values, no functions.

    Raises:
        ValueError: `out` or its parts are of another key or damaged; a picture that cannot be read; wrong arguments.
        BlockingIOError: Another run writes to `out`.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    check_output(out)
    plan = make_plan(model, pictures, Search(**search), init, saliency, n_tokens, seed, batch_size)
    if not skip_broken:
        _refuse(pictures.broken)
    parts = KeptParts(out.with_name(f'{out.name}.parts'), plan.key())
    if not out.exists():
        _carry_out(plan, parts, out, workers, skip_broken, progress)
    _check_result(out, parts.key, skip_broken)
    if parts.folder.exists():
        with lock_output(out):
            parts.remove()
    return OracleResult.from_safetensors(out)


def list_broken(out: str | Path) -> list[str]:
    """What is wrong with the pictures that a result leaves out."""
    return _read_header(Path(out)).get('broken', [])


def _carry_out(
        plan: Plan,
        parts: KeptParts,
        out: Path,
        workers: int,
        skip_broken: bool,
        progress: Progress,
) -> None:
    """Write `out`, alone."""
    read_maps = None
    if plan.saliency is not None:
        read_maps = saliency_source(plan.saliency, plan.model, plan.transform)
    with lock_output(out):
        if out.exists():  # another run has just ended
            return
        remove_leftovers(out.parent, out.name)
        parts.open()
        try:
            count = _make_parts(plan, parts, read_maps, workers, skip_broken, progress)
            _join(plan, parts, count, skip_broken, out)
        finally:
            parts.remove_empty()


def _make_parts(
        plan: Plan,
        parts: KeptParts,
        read_maps: SaliencySource | None,
        workers: int,
        skip_broken: bool,
        progress: Progress,
) -> int:
    """Make what is missing, and count all parts."""
    pictures, size = plan.pictures, plan.batch_size
    count = -(-len(pictures) // size)
    if pictures.is_stream:
        count, missing, batches = 0, None, _read_stream(plan)
    else:
        missing = parts.missing(count)
        progress(len(pictures) - sum(min(size, len(pictures) - b * size) for b in missing))
        batches = _read(plan, missing, workers)
    for b, loaded in batches:
        count = max(count, b + 1)
        if missing is not None or parts.is_missing(b):
            if not skip_broken:
                _refuse(one.broken for one in loaded)
            _write_part(plan, parts.file(b), loaded, read_maps)
        progress(len(loaded))
    return count


def _write_part(plan: Plan, file: Path, loaded: list[Loaded], read_maps: SaliencySource | None) -> None:
    """Search a batch, and write what was found of the pictures that could be read."""
    good = [one for one in loaded if not one.broken]
    header = dict(rows=[one.index for one in good], broken=[one.broken for one in loaded if one.broken])
    # The header holds one entry: the order of several would vary.
    metadata = {_HEADER: json.dumps(header)}
    if good:
        _search(plan, good, read_maps).to_safetensors(file, metadata)
    else:
        with whole_file(file) as partial:
            save_file({}, partial, metadata)


def _search(plan: Plan, good: list[Loaded], read_maps: SaliencySource | None) -> OracleResult:
    model = plan.model
    images = torch.stack([one.image for one in good]).to(next(model.parameters()).device)
    index = torch.tensor([one.index for one in good])
    targets = torch.tensor([one.label for one in good]) if plan.labelled else None
    maps = None
    if read_maps is not None:
        maps = read_maps(images, [plan.pictures.name(i) for i in index.tolist()])
    try:
        start = draw_placements(model, images, plan.init, plan.n_tokens, maps, index, plan.seed)
        return optimize_positions(model, images, targets, init=start, **vars(plan.search))
    except ValueError as e:
        raise ValueError(f'in the batch whose image 0 is number {index[0]} of the data set: {e}') from e


def _join(plan: Plan, parts: KeptParts, count: int, skip_broken: bool, out: Path) -> None:
    """Join all parts to the result."""
    rows: list[int] = []
    broken = list(plan.pictures.broken)
    results = []
    for file in map(parts.file, range(count)):
        header = _read_header(file, 'rows', 'broken')
        rows += header['rows']
        broken += header['broken']
        if header['rows']:
            results.append(OracleResult.from_safetensors(file))
    if not skip_broken:
        _refuse(broken)
    if not results:
        said = f': {broken[0]}' if broken else '.'
        raise ValueError(f'data set {plan.pictures.source} holds no picture that can be read{said}')
    header = dict(parts.key, images=_row_names(plan.pictures, rows), broken=broken)
    OracleResult.concat(results).to_safetensors(out, {_HEADER: json.dumps(header)})


def _row_names(pictures: Pictures, rows: list[int]) -> list[str] | int:
    """Files of the pictures, as they are named in their folder or tar; the number of those that are no files."""
    if not Path(pictures.source).exists():
        return len(rows)
    return [os.path.relpath(pictures.name(i), pictures.source) for i in rows]


def _check_result(out: Path, key: dict[str, Any], skip_broken: bool) -> None:
    """Raise ValueError unless a result is of this key, and leaves out no picture that it should hold."""
    header = _read_header(out)
    if 'weights' in header and 'pictures' not in header:
        raise ValueError(
            f'{out} was made by version 0.1, which did not record all that determines it. '
            'OracleResult.from_safetensors reads it; to search anew, remove it or write to another file.')
    check_key(out, {name: value for name, value in header.items() if name not in _OF_ROWS}, key)
    if not skip_broken:
        _refuse(header.get('broken', []))


def _read_header(file: Path, *needed: str) -> dict[str, Any]:
    """What the file of a result or a part says of itself."""
    try:
        with safe_open(file, 'pt') as opened:
            header = json.loads((opened.metadata() or {})[_HEADER])
        missing = set(needed) - set(header)
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f'{file} is damaged, or nothing of the oracle: remove it, or write to another file.') from e
    if missing or not isinstance(header, dict):
        raise ValueError(f"{file} does not say what it holds ({', '.join(missing)}): remove it.")
    return header


def _refuse(broken: Iterable[str]) -> None:
    """Raise ValueError where a picture is broken."""
    first = next(filter(None, broken), None)
    if first is not None:
        raise ValueError(f'{first} --skip-broken leaves such pictures out, and lists them.')


def _read(plan: Plan, numbers: list[int], workers: int) -> Iterator[tuple[int, list[Loaded]]]:
    """Batches by their numbers, in order."""
    size, count = plan.batch_size, len(plan.pictures)
    rows = [range(b * size, min((b + 1) * size, count)) for b in numbers]
    loader = DataLoader(
        Transformed(plan.pictures, plan.transform), batch_sampler=rows, num_workers=workers, collate_fn=list)
    return zip(numbers, loader)


def _read_stream(plan: Plan) -> Iterator[tuple[int, list[Loaded]]]:
    """All batches of a data set that can only be read in order."""
    loaded: list[Loaded] = []
    for i, (picture, label) in enumerate(plan.pictures):
        loaded.append(Loaded(i, plan.transform(picture), int(label), ''))
        if len(loaded) == plan.batch_size:
            yield i // plan.batch_size, loaded
            loaded = []
    if loaded:
        yield loaded[0].index // plan.batch_size, loaded
