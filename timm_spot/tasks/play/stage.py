"""What the page of `timm-spot play` asks a model: pictures, placements, predictions, what each token is worth."""
from __future__ import annotations

import base64
import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from PIL import Image
from torch import nn

from ...models.density_placer import DensityPlacer
from ...models.placement import Placer, SampledPlacer
from ...models.placing import place_images
from ...models.prior import Prior
from ...models.pruning import TokenPruning
from ...models.pruning_vit import sparsify
from ...models.spot_vit import SubpixelVisionTransformer
from ...ops.samplers import get_sampler, list_samplers
from ..pictures.classes import class_names
from ..pictures.files import find_pictures
from ..pictures.images import denormalize, model_transform, read_picture
from ..predict import looks_foreign, reads_digits

SHIPPED = Path(__file__).parent / 'pictures'
KEPT = 32  # pictures that are remembered; the page shows one again that was forgotten
MAX_TOKENS = 1024
SHOWN_CLASSES = 10
_SALIENCIES = ('energy', 'spectral_residual')
_PASSES = 4096  # tokens in one pass, where many placements are tried


class Shown(NamedTuple):
    """A picture as the model takes it.

    Attributes:
        images: (1, C, H, W), normalised.
        full: Probabilities (classes,) at the full budget, evenly placed.
        about: What the page is told of it.
    """

    images: torch.Tensor
    full: torch.Tensor
    about: dict[str, Any]


class UnknownPicture(KeyError):
    """A picture that was never shown, or has been forgotten."""


