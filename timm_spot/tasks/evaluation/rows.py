"""Which rows an evaluation has: each model at each placement and budget, scorer and keep rate, or as a baseline."""
from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ...models.dht_vit import DhtVisionTransformer, TokenFeatures
from ...models.spot_vit import SubpixelVisionTransformer
from ...ops.samplers import get_sampler, sample_positions
from ..kept import weights_digest
from ..pictures.datasets import Pictures, check_classes
from ..pictures.images import model_transform
from ..pictures.saliency_maps import saliency_source
from ..search.draws import draw_placements, image_generator
from ..search.optimize import optimize_positions
from . import prunings
from .baselines import LowRes, patch_drop, random_patches, shrunk_grid, top_k
from .results import Row

AS_IT_IS = 'as it is'
REGIONS = 'regions'

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
        for way in _list_ways(model, samplers, budgets, oracle, baselines, saliency, amp):
            budget = '' if way.n_tokens is None else str(way.n_tokens)
            key = dict(common, sampler=way.sampler, n_tokens=budget, **way.key)
            if not (pruned and way.drops):
                cells.append(_cell(key, model, way.tokens(model), way.stochastic, seeds))
                continue
            cells += [
                _cell({**key, **p.key}, p.model, _pruned(way, p), way.stochastic or p.stochastic, seeds)
                for p in pruned]
    return cells


def _cell(key: Row, model: nn.Module, tokens: Tokens, stochastic: bool, seeds: Sequence[int]) -> Cell:
    used = tuple(seeds) if stochastic else (0,)
    return Cell(dict(key, seeds=' '.join(map(str, used)) if stochastic else ''), model, tokens, used)


class _Way(NamedTuple):
    """One way to give a model its tokens.

    Attributes:
        sampler: Its name in the table.
        n_tokens: Budget, where there is one.
        tokens: Makes the function of a `Cell`, for the model or for one that drops tokens.
        stochastic: Whether it is drawn, once for each seed.
        drops: Whether tokens may be dropped on the way.
        key: What else determines its rows.
    """

    sampler: str
    n_tokens: Optional[int]
    tokens: Callable[[nn.Module], Tokens]
    stochastic: bool = False
    drops: bool = True
    key: Row = {}


def _list_ways(
        model: nn.Module,
        samplers: Sequence[str],
        budgets: Sequence[int],
        oracle: Optional[str],
        baselines: Sequence[str],
        saliency: str,
        amp: Optional[str],
) -> Iterator[_Way]:
    """The ways that suit a model, in the order of the table; a budget that one cannot have is refused here already."""
    size = model.pretrained_cfg['input_size'][1:]
    if isinstance(model, DhtVisionTransformer):
        for n in budgets:
            yield _Way(REGIONS, n, partial(_merged, n_tokens=n))
        return
    if isinstance(model, SubpixelVisionTransformer):
        read_maps = saliency_source(saliency, model, model_transform(model))
        for sampler in samplers:
            stochastic, maps = not get_sampler(sampler).deterministic, 'saliency' in get_sampler(sampler).keywords
            for n in budgets:
                if not stochastic:
                    sample_positions(sampler, n, size, window=model.patch_embed.window)
                yield _Way(
                    sampler, n, partial(_placed, sampler=sampler, n_tokens=n, read_maps=read_maps), stochastic,
                    key=dict(saliency=saliency if maps else ''))
        if oracle is not None:
            stochastic, maps = not get_sampler(oracle).deterministic, 'saliency' in get_sampler(oracle).keywords
            for n in budgets:
                # No nearest neighbours: their labels would have to be searched with.
                yield _Way(
                    f'oracle {oracle}', n, partial(_searched, init=oracle, n_tokens=n, read_maps=read_maps, amp=amp),
                    stochastic, key=dict(saliency=saliency if maps else '', knn=''))
    else:
        n_patches = model.patch_embed.num_patches if isinstance(model, VisionTransformer) else None
        yield _Way(AS_IT_IS, n_patches, _as_it_is)
    if not isinstance(model, VisionTransformer):
        return
    for baseline in baselines:
        for n in budgets:
            if baseline == 'low-res':
                shrunk_grid(size, n)
            yield _Way(
                baseline, n, partial(BASELINES[baseline], n_tokens=n), stochastic=baseline == 'patch-drop', drops=False)


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


def _pruned(way: _Way, pruning: prunings.Pruning) -> Tokens:
    def pruned(images: torch.Tensor, labels: torch.Tensor, index: torch.Tensor, files: Sequence[str], seed: int
               ) -> torch.Tensor:
        return way.tokens(pruning.model_at(seed))(images, labels, index, files, seed)

    return pruned


def _dropped(model: nn.Module, n_tokens: int) -> Tokens:
    def tokens(images: torch.Tensor, _: torch.Tensor, index: torch.Tensor, files: Sequence[str], seed: int
               ) -> torch.Tensor:
        height, width = model.patch_embed.patch_size
        n_patches = (images.shape[-2] // height) * (images.shape[-1] // width)
        kept = [random_patches(n_patches, n_tokens, image_generator(seed, i)) for i in index.tolist()]
        return patch_drop(model, images, torch.stack(kept))

    return tokens


def _shrunk(model: nn.Module, n_tokens: int) -> Tokens:
    low_res = LowRes(model)
    return lambda images, labels, index, files, seed: low_res(images, n_tokens)


def _top_k(model: nn.Module, n_tokens: int) -> Tokens:
    return lambda images, labels, index, files, seed: top_k(model, images, n_tokens)


BASELINES = {'patch-drop': _dropped, 'low-res': _shrunk, 'top-k': _top_k}
