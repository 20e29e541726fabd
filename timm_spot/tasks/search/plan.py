"""What a search over a data set is to do, checked before anything is written, and the key of all that determines it."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

from ...models.prior import Saliency
from ...ops.samplers import get_sampler, split_sampler
from ...ops.sizes import check_n_coarse
from ..kept import plain_key, settings_digest, weights_digest
from ..pictures.classes import class_mismatch
from ..pictures.datasets import Pictures
from ..pictures.images import model_transform, picture_channels
from ..pictures.saliency_maps import attention_model
from .draws import check_budget, check_draw_seed, check_init, image_generator, names_placer, starting_positions
from .objectives import get_objective
from .settings import Search


@dataclass(frozen=True)
class Plan:
    """A search over a data set.

    Attributes:
        model: A subpixel ViT in eval mode.
        pictures: The data set.
        transform: Of its pictures, to (C, H, W) as the model takes them.
        search: How each image is searched.
        init: Sampler of the start, or the name of the model's own placer.
        saliency: Where the maps of a salient `init` come from, see `saliency_source`; None for the model's own.
        n_tokens: Budget.
        seed: Of the starts.
        batch_size: Images searched at a time.
        labelled: Whether the labels are the model's classes.
    """

    model: nn.Module
    pictures: Pictures
    transform: Callable[[Image.Image], torch.Tensor]
    search: Search
    init: str
    saliency: str | None
    n_tokens: int
    seed: int
    batch_size: int
    labelled: bool

    def key(self) -> dict[str, Any]:
        """All that determines the result, as JSON has it."""
        model, pictures = self.model, self.pictures
        named = None if Path(pictures.source).exists() else pictures.source  # files are told by their digest
        classes = _digest(sorted(pictures.class_to_idx.items(), key=lambda item: item[1]))
        return plain_key(dict(
            model=model.pretrained_cfg.get('architecture'),
            weights=weights_digest(model),
            settings=settings_digest(model),
            data=named,
            split=pictures.split,
            root=named and pictures.root,
            classes=classes,
            pictures=pictures.digest(),
            transform=repr(self.transform),
            labels=self.labelled,
            init=self.init,
            placer=self._placer_key(),
            saliency=self._saliency_key(),
            n_tokens=self.n_tokens,
            batch_size=self.batch_size,
            seed=self.seed,
            search=self._search_key(),
            **self._sizes_key(),
        ))

    def _sizes_key(self) -> dict[str, Any]:
        """What the sizes of a start follow from; nothing where it has none, as in results of version 0.1."""
        if names_placer(self.init):
            return {}  # the key of the placer says it
        placer, key = self.model.placer, {}
        if placer.coverage():
            key['coverage'] = placer.coverage()
        if split_sampler(self.init)[0]:
            key['n_coarse'] = check_n_coarse(placer.prior.n_coarse, self.n_tokens)
        return key

    def _search_key(self) -> dict[str, Any]:
        key = dataclasses.asdict(self.search)
        if self.search.optimize == ('position',):
            del key['optimize']  # results of version 0.1 do not say it
        return key

    def _placer_key(self) -> Any:
        if not names_placer(self.init):
            return None
        placer = self.model.placer  # its weights are the model's
        prior = placer.eval_prior
        said = [settings_digest(placer), prior.sampler, prior.seed, prior.window, _own_saliency_key(prior.saliency)]
        return said if not prior.has_sizes else [*said, prior.coverage, prior.n_coarse]

    def _saliency_key(self) -> Any:
        if not _needs_map(self.init):
            return None
        if self.saliency is None:
            return _own_saliency_key(self.model.placer.eval_prior.saliency)
        vit = attention_model(self.saliency)
        if vit is not None:
            return [self.saliency, weights_digest(vit)]
        folder = Path(self.saliency.partition('local-dir:')[2] or self.saliency)
        return [self.saliency, _listing_digest(folder) if folder.is_dir() else None]


def make_plan(
        model: nn.Module,
        pictures: Pictures,
        search: Search,
        init: str,
        saliency: str | None,
        n_tokens: int | None,
        seed: int,
        batch_size: int,
) -> Plan:
    """Check what can be checked without work. Arguments as of `run_oracle`.

    Raises:
        TypeError, ValueError: An impossible start, budget, seed or size of batches; labels that do not suit the
            objective; an empty data set; an objective that is a function, which has no key.
    """
    size = tuple(resolve_model_data_config(model)['input_size'][-2:])
    check_draw_seed(seed)
    if not len(pictures) and not pictures.is_stream:
        raise ValueError(f'data set {pictures.source} is empty.')
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f'batch_size={batch_size!r} must be a whole number of at least 1.')
    if not isinstance(search.objective, str):
        raise TypeError(f'objective={search.objective!r} must be a name, so that another run can tell it from others.')
    search.create_optimizers([torch.zeros(1, 2, requires_grad=True)])  # what timm and torch say of the optimizer
    check_init(model, init)
    n_tokens = check_budget(model, n_tokens, size)
    if saliency is not None and not _needs_map(init):
        raise ValueError(f"saliency={saliency!r} is of no use to init={init!r}: 'salient' draws from it.")
    if not names_placer(init):
        # Not every sampler serves every budget; maps are not yet made.
        own = model.placer.eval_prior.saliency
        maps = torch.ones(1, *size) if saliency is not None or own is not None else None
        blank = torch.zeros(1, picture_channels(model), *size, device=next(model.parameters()).device)
        starting_positions(model, blank, init, n_tokens, maps, image_generator(seed, 0))
    return Plan(
        model, pictures, model_transform(model), search, init, saliency, n_tokens, seed, batch_size,
        _has_labels(model, pictures, search))


def _has_labels(model: nn.Module, pictures: Pictures, search: Search) -> bool:
    mismatch = class_mismatch(pictures, model)
    if 'targets' in get_objective(search.objective)[1]:
        if mismatch:
            raise ValueError(f'{mismatch} Or choose another objective: entropy, teacher and feature need no label.')
        if not model.num_classes:
            raise ValueError(f'objective={search.objective!r} needs a classifier, the model has num_classes=0.')
    return not mismatch and model.num_classes > 0


def _needs_map(init: str) -> bool:
    return not names_placer(init) and 'saliency' in get_sampler(init).keywords


def _own_saliency_key(saliency: Saliency | None) -> Any:
    """A model's own saliency; a network's weights are the model's."""
    if isinstance(saliency, torch.Tensor):
        return hashlib.sha256(saliency.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    if isinstance(saliency, nn.Module):
        return settings_digest(saliency)
    return saliency if saliency is None or isinstance(saliency, str) else getattr(saliency, '__qualname__', None)


def _listing_digest(folder: Path) -> str:
    """Names, sizes and times of change of the files of a folder."""
    files = [entry for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if entry.is_file()]
    return _digest([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
