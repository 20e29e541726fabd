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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import nn

from ..kept import lock_output, remove_leftovers
from ..pictures.datasets import Pictures
from ..pictures.decoded import Batch, Decoded
from ..processes import Processes
from .flops import count_flops
from .knn import knn_predict, to_bank
from .metrics import Estimate, estimate_calibration, estimate_mean, score_logits
from .plan import PlannedRow
from .request import Knn
from .results import RESULTS, append_result, read_results, repair_files
from .rows import METRICS, Result
from .ways import ImageBatch

_PERCENT = ('top1', 'top5', 'ece', 'knn_top1')


@dataclass(frozen=True)
class Run:
    """How rows are computed; nothing of it determines what comes out, but `knn` and `amp`, which rows say themselves.

    Attributes:
        out: Folder.
        processes: Of this run; each computes a share of the batches, the main one writes.
        knn: With the training pictures, for the rows that have neighbours.
        amp: 'bfloat16' or 'float16', for autocast.
        batch_size: Images in a forward pass.
        workers: Processes that decode pictures.
        skip_broken: Leave out pictures that cannot be read.
        progress: Called with the number of images whenever some are done, see `count_work`, and what with.
    """

    out: Path
    processes: Processes
    knn: Optional[Knn] = None
    amp: Optional[str] = None
    batch_size: int = 64
    workers: int = 0
    skip_broken: bool = False
    progress: Callable[[int, str], Any] = lambda count, what: None

    @property
    def decoded(self) -> Path:
        return self.out / 'decoded'


@contextlib.contextmanager
def open_folder(out: Path, processes: Processes) -> Iterator[List[str]]:
    """Make the folder of an evaluation, or take it over from an earlier run, and keep other runs out of it.

    Files are repaired, and what killed runs left goes when the block ends without an error.

    Yields:
        What was repaired.

    Raises:
        BlockingIOError: Another run writes there; says which.
        ValueError: It holds results with other columns.
    """
    with contextlib.ExitStack() as stack:
        error, repaired = None, []
        if processes.is_main:
            try:
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_output(out / RESULTS))
                remove_leftovers(out)
                repaired = repair_files(out)
            except (OSError, ValueError) as e:
                error = e
        errors = [e for e in processes.gather([error]) if e is not None]  # all stop where the main one has to
        if errors:
            raise errors[0]
        yield repaired
        processes.gather([None])  # no process may still read
        if processes.is_main:
            shutil.rmtree(out / 'decoded', ignore_errors=True)


def evaluate(missing: Sequence[PlannedRow], pictures: Pictures, run: Run) -> List[str]:
    """Compute rows, and append each to `results.csv` and `speed.csv` in the folder of a run, see `open_folder`.

    Returns:
        What is wrong with the pictures left out.

    Raises:
        ValueError: A picture that cannot be read, or none that can.
    """
    broken: List[str] = []
    for model in {id(planned.model): planned.model for planned in missing}.values():
        model.to(run.processes.device)
        batches, bank = (
            None if source is None else _decode(source, model, run)
            for source in (pictures, run.knn.train if run.knn else None))
        broken += batches.broken + (bank.broken if bank else [])
        for planned in missing:
            if planned.model is not model:
                continue
            result = _measure(planned, batches, bank if planned.row.knn else None, run)
            if run.processes.is_main:
                append_result(run.out, result)
    return list(dict.fromkeys(broken))


def count_work(missing: Sequence[PlannedRow], pictures: Pictures, knn: Optional[Knn]) -> int:
    """Images that `evaluate` will report as done over all its passes; 0 for a stream, whose length none knows."""
    if pictures.is_stream or (knn is not None and knn.train.is_stream):
        return 0
    models = len({id(planned.model) for planned in missing})  # decoding counts once for each
    bank = len(knn.train) if knn is not None else 0
    passes = sum(len(p.seeds) * (len(pictures) + (bank if p.row.knn else 0)) for p in missing)
    return models * (len(pictures) + bank) + passes


def missing_rows(planned: Sequence[PlannedRow], out: Path) -> List[PlannedRow]:
    """Those that `out` has not yet. A row of version 0.1, which does not say its `settings`, counts for any."""
    done = {result.row for result in read_results(out)[0]}
    return [p for p in planned if p.row not in done and replace(p.row, settings='') not in done]


def _decode(pictures: Pictures, model: nn.Module, run: Run) -> Decoded:
    decoded = Decoded(
        pictures, model, run.decoded, run.batch_size, run.processes, run.skip_broken, run.workers)
    decoded.decode(lambda count: run.progress(count, f'decoding {pictures.source}'))
    return decoded


def _measure(planned: PlannedRow, batches: Decoded, bank: Optional[Decoded], run: Run) -> Result:
    """All passes over the pictures, one for each seed, and what they say."""
    scores: Dict[str, List[torch.Tensor]] = {}
    seconds = 0.
    for seed in planned.seeds:
        neighbours = _read_bank(planned, bank, seed, run) if bank is not None else None
        found, took = _pass(planned, batches, seed, neighbours, run)
        seconds += took
        for name, values in found.items():
            scores.setdefault(name, []).append(values)
    stacked = {name: torch.stack(values) for name, values in scores.items()}  # S B
    count = next(iter(stacked.values())).shape[1]
    return Result(
        planned.row, count, len(batches.broken), _count_flops(planned, batches, run) / 1e9,
        _estimate(stacked, batches.pictures.groups), count * len(planned.seeds) / max(run.processes.gather([seconds])))


