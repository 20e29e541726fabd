"""Ways of giving a model its tokens: each is a kind of row of an evaluation."""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence

import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ...models.placement import SampledPlacer
from ...models.placing import at_budget
from ...models.pruning import features_for_head
from ...ops.placements import sample_positions
from ...ops.samplers import get_sampler
from ..pictures.images import model_transform
from ..pictures.saliency_maps import SaliencySource, saliency_source
from ..search.draws import check_sizes, draw_placements, image_generator
from ..search.optimize import optimize_positions
from . import rows
from .baselines import LowRes, patch_drop, random_patches, shrunk_grid, top_k
from .prunings import Pruning, list_prunings
from .request import Request


@dataclass(frozen=True)
class ImageBatch:
    """What a way is given.

    Attributes:
        images: (B, C, H, W), normalised.
        labels: (B,); for oracles only.
        index: (B,), numbers in the data set, by which draws are seeded.
        files: Of the images, by which a folder of maps finds theirs.
        seed: For what is drawn.
    """

    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    files: Sequence[str]
    seed: int


@dataclass(frozen=True)
class Way:
    """One way to give a model its tokens.

    Attributes:
        kind: See `rows`.
        sampler: Its name in the table.
        n_tokens: Budget, where there is one.
        tokens: From the model and a batch to what `model.forward_head` takes: tokens after the last norm.
        stochastic: Whether it is drawn, once for each seed.
        saliency: Where its maps come from, if it reads any.
        has_knn: Whether nearest neighbours can be asked.
        can_prune: Whether tokens may be dropped on the way.
        pruning: How they are.
        coverage: Share of its cell that a window covers.
        flops: Of one image, where torch does not count them.
    """

    kind: str
    sampler: str
    n_tokens: Optional[int]
    tokens: Callable[[nn.Module, ImageBatch], Any]
    stochastic: bool = False
    saliency: str = ''
    has_knn: bool = True
    can_prune: bool = True
    pruning: Optional[Pruning] = None
    coverage: float = 0.
    flops: Optional[int] = None


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model is given."""
    return tuple(resolve_model_data_config(model)['input_size'][1:])


def sampler_ways(model: nn.Module, request: Request) -> Iterator[Way]:
    """A subpixel ViT at each sampler and budget; a budget that a lattice cannot have is refused here already."""
    read_maps = saliency_source(request.saliency, model, model_transform(model))
    for name in request.samplers:
        sampler = get_sampler(name)
        for n, coverage in product(request.budgets, coverages(model, request, name)):
            if sampler.deterministic:
                sample_positions(name, n, image_size(model), window=model.patch_embed.window)
            yield Way(
                rows.SAMPLER, name, n,
                partial(_placed, sampler=name, n_tokens=n, read_maps=read_maps, coverage=coverage),
                not sampler.deterministic, request.saliency if 'saliency' in sampler.keywords else '',
                coverage=coverage)


def coverages(model: nn.Module, request: Request, sampler: str) -> Sequence[float]:
    """Those asked for, or the model's own; one that the model cannot have is refused here already."""
    asked = request.coverages or (model.placer.coverage(),)
    for coverage in asked:
        check_sizes(model, sampler, coverage)
    return asked


def placer_ways(model: nn.Module, request: Request) -> Iterator[Way]:
    """A subpixel ViT with a placer of its own at each budget; none for one placed by a sampler."""
    placer = model.placer
    if type(placer) is not SampledPlacer:
        for n, coverage in product(request.budgets, coverages(model, request, placer.name)):
            yield Way(
                rows.PLACER, placer.name or type(placer).__name__, n,
                partial(_self_placed, n_tokens=n, coverage=coverage), coverage=coverage)


def oracle_ways(model: nn.Module, request: Request) -> Iterator[Way]:
    """A subpixel ViT at each budget, placed by a search that sees the labels."""
    if request.oracle is None:
        return
    name, sampler = request.oracle, get_sampler(request.oracle)
    read_maps = saliency_source(request.saliency, model, model_transform(model))
    for n, coverage in product(request.budgets, coverages(model, request, name)):
        search = partial(
            _searched, init=name, n_tokens=n, read_maps=read_maps, coverage=coverage, amp=request.amp)
        # No nearest neighbours: their labels would have to be searched with.
        yield Way(
            rows.ORACLE, f'oracle {name}', n, search, not sampler.deterministic,
            request.saliency if 'saliency' in sampler.keywords else '', has_knn=False, coverage=coverage)


