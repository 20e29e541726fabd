"""A picture's regions at any level of detail: zones of one colour, merged by Ward's criterion, as a dendrogram."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .borders import OUTSIDE
from .graph import connected_components, number_groups, sum_groups, unique_edges
from .ward import Merges, merged_groups, ward_merges

_ROUNDING = 3 / 12  # squared error of three channels from rounding to 8 bits


class Dendrogram(NamedTuple):
    """Zones of a picture, and the merges that lead to one region, or to one for each part that hangs together."""
    zones: torch.Tensor  # (M,) of each pixel that is drawn
    drawn: np.ndarray  # (H, W), M of them True
    n_zones: int
    merges: Merges

    @property
    def fewest(self) -> int:
        """Regions after all merges."""
        return self.n_zones - len(self.merges.costs)

    def cut(self, n_regions: int) -> np.ndarray:
        """Labels (H, W) of so many regions, as near as there are: `fewest` to `n_zones`; `OUTSIDE` where none is."""
        n_merges = min(max(self.n_zones - n_regions, 0), len(self.merges.costs))
        group, _ = merged_groups(self.n_zones, self.merges.pairs[:, :n_merges])
        labels = np.full(self.drawn.shape, OUTSIDE)
        labels[self.drawn] = group[self.zones].numpy()
        return labels

    def regions_above(self, cost: float) -> int:
        """How many regions are left if only those merge that add at most `cost` to the squared error."""
        return self.fewest + int((self.merges.costs > cost).sum())


def flat_zones(pixels: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Numbers (H, W) of the zones of equal colour in (H, W, 3) pixels; `OUTSIDE` where nothing is drawn."""
    labels = np.full(drawn.shape, OUTSIDE)
    labels[drawn] = _equal_neighbours(_colors(pixels, drawn), _pixel_edges(drawn))
    return labels


def build_dendrogram(pixels: np.ndarray, drawn: np.ndarray | None = None, at_least: int = 1) -> Dendrogram:
    """Zones of equal colour and how they merge.

    Args:
        pixels: (H, W, 3), uint8.
        drawn: (H, W) bool, which pixels belong to regions; all by default.
        at_least: Where the zones are fewer, each pixel is one.

    Example:
        >>> tree = build_dendrogram(np.array([[[0] * 3, [0] * 3, [90] * 3, [99] * 3]], dtype=np.uint8))
        >>> tree.n_zones, tree.cut(2).tolist()
        (3, [[0, 0, 1, 1]])
    """
    drawn = np.ones(pixels.shape[:2], dtype=bool) if drawn is None else drawn
    colors, edges = _colors(pixels, drawn), _pixel_edges(drawn)
    zones = _equal_neighbours(colors, edges)
    n = int(zones.max()) + 1 if len(zones) else 0
    if n < at_least:
        zones, n = torch.arange(colors.shape[1]), colors.shape[1]
    merges = ward_merges(
        sum_groups(colors, zones, n), torch.bincount(zones, minlength=n), torch.zeros(n, dtype=torch.long),
        unique_edges(zones[edges]), 1, _ROUNDING)
    return Dendrogram(zones, drawn, n, merges)


def _colors(pixels: np.ndarray, drawn: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels[drawn].T.astype(np.float64))


def _equal_neighbours(colors: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    equal = (colors[:, edges[0]] == colors[:, edges[1]]).all(0)
    return number_groups(connected_components(colors.shape[1], edges[:, equal]))[0]


def _pixel_edges(drawn: np.ndarray) -> torch.Tensor:
    """Edges (2, E) between 4-neighbours, of pixels numbered among those that are drawn."""
    number = np.cumsum(drawn).reshape(drawn.shape) - 1
    right, down = drawn[:, 1:] & drawn[:, :-1], drawn[1:] & drawn[:-1]
    return torch.from_numpy(np.stack([
        np.concatenate([number[:, :-1][right], number[:-1][down]]),
        np.concatenate([number[:, 1:][right], number[1:][down]])]))