class Stage:
    """A subpixel ViT in eval mode and the pictures that are shown to it; any number of threads may ask.

    Args:
        model: It is frozen.
        name: Under which it was created.
        sources: Pictures to begin with: files, folders, tars, globs. By default digits or photographs in the package.

    Raises:
        ValueError: The model is no subpixel ViT or no classifier, or a source holds no picture.
    """

    def __init__(self, model: nn.Module, name: str, sources: Sequence[str] = ()) -> None:
        if not isinstance(model, SubpixelVisionTransformer):
            raise ValueError(f'{name} is no subpixel ViT: its tokens cannot be dragged.')
        if model.num_classes < 2:
            raise ValueError(f'{name} has {model.num_classes} classes: there is no prediction to watch.')
        model.requires_grad_(False)
        self._pruned: nn.Module | None = model if isinstance(model, TokenPruning) else None
        self.model = model if self._pruned is None else model.pruned(1.)
        self.name = name
        self.names = class_names(model)
        self.lock = threading.Lock()
        self._transform = model_transform(model)
        self._pictures: OrderedDict[str, Shown] = OrderedDict()
        shipped = SHIPPED.glob('*.png' if reads_digits(model) else '*.jpg')
        self.examples, broken = find_pictures(sources or sorted(map(str, shipped)))
        if broken:
            raise ValueError(broken[0])

    @property
    def full_budget(self) -> int:
        """Whole patches of an image of the model's size."""
        return self.model.patch_embed.num_patches

    @property
    def max_tokens(self) -> int:
        """Twice the full budget, within limits."""
        H, W = self.model.patch_embed.img_size
        return min(MAX_TOKENS, 2 * self.full_budget, H * W)

    def describe(self) -> dict[str, Any]:
        """What the page has to know before it shows a picture."""
        embed, (H, W) = self.model.patch_embed, self.model.patch_embed.img_size
        spot = embed.convention == 'spot'
        sides = [2 * side / (H + W) if spot else 1. for side in (H, W)]
        return dict(
            model=self.name,
            classes=self.names,
            digits=reads_digits(self.model),
            size=[H, W],
            window=[embed.window * side for side in sides],  # in pixels
            offset=0.5 if spot else 0.,  # of a window's centre from position * side
            n_tokens=min(25, self.full_budget),
            full_budget=self.full_budget,
            max_tokens=self.max_tokens,
            priors=self.priors(),
            density=isinstance(self.model.placer, DensityPlacer),
            examples=[Path(entry.name).name for entry in self.examples],
        )

    def priors(self) -> list[dict[str, Any]]:
        """Names of priors, the model's own placer first, and whether another seed draws another placement."""
        learned = [] if isinstance(self.model.placer, SampledPlacer) else [dict(
            name=self.model.placer.name, about='learned placer', drawn=False)]
        samplers = []
        for name in sorted(list_samplers(), key=lambda name: (name != 'isotropic', name)):
            drawn = not get_sampler(name).deterministic and name != 'salient_lattice'
            maps = _SALIENCIES if 'saliency' in get_sampler(name).keywords else ('',)
            samplers += [dict(name=f'{name}/{m}'.rstrip('/'), about='sampler', drawn=drawn) for m in maps]
        return learned + samplers

    # ------------------------------------------------------------------------------------------------------------------
    # Pictures

    def show_example(self, number: int) -> Shown:
        """A picture of those to begin with.

        Raises:
            IndexError: There are fewer.
            PictureError: It cannot be read.
        """
        if not 0 <= number < len(self.examples):
            raise IndexError(f'example={number} is none of the {len(self.examples)} pictures.')
        entry = self.examples[number]
        with entry.open() as file:
            return self.show(file, Path(entry.name).name)

    def show(self, file: BinaryIO, name: str) -> Shown:
        """Read a picture.

        Raises:
            PictureError: It cannot be read.
        """
        picture = read_picture(file, name)
        images = self._transform(picture)[None]
        with self.lock, torch.inference_mode():
            full = self.model(images, positions=self._even(self.full_budget, images))[0].softmax(dim=0)
        pixels = (denormalize(self.model, images[0]) * 255).round().to(torch.uint8).expand(3, -1, -1)
        digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]
        about = dict(
            id=digest, name=name, picture=_data_url(pixels), pixels=list(picture.size),
            foreign=reads_digits(self.model) and looks_foreign(picture), full=self.scores(full, full))
        shown = Shown(images, full, about)
        with self.lock:
            self._pictures[digest] = shown
            self._pictures.move_to_end(digest)
            while len(self._pictures) > KEPT:
                self._pictures.popitem(last=False)
        return shown

    def shown(self, picture: str) -> Shown:
        """A picture by its id; raises UnknownPicture."""
        with self.lock:
            if picture not in self._pictures:
                raise UnknownPicture(picture)
            self._pictures.move_to_end(picture)
            return self._pictures[picture]

    # ------------------------------------------------------------------------------------------------------------------
    # Placements and what they give

    def place(self, picture: str, prior: str, n_tokens: int, seed: int = 0) -> list[list[float]]:
        """Positions (y, x) that a prior, by its name in `priors`, gives a picture.

        Raises:
            UnknownPicture: It is not there.
            ValueError: An unknown prior, or one that has no such budget.
        """
        if not any(prior == known['name'] for known in self.priors()):
            raise ValueError(f'prior={prior!r} is none of {", ".join(known["name"] for known in self.priors())}.')
        self._check_count(n_tokens)
        images, placer = self.shown(picture).images, self.model.placer
        if prior == placer.name:
            placer = placer.replaced(n_tokens=n_tokens, coverage=0.)
        else:
            placer = self._sampled(n_tokens, *prior.split('/'), seed=seed)
        with self.lock, torch.inference_mode():
            return place_images(placer, self.model.patch_embed, images)[0].tolist()

    def _sampled(self, n_tokens: int, sampler: str, saliency: str | None = None, seed: int = 0) -> Placer:
        prior = Prior(sampler, n_tokens, seed, saliency, self.model.patch_embed.window)
        return SampledPlacer(prior, prior).eval()

    def _even(self, n_tokens: int, images: torch.Tensor) -> torch.Tensor:
        return place_images(self._sampled(n_tokens, 'isotropic'), self.model.patch_embed, images)

    def _check_count(self, n_tokens: int) -> None:
        if not 1 <= n_tokens <= self.max_tokens:
            raise ValueError(f'n_tokens={n_tokens} must be at least 1 and at most {self.max_tokens}.')

    def placement(self, positions: Sequence[Sequence[float]]) -> torch.Tensor:
        """Positions of the page as (1, N, 2); raises ValueError where they are none."""
        try:
            placement = torch.tensor(positions, dtype=torch.float32)
        except (TypeError, ValueError):
            raise ValueError('positions must be a list of pairs [y, x].') from None
        if placement.ndim != 2 or placement.shape[1] != 2 or not placement.isfinite().all():
            raise ValueError(f'positions of shape {tuple(placement.shape)} must be N pairs of finite numbers [y, x].')
        self._check_count(len(placement))
        return placement[None]

    def answer(
            self,
            picture: str,
            positions: Sequence[Sequence[float]],
            keep_rate: float = 1.,
            worth: bool = False,
    ) -> dict[str, Any]:
        """What the model says of a picture through a placement.

        Args:
            picture: Its id.
            positions: N pairs (y, x).
            keep_rate: Share of the tokens that each stage of a pruning keeps; 1 prunes none.
            worth: Whether to say what each token is worth.

        Returns:
            `scores` of the classes, and if asked for `kept`, the stages that each token lives through, and `worth`.
        """
        shown, placement = self.shown(picture), self.placement(positions)
        answer: dict[str, Any] = {}
        with self.lock, torch.inference_mode():
            model = self.model if keep_rate == 1. else self._prune(keep_rate)
            probabilities = model(shown.images, positions=placement)[0].softmax(dim=0)
            answer['scores'] = self.scores(probabilities, shown.full)
            if keep_rate < 1.:
                left = [index[0].tolist() for index in model.kept_tokens(shown.images, positions=placement)]
                answer['kept'] = [sum(i in stage for stage in left) for i in range(placement.shape[1])]
                answer['stages'] = [len(stage) for stage in left]
            if worth:
                answer['worth'] = self._worth(shown.images, placement)
        return answer

    def scores(self, probabilities: torch.Tensor, full: torch.Tensor) -> list[dict[str, Any]]:
        """Classes with their probability and that at the full budget: all if there are few, else the first of both."""
        if len(self.names) <= SHOWN_CLASSES + 2:
            labels = list(range(len(self.names)))
        else:
            first = probabilities.topk(SHOWN_CLASSES).indices.tolist()
            best = int(full.argmax())
            labels = first if best in first else [*first[:-1], best]
        return [
            dict(label=i, name=self.names[i], probability=probabilities[i].item(), full=full[i].item())
            for i in labels]

    def density(self, picture: str) -> list[list[float]]:
        """The density (h, w) by which the learned placer places, as shares of its largest value.

        Raises:
            UnknownPicture: It is not there.
            ValueError: The model's placer has none.
        """
        placer = self.model.placer
        if not isinstance(placer, DensityPlacer):
            raise ValueError(f'{placer.source} has no density.')
        with torch.inference_mode():
            density = placer.density(self.shown(picture).images)[0]
        return (density / density.max()).tolist()

    def _prune(self, keep_rate: float) -> nn.Module:
        """The model with fewer tokens, by its own predictors if it has such, else by attention."""
        if self._pruned is None:
            scorer = 'cls-attention' if self.model.cls_token is not None else 'received-attention'
            self._pruned = sparsify(self.model, scorer=scorer)
        return self._pruned.pruned(keep_rate)

    def _worth(self, images: torch.Tensor, placement: torch.Tensor) -> list[float]:
        """By how much the log-odds of the first class fall when a token is left out, for each token."""
        n = placement.shape[1]
        if n == 1:
            return [0.]
        logits = self.model(images, positions=placement)
        label = int(logits.argmax())
        others = torch.stack([torch.cat([placement[0, :i], placement[0, i + 1:]]) for i in range(n)])
        less = torch.cat([
            _log_odds(self.model(images.expand(len(chunk), -1, -1, -1), positions=chunk), label)
            for chunk in others.split(max(1, _PASSES // n))])
        return (_log_odds(logits, label) - less).tolist()


def _log_odds(logits: torch.Tensor, label: int) -> torch.Tensor:
    """log(p / (1 - p)) of a class by logits (B, classes), exact where p is close to one."""
    others = torch.cat([logits[:, :label], logits[:, label + 1:]], dim=1)
    return logits[:, label] - others.logsumexp(dim=1)


def _data_url(pixels: torch.Tensor) -> str:
    """uint8 pixels (3, H, W) as a PNG that a page shows."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, 'PNG')
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()
