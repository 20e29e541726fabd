"""How the benchmarks measure: calls timed in turn, medians, ratios, peak memory in a process of its own."""
from __future__ import annotations

import multiprocessing
import platform
import random
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Set, Tuple

import timm
import torch


@dataclass
class Config:
    """What all sections share."""

    threads: int = 2
    seconds: float = 10.  # for one comparison, at least six rounds
    quick: bool = False  # two blocks instead of twelve, to see that everything runs
    device: str = 'cpu'
    tome: str = ''  # folder of a clone of facebookresearch/ToMe
    pictures: Tuple[str, ...] = ()  # folders, for vectorize

    @property
    def model_args(self) -> Dict[str, Any]:
        return dict(depth=2) if self.quick else {}


@dataclass
class Section:
    """Results of one section: tables (title, header, rows), judged ratios, remarks."""

    tables: List[Tuple[str, List[str], List[List[str]]]] = field(default_factory=list)
    judged: List[Tuple[str, str, str, str]] = field(default_factory=list)
    remarks: List[str] = field(default_factory=list)
    curves: Dict[str, Dict[str, List[float]]] = field(default_factory=dict)

    def table(self, title: str, *header: str) -> List[List[str]]:
        rows: List[List[str]] = []
        self.tables.append((title, list(header), rows))
        return rows

    def judge(self, what: str, measured: float, at_least: float = 0., at_most: float = 0., unit: str = '') -> None:
        """Put a measured ratio beside its bar."""
        held = measured >= at_least if at_least else measured <= at_most
        bar = f'at least {at_least:g}{unit}' if at_least else f'at most {at_most:g}{unit}'
        self.judged.append((what, bar, f'{measured:.2f}{unit}', 'held' if held else 'missed'))


def alternate(calls: Dict[str, Callable[[], Any]], config: Config, rounds: int = 300) -> Dict[str, float]:
    """Median seconds of each call.

    They are called in turn, so that other load on the machine meets them alike, in another order each round: what ran
    before leaves caches and the heap in a state that can cost the next call several percent. The first round warms up;
    then at least six rounds, and more until `rounds` or the time of the config is reached.
    """
    times: Dict[str, List[float]] = {name: [] for name in calls}
    order = random.Random(0)
    begin = time.perf_counter()
    for done in range(rounds + 1):
        for name in order.sample(list(calls), len(calls)):
            start = now(config.device)
            calls[name]()
            if done:
                times[name].append(now(config.device) - start)
        if done >= 6 and time.perf_counter() - begin > config.seconds:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def now(device: str) -> float:
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str) -> float:
    """Peak memory in MB since `reset_peak`."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 20
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s+(\d+) kB', status).group(1)) / 1024


def reset_peak(device: str) -> float:
    """Start the peak anew from the memory in use now, and return that."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    else:
        Path('/proc/self/clear_refs').write_text('5')  # Linux only
    return peak(device)


def in_child(function: Callable[..., float], *args: Any) -> float:
    """Result of `function(*args)`, run in a fresh process."""
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(function, args)


def cpu_flags() -> Set[str]:
    """Features of the CPU, as Linux lists them."""
    return set(Path('/proc/cpuinfo').read_text().split())


def machine(config: Config) -> str:
    """Device, threads and versions, for the head of a table."""
    if config.device == 'cuda':
        device = torch.cuda.get_device_name()
    else:
        names = re.findall(r'model name\s*:\s*(.+)', Path('/proc/cpuinfo').read_text())
        features = [f for f in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if f in cpu_flags()]
        device = f"{names[0] if names else platform.processor()} ({', '.join(features)})"
    return (
        f'{device}, {config.threads} threads, torch {torch.__version__}, timm {timm.__version__}'
        + (', QUICK RUN: models of 2 blocks' if config.quick else ''))


def milliseconds(seconds: float) -> str:
    return f'{1e3 * seconds:.1f}'
