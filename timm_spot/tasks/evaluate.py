"""The paper's tables: accuracy of models by placement and budget, on any data set.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

A row is one model at one placement and budget, and one scorer and keep rate where its tokens are dropped. Rows are
written to `results.csv` one by one, under a key of everything that determines them, so that a run goes on where an
earlier one ended; `speed.csv`, of the same keys, holds what no two runs measure alike.
"""
from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..models.dht_vit import DhtVisionTransformer, TokenFeatures
from ..models.spot_vit import SubpixelVisionTransformer
from ..ops.samplers import get_sampler, sample_positions
from . import prunings
from .baselines import LowRes, patch_drop, random_patches, shrunk_grid, top_k
from .data import Batch, Decoded, Pictures, check_classes
from .flops import count_flops
from .knn import knn_predict, to_bank
from .metrics import estimate_calibration, estimate_mean, score_logits
from .oracle import optimize_positions
from .oracle_run import draw_placements, image_generator, weights_digest
from .predict import model_transform
from .processes import Processes
from .saliency_maps import saliency_source

BASELINES = ('patch-drop', 'low-res', 'top-k')
AS_IT_IS = 'as it is'
REGIONS = 'regions'
RESULTS, SPEED = 'results.csv', 'speed.csv'
KEY = (
    'data', 'data_sha', 'split', 'model', 'weights', 'sampler', 'n_tokens', *prunings.COLUMNS, 'seeds', 'saliency',
    'knn', 'amp')
_METRICS = ('top1', 'top5', 'nll', 'ece', 'knn_top1')
COLUMNS = (
    *KEY, 'images', 'skipped', *(f'{m}{suffix}' for m in _METRICS for suffix in ('', '_se', '_se_seeds')), 'gflops')
SPEED_COLUMNS = (*KEY, 'images_per_s')
_PERCENT = ('top1', 'top5', 'ece', 'knn_top1')

Row = Dict[str, str]
# From normalised images, labels, their numbers in the data set and their files, for a seed, to what `forward_head`
# takes: tokens after the norm.
Tokens = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Sequence[str], int], Union[torch.Tensor, TokenFeatures]]


@dataclasses.dataclass
class Knn:
    """Nearest-neighbour classification, see `knn_predict`."""

    train: Pictures
    k: int = 20
    temperature: float = 0.07

    @property
    def key(self) -> str:
        return f'{self.train.source} {self.train.digest()} k={self.k} T={self.temperature}'


@dataclasses.dataclass
class Cell:
    """One row to compute."""

    key: Row
    model: nn.Module
    tokens: Tokens
    seeds: Tuple[int, ...]


