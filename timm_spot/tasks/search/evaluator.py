"""What a search asks again and again: logits and losses of placements, by a model that does not change."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...models.pruning import features_for_head
from ...ops.placements import sample_positions
from .objectives import get_objective
from .settings import Search


class Evaluator:
    """Logits and losses of placements of a batch of images.

    Shapes: index (b,), which of the B images; positions (b, N, 2); logits (b, num_classes) and losses (b,), float32 at
    least.

    Args:
        model: A subpixel ViT, frozen, see `frozen`.
        images: (B, C, H, W).
        targets: (B,) class indices, on the images' device, for objectives that need them.
        search: Whose objective and precision count; `chunk_size` images at a time see the full budget, if any must.
    """

    def __init__(self, model: nn.Module, images: torch.Tensor, targets: torch.Tensor | None, search: Search) -> None:
        self.model, self.images, self.search = model, images, search
        self.function, self.keywords = get_objective(search.objective)
        self.index = torch.arange(len(images), device=images.device)
        self.given = dict(index=self.index)
        if targets is not None:
            self.given['targets'] = targets
        full = [name for name in self.keywords if name.startswith('full_')]
        if full:
            placement = full_placement(model, images)
            outputs = [self._forward(images[i], placement) for i in self.chunks]
            self.given.update({k: torch.cat([output[k.removeprefix('full_')] for output in outputs]) for k in full})

    @property
    def chunks(self) -> tuple[torch.Tensor, ...]:
        """Numbers of the images that are searched together."""
        return self.index.split(self.search.chunk_size or len(self.images))

    def __call__(self, index: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and losses.

        Raises:
            ValueError: A loss of another shape, or one without a gradient where the positions have one.
        """
        output = self._forward(self.images[index], positions)
        available = {**output, **{name: value[index] for name, value in self.given.items()}}
        losses: Any = self.function(**{name: available[name] for name in self.keywords})
        objective = self.search.objective
        if not isinstance(losses, torch.Tensor) or losses.shape != index.shape:
            raise ValueError(
                f'objective={objective!r} must return one loss for each image, a tensor of shape '
                f'{tuple(index.shape)}, got {getattr(losses, "shape", losses)}.')
        if positions.requires_grad and not losses.requires_grad:
            raise ValueError(f'objective={objective!r} returns losses that do not depend on the positions.')
        return output['logits'], losses

    def _forward(self, images: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits and pooled features of placements, in float32 at least."""
        model, amp = self.model, self.search.amp_dtype
        with torch.autocast(images.device.type, amp) if amp is not None else contextlib.nullcontext():
            tokens = features_for_head(model, images, positions=positions)
            output = dict(logits=model.forward_head(tokens), features=model.forward_head(tokens, pre_logits=True))
        return {name: v.to(torch.promote_types(v.dtype, torch.float32)) for name, v in output.items()}


def full_placement(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """One token for each whole patch of the image, evenly placed, (N, 2)."""
    (H, W), window = images.shape[-2:], model.patch_embed.window
    return sample_positions('isotropic', (H // window) * (W // window), (H, W)).to(images.device)[0]


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without parameters to train, every flag restored at the end."""
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for p, _ in requires_grad:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in requires_grad:
            p.requires_grad_(flag)
        for m, flag in training:
            m.training = flag
