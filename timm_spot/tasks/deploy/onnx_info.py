"""What an exported ONNX file says of itself: classes, transform, placement; JSON in its metadata, under `timm_spot`."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from timm.data import resolve_model_data_config
from torch import nn

from ...models.density_placer import DensityPlacer
from ...models.placement import SampledPlacer
from ...models.pruning import TokenPruning
from ..pictures.classes import class_names, label_names

KEY = 'timm_spot'
VERSION = 1
# Where the placement comes from.
INSIDE = 'inside'  # a constant, or a network with one budget
SHARED = 'shared'  # an optional input, (N, 2) or (N, 4), of all images
LATTICE = 'lattice'  # an optional input that a network inside carries to each image, with what makes its thumbnail
EACH = 'each'  # an input, (B, N, 2) or (B, N, 4)


@dataclass(frozen=True)
class OnnxInfo:
    """What an exported file says of itself.

    Attributes:
        model: Architecture.
        class_names: Of the classes, in their order.
        label_names: What folders of these classes are called; none where the model does not say.
        config: How pictures are resized, cropped and normalised, as timm has it.
        channels: Of images.
        window: Side of a window in pixels.
        image_size: Height and width of the model's images.
        any_size: Whether images of other sizes are taken too.
        images: Type of the input, 'float32' (normalised) or 'uint8'.
        precision: 'float32', 'float16' or 'int8'.
        placement: Where it comes from, see above.
        columns: Of a placement: 2, or 4 with spacings.
        budgets_by_sampler: Whether the sampler below places any budget, without a look at the images.
        placer: Who places the tokens, by its registered name.
        sampler, n_tokens, seed, coverage, n_coarse: Of the model's placement; without `n_tokens` as many tokens as
            there are patches.
        flops: Operations of an image of the nominal size at N tokens: a + b N + c N^2.
        version: Of this record.
    """

    model: str
    class_names: list[str]
    label_names: list[str]
    config: dict[str, Any]
    channels: int
    window: int
    image_size: tuple[int, int]
    any_size: bool
    images: str
    precision: str
    placement: str
    columns: int
    budgets_by_sampler: bool
    placer: str
    sampler: str
    n_tokens: int | None
    seed: int
    coverage: float
    n_coarse: int | None
    flops: tuple[float, float, float] = (0., 0., 0.)
    version: int = VERSION

    @property
    def takes_budgets(self) -> bool:
        """Whether a budget can be chosen for each call."""
        return self.placement == LATTICE or (self.placement != INSIDE and self.budgets_by_sampler)

    def budget(self, image_size: tuple[int, int]) -> int:
        """Tokens of images of (H, W) pixels where none are asked for."""
        height, width = image_size
        return self.n_tokens or (height // self.window) * (width // self.window)

    def count_flops(self, n_tokens: int) -> int:
        """Operations of an image of the nominal size."""
        a, b, c = self.flops
        return round(a + b * n_tokens + c * n_tokens ** 2)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, name: str) -> OnnxInfo:
        """What `to_json` wrote; `name` is that of the file.

        Raises:
            ValueError: It is of a later version, or damaged.
        """
        try:
            values = json.loads(text)
            version = values['version']
        except (ValueError, TypeError, KeyError):
            raise ValueError(f'{name} says nothing of itself that can be read: its metadata are damaged.') from None
        if version != VERSION:
            raise ValueError(f'{name} is of version {version}, this timm_spot reads {VERSION}: export it anew.')
        missing = {f.name for f in fields(cls)} ^ set(values)
        if missing:
            raise ValueError(f'{name} is damaged: its metadata lack, or should not have, {", ".join(sorted(missing))}.')
        values['config'] = {key: tuple(v) if isinstance(v, list) else v for key, v in values['config'].items()}
        return cls(**dict(values, image_size=tuple(values['image_size']), flops=tuple(values['flops'])))


def describe(
        model: nn.Module,
        n_tokens: int | None,
        positions_as_input: bool,
        uint8: bool,
        precision: str,
) -> OnnxInfo:
    """The record of a file of a subpixel ViT; with `n_tokens`, of one budget alone."""
    embed, placer = model.patch_embed, model.placer
    prior = placer.eval_prior
    sampled = isinstance(placer, SampledPlacer)
    sized = prior.has_sizes
    if positions_as_input:
        placement = EACH
    elif n_tokens is not None or isinstance(model, TokenPruning):  # how many tokens fall, a graph holds as a constant
        placement = INSIDE
    else:
        # Sizes of tokens follow from their number by functions that ONNX does not have, where a network places them.
        placement = SHARED if sampled else LATTICE if type(placer) is DensityPlacer and not sized else INSIDE
    config = {key: value for key, value in resolve_model_data_config(model).items() if _is_plain(value)}
    any_size = placement != INSIDE and not sized
    if not any_size:  # pictures become what the file takes, whatever the model's config says
        config['input_size'] = (embed.in_chans, *embed.img_size)
    # Without a budget of its own a model has as many tokens as patches, which depends on the size of the image.
    own = None if prior.n_tokens is None else prior.budgets(embed.img_size)[1]
    return OnnxInfo(
        model=(getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__,
        class_names=class_names(model), label_names=label_names(model), config=config, channels=embed.in_chans,
        window=embed.window, image_size=tuple(embed.img_size), any_size=any_size,
        images='uint8' if uint8 else 'float32', precision=precision, placement=placement, columns=4 if sized else 2,
        budgets_by_sampler=sampled and not placer.reads_images and not isinstance(model, TokenPruning),
        placer=placer.name or type(placer).__name__, sampler=prior.sampler,
        n_tokens=model.n_tokens if placement == INSIDE else own, seed=prior.seed, coverage=placer.coverage(),
        n_coarse=prior.n_coarse)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, list, tuple, type(None)))