def region_ways(model: nn.Module, request: Request) -> Iterator[Way]:
    """A dHT model at each budget."""
    for n in request.budgets:
        yield Way(rows.REGIONS, rows.REGIONS, n, partial(_merged, n_tokens=n))


def dense_way(model: nn.Module) -> Way:
    """A model as it is."""
    n_patches = model.patch_embed.num_patches if isinstance(model, VisionTransformer) else None
    return Way(rows.AS_IT_IS, rows.AS_IT_IS, n_patches, lambda model, batch: features_for_head(model, batch.images))


def baseline_ways(model: nn.Module, request: Request) -> Iterator[Way]:
    """Any VisionTransformer as each baseline, at each budget; a budget that one cannot have is refused here already."""
    for name in request.baselines:
        baseline = BASELINES[name]
        for n in request.budgets:
            yield Way(
                rows.BASELINE, name, n, baseline(model, n), stochastic=name == 'patch-drop', can_prune=False)


def pruned_ways(model: nn.Module, request: Request, ways: Iterable[Way]) -> Iterator[Way]:
    """The same ways, in the place of each the ways in which the model's tokens are to be dropped, if there are any."""
    prunings = list_prunings(model, request.scorers, request.keep_rates, request.flops)
    for way in ways:
        if prunings and way.can_prune:
            yield from (replace(way, pruning=p, stochastic=way.stochastic or p.stochastic) for p in prunings)
        else:
            yield way


def _placements(
        model: nn.Module,
        batch: ImageBatch,
        sampler: str,
        n_tokens: int,
        read_maps: SaliencySource,
        coverage: float,
) -> torch.Tensor:
    maps = read_maps(batch.images, batch.files) if 'saliency' in get_sampler(sampler).keywords else None
    return draw_placements(model, batch.images, sampler, n_tokens, maps, batch.index, batch.seed, coverage)


def _placed(model: nn.Module, batch: ImageBatch, **how: Any) -> Any:
    return features_for_head(model, batch.images, positions=_placements(model, batch, **how))


def _self_placed(model: nn.Module, batch: ImageBatch, n_tokens: int, coverage: float) -> Any:
    return features_for_head(at_budget(model, n_tokens, coverage), batch.images)


def _searched(
        model: nn.Module,
        batch: ImageBatch,
        init: str,
        n_tokens: int,
        read_maps: SaliencySource,
        coverage: float,
        amp: Optional[str],
) -> Any:
    start = _placements(model, batch, init, n_tokens, read_maps, coverage)
    found = optimize_positions(
        model, batch.images, batch.labels, init=start, record=False, amp_dtype=getattr(torch, amp) if amp else None)
    return features_for_head(model, batch.images, positions=found.positions)


def _merged(model: nn.Module, batch: ImageBatch, n_tokens: int) -> Any:
    return model.forward_features(batch.images, n_tokens=n_tokens)


def _dropped(model: nn.Module, batch: ImageBatch, n_tokens: int) -> torch.Tensor:
    (height, width), patch = batch.images.shape[-2:], model.patch_embed.patch_size
    n_patches = (height // patch[0]) * (width // patch[1])
    kept = [random_patches(n_patches, n_tokens, image_generator(batch.seed, i)) for i in batch.index.tolist()]
    return patch_drop(model, batch.images, torch.stack(kept))


def _low_res(model: nn.Module, n_tokens: int) -> Callable[[nn.Module, ImageBatch], Any]:
    shrunk_grid(image_size(model), n_tokens)  # refuses what is none
    low_res = LowRes(model)
    return lambda model, batch: low_res(batch.images, n_tokens)


# From a model and a budget to the `tokens` of a `Way`.
BASELINES = {
    'patch-drop': lambda model, n: partial(_dropped, n_tokens=n),
    'low-res': _low_res,
    'top-k': lambda model, n: lambda model, batch: top_k(model, batch.images, n),
}
