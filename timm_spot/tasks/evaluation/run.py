"""The paper's tables: accuracy of models by placement and budget, on any data set.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

A row is one model at one placement and budget, and one scorer and keep rate where its tokens are dropped. Rows are
written to `results.csv` one by one, under a key of everything that determines them, so that a run goes on where an
earlier one ended; `speed.csv`, of the same keys, holds what no two runs measure alike.
"""
from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from ..pictures.datasets import Pictures
from ..pictures.decoded import Batch, Decoded
from ..processes import Processes
from .flops import count_flops
from .knn import knn_predict, to_bank
from .metrics import estimate_calibration, estimate_mean, score_logits
from .results import COLUMNS, METRICS, RESULTS, SPEED, SPEED_COLUMNS, Row, append_row, identity, read_rows
from .rows import Cell, Knn

_PERCENT = ('top1', 'top5', 'ece', 'knn_top1')


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
                append_row(out / SPEED, SPEED_COLUMNS, {**cell.key, 'images_per_s': f'{rate:.1f}'})
                append_row(out / RESULTS, COLUMNS, row)
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
    done = {identity(row) for row in rows}
    return [cell for cell in cells if identity(cell.key) not in done]


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
    estimates = {name: estimate_mean(stacked[name], groups) for name in METRICS if name in stacked}
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