def _pass(
        planned: PlannedRow,
        batches: Decoded,
        seed: int,
        neighbours: Optional[Tuple[torch.Tensor, torch.Tensor]],
        run: Run,
) -> Tuple[Dict[str, torch.Tensor], float]:
    """Scores (B,) of all pictures, in their order, and the seconds that this process took from pixels to logits."""
    model, device, seconds = planned.model_at(seed), run.processes.device, 0.
    own = []
    for batch in batches:
        batch = Batch(*(tensor.to(device) for tensor in batch))
        _synchronize(device)
        begin = time.perf_counter()
        with _inference(run):
            tokens = planned.tokens(model, _to_images(batch, batches, seed))
            logits = model.forward_head(tokens)
        _synchronize(device)
        seconds += time.perf_counter() - begin
        scores = score_logits(logits.float(), batch.labels) if model.num_classes else {}
        if neighbours is not None:
            features = _pool(model, tokens, run)
            voted = knn_predict(
                to_bank(features), *neighbours, int(neighbours[1].max()) + 1, run.knn.k, run.knn.temperature)
            scores['knn_top1'] = (voted == batch.labels).double()
        own.append({name: value.cpu() for name, value in dict(scores, index=batch.index).items()})
        run.progress(len(batch.index), planned.row.title)
    joined = _join(run.processes.gather(own), batches)
    order = joined.pop('index').argsort()
    return {name: values[order] for name, values in joined.items()}, seconds


def _read_bank(planned: PlannedRow, bank: Decoded, seed: int, run: Run) -> Tuple[torch.Tensor, torch.Tensor]:
    """Features (M, D) of the training pictures in half precision, and their labels (M,), in the order of the data."""
    model, device = planned.model_at(seed), run.processes.device
    own = []
    for batch in bank:
        batch = Batch(*(tensor.to(device) for tensor in batch))
        with _inference(run):
            tokens = planned.tokens(model, _to_images(batch, bank, seed))
        features = to_bank(_pool(model, tokens, run)).cpu()
        own.append(dict(index=batch.index.cpu(), labels=batch.labels.cpu(), features=features))
        run.progress(len(batch.index), planned.row.title)
    joined = _join(run.processes.gather(own), bank)
    order = joined['index'].argsort()
    return joined['features'][order].to(device), joined['labels'][order].to(device)


def _count_flops(planned: PlannedRow, batches: Decoded, run: Run) -> int:
    """Floating-point operations of one image from pixels to logits, of the main process; 0 in the others."""
    if not run.processes.is_main:
        return 0
    if planned.way.flops is not None:
        return planned.way.flops
    seed, first = planned.seeds[0], next(iter(batches), None)
    if first is None:
        raise ValueError(f'no picture among the first of {batches.pictures.source} can be read.')
    model = planned.model_at(seed)
    one = Batch(*(tensor[:1].to(run.processes.device) for tensor in first))

    def forward() -> None:
        with _inference(run):
            model.forward_head(planned.tokens(model, _to_images(one, batches, seed)))

    return count_flops(forward)


def _estimate(stacked: Dict[str, torch.Tensor], groups: Optional[torch.Tensor]) -> Dict[str, Estimate]:
    """What the scores (S, B) of each image say, in percent where that is usual."""
    estimates = {name: estimate_mean(stacked[name], groups) for name in METRICS if name in stacked}
    if 'top1' in stacked:
        estimates['ece'] = estimate_calibration(stacked['confidence'], stacked['top1'], groups)
    return {
        name: Estimate(*(None if value is None else (100 * value if name in _PERCENT else value) for value in estimate))
        for name, estimate in estimates.items()}


def _to_images(batch: Batch, data: Decoded, seed: int) -> ImageBatch:
    index = batch.index.cpu()
    files = [data.pictures.name(i) for i in index.tolist()]
    return ImageBatch(data.normalize(batch.pixels), batch.labels, index, files, seed)


def _pool(model: nn.Module, tokens: Any, run: Run) -> torch.Tensor:
    """Features (B, D) in front of the classifier, float32."""
    with _inference(run):
        return model.forward_head(tokens, pre_logits=True).float()


@contextlib.contextmanager
def _inference(run: Run) -> Iterator[None]:
    device = run.processes.device
    autocast = torch.autocast(device.type, getattr(torch, run.amp)) if run.amp else contextlib.nullcontext()
    with torch.inference_mode(), autocast:
        yield


def _join(parts: Sequence[Dict[str, torch.Tensor]], data: Decoded) -> Dict[str, torch.Tensor]:
    if not parts:
        raise ValueError(f'no picture of {data.pictures.source} can be read.')
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