def list_cells(
        models: Dict[str, nn.Module],
        pictures: Pictures,
        split: str,
        samplers: Sequence[str],
        budgets: Sequence[int],
        oracle: Optional[str] = None,
        baselines: Sequence[str] = (),
        seeds: Sequence[int] = (0,),
        saliency: str = 'spectral',
        knn: Optional[Knn] = None,
        amp: Optional[str] = None,
        scorers: Sequence[str] = (),
        keep_rates: Sequence[float] = (),
) -> List[Cell]:
    """The rows that an evaluation has, in order; nothing is computed yet.

    Subpixel ViTs have a row for each sampler and budget; dHT models, whose tokens are regions, one for each budget;
    other VisionTransformers, and subpixel ones, one for each baseline and budget; models that have no budget one as
    they are. Where tokens are dropped (`scorers`, or a model that does it by itself), each of these but the baselines
    is a row for each scorer and keep rate.

    Raises:
        ValueError: Something unknown, or that a model or its image size does not allow.
    """
    unknown = [b for b in baselines if b not in BASELINES]
    if unknown:
        raise ValueError(f"baselines={','.join(baselines)} has the unknown {unknown[0]!r}: {', '.join(BASELINES)}.")
    prunings.check_prunings(models, scorers, keep_rates)
    cells = []
    for name, model in models.items():
        check_classes(pictures, model)
        if not model.num_classes and knn is None:
            raise ValueError(f'{name} has no classifier: give --knn, to classify by nearest neighbours.')
        pruned = prunings.list_prunings(model, scorers, keep_rates)
        common = dict(
            dict.fromkeys(prunings.COLUMNS, ''),
            data=pictures.source, data_sha=pictures.digest(), split=split, model=name,
            weights=weights_digest(model)[:12], saliency='', amp=amp or '', knn=knn.key if knn else '')

        def add(
                sampler: str,
                n_tokens: Optional[int],
                tokens: Tokens,
                stochastic: bool,
                model: nn.Module = model,
                common: Row = common,
                **changes: Any,
        ) -> None:
            used = tuple(seeds) if stochastic else (0,)
            key = dict(
                common, sampler=sampler, n_tokens='' if n_tokens is None else str(n_tokens),
                seeds=' '.join(map(str, used)) if stochastic else '')
            cells.append(Cell({**key, **changes}, model, tokens, used))

        def add_each(
                sampler: str,
                n_tokens: Optional[int],
                tokens_of: Callable[[nn.Module], Tokens],
                stochastic: bool,
                model: nn.Module = model,
                pruned: Sequence[prunings.Pruning] = pruned,
                add: Callable[..., None] = add,
                **changes: Any,
        ) -> None:
            """Add the row, or, where tokens are dropped, that of each scorer and keep rate."""
            if not pruned:
                add(sampler, n_tokens, tokens_of(model), stochastic, **changes)
            for pruning in pruned:
                add(sampler, n_tokens, _pruned(tokens_of(pruning.model), pruning), stochastic or pruning.stochastic,
                    model=pruning.model, **pruning.key, **changes)

        size = model.pretrained_cfg['input_size'][1:]
        if isinstance(model, SubpixelVisionTransformer):
            read_maps = saliency_source(saliency, model, model_transform(model))
            for sampler in samplers:
                stochastic, maps = not get_sampler(sampler).deterministic, 'saliency' in get_sampler(sampler).keywords
                for n in budgets:
                    if not stochastic:
                        # Refuses a budget that a grid has not before any work.
                        sample_positions(sampler, n, size, window=model.patch_embed.window)
                    add_each(
                        sampler, n, partial(_placed, sampler=sampler, n_tokens=n, read_maps=read_maps), stochastic,
                        saliency=saliency if maps else '')
            if oracle is not None:
                stochastic = not get_sampler(oracle).deterministic
                maps = 'saliency' in get_sampler(oracle).keywords
                for n in budgets:
                    # No nearest neighbours: their labels would have to be searched with.
                    add_each(
                        f'oracle {oracle}', n,
                        partial(_searched, init=oracle, n_tokens=n, read_maps=read_maps, amp=amp), stochastic,
                        saliency=saliency if maps else '', knn='')
        elif isinstance(model, DhtVisionTransformer):
            for n in budgets:
                add(REGIONS, n, _merged(model, n), False)
            continue
        else:
            n_patches = model.patch_embed.num_patches if isinstance(model, VisionTransformer) else None
            add_each(AS_IT_IS, n_patches, _as_it_is, False)
        if not isinstance(model, VisionTransformer):
            continue
        for baseline in baselines:
            low_res = LowRes(model)
            for n in budgets:
                if baseline == 'patch-drop':
                    add(baseline, n, _dropped(model, n), True)
                elif baseline == 'low-res':
                    shrunk_grid(size, n)
                    add(baseline, n, _shrunk(low_res, n), False)
                else:
                    add(baseline, n, _top_k(model, n), False)
    return cells


def _placed(model: nn.Module, sampler: str, n_tokens: int, read_maps: Callable) -> Tokens:
    def tokens(images: torch.Tensor, _: torch.Tensor, index: torch.Tensor, files: Sequence[str], seed: int
               ) -> torch.Tensor:
        maps = read_maps(images, files) if 'saliency' in get_sampler(sampler).keywords else None
        return model.forward_features(images, draw_placements(model, images, sampler, n_tokens, maps, index, seed))

    return tokens


def _searched(model: nn.Module, init: str, n_tokens: int, read_maps: Callable, amp: Optional[str]) -> Tokens:
    def tokens(images: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, files: Sequence[str], seed: int
               ) -> torch.Tensor:
        maps = read_maps(images, files) if 'saliency' in get_sampler(init).keywords else None
        start = draw_placements(model, images, init, n_tokens, maps, index, seed)
        found = optimize_positions(
            model, images, labels, init=start, record=False, amp_dtype=getattr(torch, amp) if amp else None)
        return model.forward_features(images, found.positions)

    return tokens


def _merged(model: nn.Module, n_tokens: int) -> Tokens:
    def tokens(images: torch.Tensor, *_: Any) -> TokenFeatures:
        model.patch_embed.set_budget(n_tokens)
        return model.forward_features(images)

    return tokens


def _as_it_is(model: nn.Module) -> Tokens:
    return lambda images, labels, index, files, seed: model.forward_features(images)


def _pruned(tokens: Tokens, pruning: prunings.Pruning) -> Tokens:
    def pruned(images: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, files: Sequence[str], seed: int
               ) -> torch.Tensor:
        pruning.apply(seed)
        return tokens(images, labels, index, files, seed)

    return pruned


