"""Paired comparisons, the lines of a study: difference, interval, p corrected for their number, table and figure."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Dict, List, NamedTuple, Sequence

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PERMUTATIONS = 10_000
_Z = 1.96
_LEVEL = 0.05


class Comparison(NamedTuple):
    """One line of a study: what differs, at which budget, by how much.

    Attributes:
        model: Name of the model.
        what: 'A - B'.
        n_tokens: Budget.
        difference: Mean of A - B, in percentage points.
        interval: Half the width of its 95 % confidence interval.
        p: Of the permutation test.
    """

    model: str
    what: str
    n_tokens: int
    difference: float
    interval: float
    p: float

    @property
    def finding(self) -> str:
        """'A', 'B' or 'neither': whose mean is larger beyond the interval."""
        return 'neither' if abs(self.difference) <= self.interval else self.larger

    @property
    def larger(self) -> str:
        """'A' or 'B': whose mean is larger at all."""
        return self.what.split(' - ')[self.difference < 0]


def compare(
        model: str,
        what: str,
        n_tokens: int,
        scores: Dict[str, torch.Tensor],
) -> Comparison:
    """Compare two conditions on the same pictures.

    Args:
        model: Name of the model.
        what: 'A - B', names in `scores`.
        n_tokens: Budget.
        scores: (B,) each, in [0, 1].
    """
    a, b = what.split(' - ')
    differences = scores[a].double() - scores[b].double()
    interval = _Z * (differences.std() / math.sqrt(len(differences))).item()
    difference = 100 * differences.mean().item()
    return Comparison(model, what, n_tokens, difference, 100 * interval, permutation_test(differences))


def saliency_percentiles(maps: torch.Tensor) -> torch.Tensor:
    """For each pixel of maps (B, H, W) the percentage of its map's pixels that are less salient; ties count half."""
    B, H, W = maps.shape
    flat = maps.flatten(1)
    ordered = flat.sort(dim=1).values.contiguous()
    below = torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True)
    return (50. * below / (H * W)).view(B, H, W)


def permutation_test(differences: torch.Tensor) -> float:
    """Two-sided p that paired differences (B,) have mean zero: their signs are drawn anew 10,000 times."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (_PERMUTATIONS, len(differences)), generator=generator, dtype=torch.int8)
    means = (2. * signs.double() - 1) @ differences.double() / len(differences)
    # The observed signs are one of the permutations, so p is never 0.
    extreme = (means.abs() >= differences.double().mean().abs() - 1e-12).sum().item()
    return (extreme + 1) / (_PERMUTATIONS + 1)


def correct_for_number(p: Sequence[float]) -> List[float]:
    """p of several tests, raised so that all those below a level are wrong together with that probability at most.

    Holm 1979, `A Simple Sequentially Rejective Multiple Test Procedure`: the smallest of n times n, the next times
    n - 1, ..., none below the one before it.

    >>> correct_for_number([0.25, 0.125, 0.5])
    [0.5, 0.375, 0.5]
    """
    corrected, least = [0.] * len(p), 0.
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1., (len(p) - rank) * p[i]))
        corrected[i] = least
    return corrected


def format_study(found: Sequence[Comparison]) -> str:
    """A table in Markdown: what is larger by itself, and what still is as one of so many comparisons."""
    lines = [f'| model | difference | tokens | points, 95 % interval | p | larger | as one of {len(found)} |',
             '|---' * 7 + '|']
    for c, p in zip(found, correct_for_number([c.p for c in found])):
        model = c.model.replace('|', '\\|')
        lines.append(f'| {model} | {c.what} | {c.n_tokens} | {c.difference:+.1f} ± {c.interval:.1f} | {c.p:.4f} '
                     f"| {c.finding} | {c.larger if p < _LEVEL else 'neither'} |")
    return '\n'.join(lines)


def draw_study(found: Sequence[Comparison]) -> Figure:
    """Differences by budget with their intervals, a panel for each kind of difference."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(c.what for c in found))
    models = list(dict.fromkeys(c.model for c in found))
    columns = min(2, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows + 0.4), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for ax, what in zip(axes.flat, kinds):
        for i, model in enumerate(models):
            own = [c for c in found if (c.what, c.model) == (what, model)]
            at = [j + 0.12 * (i - (len(models) - 1) / 2) for j in range(len(own))]
            ax.errorbar(at, [c.difference for c in own], [c.interval for c in own], label=model, capsize=3,
                        marker='os^D'[i % 4], linestyle='', color=('#0072b2', '#e69f00', '#009e73', '#cc79a7')[i % 4])
            ax.set_xticks(range(len(own)), [str(c.n_tokens) for c in own])
        ax.axhline(0, color='#808080', linewidth=1)
        ax.set_title(what, fontsize='medium', parse_math=False)
        ax.set_xlabel('tokens')
    axes[0, 0].set_ylabel('points')
    legend = figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=2, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ is a letter
    return figure
