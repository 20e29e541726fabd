"""What an evaluation is asked for."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Tuple

from ..pictures.datasets import Pictures


@dataclass(frozen=True)
class Knn:
    """Nearest-neighbour classification, see `knn_predict`."""

    train: Pictures
    k: int = 20
    temperature: float = 0.07

    @property
    def key(self) -> str:
        return f'{self.train.source} {self.train.digest()} k={self.k} T={self.temperature}'


@dataclass(frozen=True)
class Request:
    """Which rows an evaluation shall have of its models.

    Attributes:
        samplers: Spatial priors that place tokens.
        budgets: Numbers of tokens.
        oracle: Sampler from which a search starts, for rows of an oracle.
        baselines: Other ways to spend fewer tokens, see `BASELINES`.
        seeds: For what is drawn.
        saliency: Maps for salient samplers, see `saliency_source`.
        scorers: What tokens are dropped by.
        keep_rates: Shares that each stage keeps.
        flops: Shares of the dense model's multiply-adds, whose keep rates or numbers to merge are found.
        coverages: Of windows, each a row of its own; none for those of the models.
        knn: Nearest neighbours to ask as well.
        amp: 'bfloat16' or 'float16', for autocast.
        split: Part of the data set.
    """

    samplers: Tuple[str, ...] = ()
    budgets: Tuple[int, ...] = ()
    oracle: Optional[str] = None
    baselines: Tuple[str, ...] = ()
    seeds: Tuple[int, ...] = (0,)
    saliency: str = 'spectral'
    scorers: Tuple[str, ...] = ()
    keep_rates: Tuple[float, ...] = ()
    flops: Tuple[float, ...] = ()
    coverages: Tuple[float, ...] = ()
    knn: Optional[Knn] = None
    amp: Optional[str] = None
    split: str = 'validation'