def _dropped(model: nn.Module, n_tokens: int) -> Tokens:
    def tokens(images: torch.Tensor, _: torch.Tensor, index: torch.Tensor, files: Sequence[str], seed: int
               ) -> torch.Tensor:
        height, width = model.patch_embed.patch_size
        n_patches = (images.shape[-2] // height) * (images.shape[-1] // width)
        kept = [random_patches(n_patches, n_tokens, image_generator(seed, i)) for i in index.tolist()]
        return patch_drop(model, images, torch.stack(kept))

    return tokens


def _shrunk(low_res: LowRes, n_tokens: int) -> Tokens:
    return lambda images, labels, index, files, seed: low_res(images, n_tokens)


def _top_k(model: nn.Module, n_tokens: int) -> Tokens:
    return lambda images, labels, index, files, seed: top_k(model, images, n_tokens)


def evaluate(
        cells: Sequence[Cell],
        pictures: Pictures,
        out: Path,
        processes: Processes,
        knn: Optional[Knn] = None,
        amp: Optional[str] = None,
        batch_size: int = 64,
        workers: int = 0,
        skip_broken: bool = False,
        progress: Callable[[int], Any] = lambda count: None,
) -> List[str]:
    """Compute the rows that `out` lacks, and append each to its `results.csv` and `speed.csv`.

    Args:
        cells: See `list_cells`.
        pictures: The data set.
        out: Folder.
        processes: Of this run; each computes a share of the batches, the main one writes.
        knn: With the training pictures, for the rows that have neighbours.
        amp: 'bfloat16' or 'float16', for autocast.
        batch_size: Images in a forward pass.
        workers: Processes that decode pictures.
        skip_broken: Leave out pictures that cannot be read.
        progress: Called with the number of images whenever some are done, see `count_work`.

    Returns:
        What is wrong with the pictures left out.
    """
    missing = missing_cells(cells, out)
    folder = out / 'decoded'
    broken: List[str] = []
    for model in {id(cell.model): cell.model for cell in missing}.values():
        model.to(processes.device)
        batches = Decoded(pictures, model, folder, batch_size, processes, skip_broken, workers)
        batches.decode(progress)
        broken += batches.broken
        bank = None
        if knn is not None:
            bank = Decoded(knn.train, model, folder, batch_size, processes, skip_broken, workers)
            bank.decode(progress)
            broken += bank.broken
        for cell in missing:
            if cell.model is not model:
                continue
            row, seconds = _compute(cell, batches, bank if cell.key['knn'] else None, knn, processes, amp, progress)
            rate = int(row['images']) * len(cell.seeds) / max(processes.gather([seconds]))
            if processes.is_main:
                # The result comes last: whoever has it has the speed as well.
                _append(out / SPEED, SPEED_COLUMNS, {**cell.key, 'images_per_s': f'{rate:.1f}'})
                _append(out / RESULTS, COLUMNS, row)
    processes.gather([None])  # no process may still read
    if missing and processes.is_main:
        shutil.rmtree(folder)
    return list(dict.fromkeys(broken))


def count_work(cells: Sequence[Cell], pictures: Pictures, knn: Optional[Knn]) -> int:
    """Images that `evaluate` will report as done over all its passes; 0 for a stream, whose length none knows."""
    if pictures.is_stream or (knn is not None and knn.train.is_stream):
        return 0
    models = len({id(cell.model) for cell in cells})  # decoding counts once for each
    bank = len(knn.train) if knn is not None else 0
    passes = sum(len(cell.seeds) * (len(pictures) + (bank if cell.key['knn'] else 0)) for cell in cells)
    return models * (len(pictures) + bank) + passes


def missing_cells(cells: Sequence[Cell], out: Path) -> List[Cell]:
    """Those whose rows `out` has not yet."""
    rows = read_rows(out / RESULTS)
    if rows and tuple(rows[0]) != COLUMNS:
        raise ValueError(f'{out / RESULTS} has other columns, it is of another version: give another folder.')
    done = {_identity(row) for row in rows}
    return [cell for cell in cells if _identity(cell.key) not in done]


def read_rows(path: Path) -> List[Row]:
    """Rows of a CSV that `evaluate` appends to; a last line that a kill left unfinished is cut off the file."""
    if not path.exists():
        return []
    text = path.read_text(encoding='utf-8')
    whole = text[:text.rfind('\n') + 1]
    if whole != text:
        path.write_text(whole, encoding='utf-8')
    return list(csv.DictReader(io.StringIO(whole)))


def read_results(out: Path) -> List[Row]:
    """All rows in a folder, with their speeds."""
    speeds = {_identity(row): row['images_per_s'] for row in read_rows(out / SPEED)}
    return [dict(row, images_per_s=speeds[_identity(row)]) for row in read_rows(out / RESULTS)]


def _identity(row: Row) -> Tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def _append(path: Path, columns: Sequence[str], row: Row) -> None:
    """Append a row in one write, on the disk when this returns."""
    line = io.StringIO()
    writer = csv.DictWriter(line, columns, lineterminator='\n')
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerow(row)
    with path.open('a', encoding='utf-8') as file:
        file.write(line.getvalue())
        file.flush()
        os.fsync(file.fileno())


def _compute(
        cell: Cell,
        batches: Decoded,
        bank: Optional[Decoded],
        knn: Optional[Knn],
        processes: Processes,
        amp: Optional[str],
        progress: Callable[[int], Any],
) -> Tuple[Row, float]:
    """A row, and the seconds that this process took from pixels to logits."""
    seconds = 0.
    flops = 0
    scores: Dict[str, List[torch.Tensor]] = {}
    for seed in cell.seeds:
        neighbours = _read_bank(cell, bank, seed, processes, amp, progress) if bank is not None else None
        own = []
        for batch in batches:
            _synchronize(processes.device)
            begin = time.perf_counter()
            logits, features = _run(cell, batches, batch, seed, processes.device, amp)
            _synchronize(processes.device)
            seconds += time.perf_counter() - begin
            labels = batch.labels.to(logits.device)
            found = dict(index=batch.index)
            if cell.model.num_classes:
                found.update(score_logits(logits, labels))
            if neighbours is not None:
                voted = knn_predict(
                    to_bank(features), *neighbours, int(neighbours[1].max()) + 1, knn.k, knn.temperature)
                found['knn_top1'] = (voted == labels).double()
            own.append({name: value.cpu() for name, value in found.items()})
            if not flops:
                one = Batch(*(tensor[:1] for tensor in batch))
                flops = count_flops(_run, cell, batches, one, seed, processes.device, amp)
            progress(len(batch.index))
        own = processes.gather(own)
        joined = {name: torch.cat([found[name] for found in own]) for name in own[0]}
        order = joined.pop('index').argsort()
        for name, values in joined.items():
            scores.setdefault(name, []).append(values[order])
    stacked = {name: torch.stack(values) for name, values in scores.items()}  # S B
    count = len(order)
    groups = batches.pictures.groups
    estimates = {name: estimate_mean(stacked[name], groups) for name in _METRICS if name in stacked}
    if 'top1' in stacked:
        estimates['ece'] = estimate_calibration(stacked['confidence'], stacked['top1'], groups)
    row = {**cell.key, 'images': str(count), 'skipped': str(len(batches.broken)), 'gflops': f'{flops / 1e9:.4f}'}
    for name, estimate in estimates.items():
        scale = 100 if name in _PERCENT else 1
        for suffix, value in zip(('', '_se', '_se_seeds'), estimate):
            row[name + suffix] = '' if value is None else f'{scale * value:.4f}'
    return row, seconds


def _run(
        cell: Cell,
        data: Decoded,
        batch: Batch,
        seed: int,
        device: torch.device,
        amp: Optional[str],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, num_classes) and pooled features (B, D) in front of the classifier, float32."""
    images, labels = data.normalize(batch.pixels.to(device)), batch.labels.to(device)
    files = [data.pictures.name(i) for i in batch.index.tolist()]
    autocast = torch.autocast(device.type, getattr(torch, amp)) if amp else contextlib.nullcontext()
    with torch.inference_mode(), autocast:
        tokens = cell.tokens(images, labels, batch.index, files, seed)
        logits = cell.model.forward_head(tokens)
        features = cell.model.forward_head(tokens, pre_logits=True)
    return logits.float(), features.float()


def _read_bank(
        cell: Cell,
        bank: Decoded,
        seed: int,
        processes: Processes,
        amp: Optional[str],
        progress: Callable[[int], Any],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Features (M, D) of the training pictures in half precision, and their labels (M,), in the order of the data."""
    own = []
    for batch in bank:
        features = _run(cell, bank, batch, seed, processes.device, amp)[1]
        own.append((batch.index, batch.labels, to_bank(features).cpu()))
        progress(len(batch.index))
    index, labels, features = (torch.cat(parts) for parts in zip(*processes.gather(own)))
    order = index.argsort()
    return features[order].to(processes.device), labels[order].to(processes.device)


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
