"""Families of models: what `evaluate`, `draw`, `predict`, the report and torch.hub have to know of each.

A family is one entry: which models it suits, how they are given tokens, which pictures can be drawn of them, how their
budget is set. Nothing outside of this file asks what class a model is.

    register_family(Family(
        name='toy', patterns=('toy_*',), suits=lambda model: isinstance(model, Toy), ways=..., kinds=('placement',),
        set_budget=lambda model, n_tokens: ...))
"""
from __future__ import annotations

from typing import Any, Callable, Iterable, List, NamedTuple, Tuple

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ...models.dht_vit import DhtVisionTransformer
from ...models.pruning import TokenPruning
from ...models.spot_vit import SubpixelVisionTransformer
from .request import Request
from .ways import (
    Way,
    baseline_ways,
    dense_way,
    oracle_ways,
    placer_ways,
    pruned_ways,
    region_ways,
    sampler_ways,
)


class Family(NamedTuple):
    """What there is to know of a kind of model.

    Attributes:
        name: What errors call it.
        patterns: Of the names of its registered models, as `timm.list_models` takes them; none for models that are
            not ours.
        suits: Whether a model is of it.
        ways: From a model and a `Request` to the ways of giving it tokens, the rows of an evaluation, in their order.
        kinds: Names of the pictures that can be drawn of its models; the first is drawn where none is asked for.
        set_budget: Gives a model another budget of tokens. Raises ValueError where it has none.
        has_samplers: Whether its tokens lie where a sampler puts them, so that they can be searched for.
        tokens: What errors say of its tokens where they do not.
    """

    name: str
    patterns: Tuple[str, ...]
    suits: Callable[[nn.Module], bool]
    ways: Callable[[nn.Module, Request], Iterable[Way]]
    kinds: Tuple[str, ...]
    set_budget: Callable[[nn.Module, int], Any]
    has_samplers: bool = False
    tokens: str = 'tokens lie where it finds them itself'


_FAMILIES: List[Family] = []


def register_family(family: Family) -> Family:
    """Add a family; of those that suit a model the one added last counts.

    Raises:
        ValueError: Its name is taken.
    """
    if any(family.name == other.name for other in _FAMILIES):
        raise ValueError(f'name={family.name!r} is already a family, choose another name.')
    _FAMILIES.append(family)
    return family


def list_families() -> List[Family]:
    """All families, in the order in which they were added."""
    return list(_FAMILIES)


def family_of(model: nn.Module) -> Family:
    """The family of a model; there is one for every timm model."""
    return next(family for family in reversed(_FAMILIES) if family.suits(model))


def name_patterns() -> List[str]:
    """Of the names of all registered models that are ours, as `timm.list_models` takes them."""
    return [pattern for family in _FAMILIES for pattern in family.patterns]


def _dense_ways(model: nn.Module, request: Request) -> Iterable[Way]:
    yield from pruned_ways(model, request, [dense_way(model)])
    if isinstance(model, VisionTransformer):
        yield from baseline_ways(model, request)


def _subpixel_ways(model: nn.Module, request: Request) -> Iterable[Way]:
    placed = (*sampler_ways(model, request), *placer_ways(model, request), *oracle_ways(model, request))
    yield from pruned_ways(model, request, placed)
    yield from baseline_ways(model, request)


def _dht_ways(model: nn.Module, request: Request) -> Iterable[Way]:
    return pruned_ways(model, request, region_ways(model, request))


def _refuse_budget(model: nn.Module, n_tokens: int) -> None:
    raise ValueError(
        f'n_tokens={n_tokens}: {type(model).__name__} has a token for each patch and no budget; leave it out, or take '
        'a subpixel or dHT model.')


register_family(Family(
    name='dense', patterns=(), suits=lambda model: True, ways=_dense_ways, kinds=(), set_budget=_refuse_budget,
    tokens='tokens are its patches'))
register_family(Family(
    name='pruned', patterns=('relevance_*',), suits=lambda model: isinstance(model, TokenPruning), ways=_dense_ways,
    kinds=(), set_budget=_refuse_budget, tokens='tokens are its patches'))
register_family(Family(
    name='subpixel', patterns=('spot_*', 'relevance_spot_*'),
    suits=lambda model: isinstance(model, SubpixelVisionTransformer), ways=_subpixel_ways,
    kinds=('placement', 'seen', 'priors', 'trajectory', 'film', 'density', 'budgets', 'pruning'),
    set_budget=lambda model, n_tokens: model.set_placement(n_tokens=n_tokens), has_samplers=True))
register_family(Family(
    name='dHT', patterns=('dht_*',), suits=lambda model: isinstance(model, DhtVisionTransformer), ways=_dht_ways,
    kinds=('regions', 'means', 'hierarchy'),
    set_budget=lambda model, n_tokens: model.set_budget(n_tokens),
    tokens='tokens are regions that it finds itself'))
