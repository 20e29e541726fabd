"""What a placer is told: sampler, budget, coverage, seed and saliency.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..ops.saliency import energy, spectral_residual
from ..ops.samplers import check_budgets, check_seed, get_sampler, split_sampler
from ..ops.sizes import check_coverage, check_n_coarse

Saliency = str | torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
# A saved model can keep a name, not a function.
SALIENCY_NAMES = {'spectral_residual': spectral_residual, 'energy': energy}
ImageSize = tuple[int, int]


def compute_saliency(saliency: Saliency | None, images: torch.Tensor) -> torch.Tensor | None:
    """Maps of images that a `saliency` keyword stands for: by name, by function, or as they are."""
    if isinstance(saliency, str):
        saliency = SALIENCY_NAMES[saliency]
    return saliency(images) if callable(saliency) else saliency


@dataclass(frozen=True)
class Prior:
    """What a placer needs to know besides the images.

    Attributes:
        sampler: Spatial prior, see `timm_spot.list_samplers`.
        n_tokens: Budget; None for the count of whole patches in each image, (low, high) for one drawn for each
            training batch, log-uniformly: small budgets are as common as large ones.
        seed: Of the placement that a model in eval mode gives every image, and of the random budgets.
        saliency: 'spectral_residual', 'energy', a function from images to maps, or a map (H, W) or (B, H, W), for
            samplers that need one.
        window: Side of a window in pixels.
        coverage: How much of its cell a window covers, from 0 (one pixel a sample) to 1 (windows tile the picture), see
            `timm_spot.ops.sizes`; (low, high) draws one for each training batch, evenly.
        n_coarse: Coarse tokens of sampler 'coarse+NAME'; by default the largest square up to two thirds.

    Raises:
        TypeError: A budget that is no whole number, a coverage that is no number, a saliency that is nothing of the
            above.
        ValueError: An unknown sampler or saliency, a sampler without the saliency it needs, a budget below 1, a
            coverage outside of [0, 1] or a range out of order, a seed out of range.
    """

    sampler: str = 'isotropic'
    n_tokens: int | tuple[int, int] | None = None
    seed: int = 0
    saliency: Saliency | None = None
    window: int = 16
    coverage: float | tuple[float, float] = 0.
    n_coarse: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.n_tokens, (list, tuple)):
            object.__setattr__(self, 'n_tokens', check_budgets(self.n_tokens))
        elif self.n_tokens is not None:
            check_budgets(self.n_tokens)
        check_coverage(self.coverage)
        if self.n_coarse is not None:
            check_n_coarse(self.n_coarse, self.n_coarse)
        check_seed(self.seed)
        saliency = self.saliency
        if isinstance(saliency, str) and saliency not in SALIENCY_NAMES:
            raise ValueError(f"saliency={saliency!r} is unknown, the names are {', '.join(SALIENCY_NAMES)}.")
        if not (saliency is None or callable(saliency) or isinstance(saliency, (str, torch.Tensor))):
            raise TypeError(
                "saliency must be 'spectral_residual', 'energy', a function from images to maps or a map of shape "
                f'(B, H, W), got {saliency!r}.')
        if self.needs_saliency and saliency is None:
            raise ValueError(
                f"sampler={self.sampler!r} needs a saliency map: pass saliency='spectral_residual' or 'energy', a "
                'function from images to maps, or a map of shape (B, H, W).')

    @property
    def needs_saliency(self) -> bool:
        """Whether the sampler draws from a saliency map."""
        return 'saliency' in get_sampler(self.sampler).keywords

    @property
    def draws_budget(self) -> bool:
        """Whether the budget is drawn for each training batch."""
        return isinstance(self.n_tokens, tuple) and self.n_tokens[0] < self.n_tokens[1]

    @property
    def draws_coverage(self) -> bool:
        """Whether the coverage is drawn for each training batch."""
        low, high = check_coverage(self.coverage)
        return low < high

    @property
    def has_sizes(self) -> bool:
        """Whether placements hold spacings, not positions alone."""
        return split_sampler(self.sampler)[0] or check_coverage(self.coverage)[1] > 0.

    def budgets(self, image_size: ImageSize) -> tuple[int, int]:
        """Smallest and largest budget for images of (H, W) pixels."""
        if self.n_tokens is None:
            n = (image_size[0] // self.window) * (image_size[1] // self.window)
            return n, n
        return check_budgets(self.n_tokens)
