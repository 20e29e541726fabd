"""A subpixel ViT compiled for budgets: a program for each, and none made again when the budget changes."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...models.placing import at_budget
from ...models.spot_vit import SubpixelVisionTransformer
from ...ops.samplers import check_n_tokens

Program = Callable[..., torch.Tensor]


class CompiledModel:
    """What `timm_spot.compile` returns: images to logits at any of its budgets.

    A program is made by `torch.compile` at the first call of a budget and image size, for batches of one and for all
    others; on a GPU for each size of a batch, as a CUDA graph. From the second call on nothing is compiled.

    Args:
        model: A subpixel ViT in eval mode; its weights are shared, its placement but for the budget stays as it is now.
        budgets: Numbers of tokens, in rising order.
    """

    def __init__(self, model: SubpixelVisionTransformer, budgets: tuple[int, ...]) -> None:
        self.model, self.budgets = model, budgets
        self._models = {n: at_budget(model, n) for n in budgets}
        self._programs: dict[tuple[object, ...], Program] = {}
        self._placements: dict[tuple[object, ...], torch.Tensor] = {}

    def __call__(
            self,
            images: torch.Tensor,
            n_tokens: int | None = None,
            positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, classes).

        Args:
            images: (B, C, H, W), as the model takes them, on its device.
            n_tokens: Any of the budgets; by default that of the model, if it is one of them, or the largest.
            positions: Placement of as many tokens as one of the budgets, instead of the model's.

        Raises:
            ValueError: There is no program for such a budget.
        """
        if positions is not None:
            n_tokens = positions.shape[-2]
        elif n_tokens is None:
            n_tokens = self.model.n_tokens if self.model.n_tokens in self.budgets else self.budgets[-1]
        if n_tokens not in self._models:
            raise ValueError(f"n_tokens={n_tokens} is none of the budgets {', '.join(map(str, self.budgets))}.")
        on_gpu = images.device.type == 'cuda'
        batch = len(images) if on_gpu else min(len(images), 2)
        with torch.no_grad():
            placement = self._place(images, n_tokens) if positions is None else positions
            form = None if placement is None else (placement.ndim, placement.shape[-1])
            key = (n_tokens, batch, images.shape[1:], images.dtype, images.device, form)
            if key not in self._programs:
                self._programs[key] = _program(self._models[n_tokens], on_gpu)
            if not on_gpu and batch > 1:
                torch._dynamo.maybe_mark_dynamic(images, 0)
                if placement is not None and placement.ndim == 3:
                    torch._dynamo.maybe_mark_dynamic(placement, 0)
            logits = self._programs[key](images, placement)
            # The next run of a CUDA graph writes to the same memory.
            return logits.clone() if on_gpu else logits

    def warm_up(self, images: torch.Tensor) -> None:
        """Make the programs of all budgets for batches like this one."""
        for n in self.budgets:
            self(images, n)

    def _place(self, images: torch.Tensor, n_tokens: int) -> torch.Tensor | None:
        """The placement that all images share, drawn once; None where a network looks at each."""
        model = self._models[n_tokens]
        if model.placer.reads_images:
            return None
        key = (n_tokens, images.shape[2:], images.device)
        if key not in self._placements:
            self._placements[key] = model.place(images[:1])[0].clone()
        return self._placements[key]


def _program(model: SubpixelVisionTransformer, on_gpu: bool) -> Program:
    def run(images: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        return model(images, positions)

    # Dynamo keeps what it compiled by code, up to eight programs of one: a copy has a list of its own.
    run.__code__ = run.__code__.replace(co_name='run')
    return torch.compile(run, fullgraph=True, mode='reduce-overhead' if on_gpu else None)


def compile(model: SubpixelVisionTransformer, budgets: Sequence[int] = (25, 49, 100)) -> CompiledModel:
    """Compile a model for some budgets, so that each has a program and a change of the budget costs nothing.

    Args:
        model: A subpixel ViT in eval mode, on the CPU or a GPU.
        budgets: Numbers of tokens.

    Returns:
        A function from images and a budget to logits, those of the model up to rounding.

    Raises:
        TypeError, ValueError: No subpixel ViT, one in train mode, no budget or one that is none.

    Example:
        >>> import timm, timm_spot, torch
        >>> model = timm.create_model('spot_vit_pico_patch8_64', depth=1).eval()
        >>> fast = timm_spot.compile(model, budgets=(9, 25))
        >>> fast.budgets
        (9, 25)
        >>> logits = fast(torch.zeros(2, 3, 64, 64), n_tokens=9)  # doctest: +SKIP
    """
    if not isinstance(model, SubpixelVisionTransformer):
        raise TypeError(f'model must be a subpixel ViT, got {type(model).__name__}.')
    if model.training:
        raise ValueError('model is in train mode, in which it draws its placements: call model.eval() first.')
    budgets = (budgets,) if isinstance(budgets, int) else tuple(budgets)
    if not budgets:
        raise ValueError('budgets is empty: give one at least.')
    for n in budgets:
        check_n_tokens(n)
    return CompiledModel(model, tuple(sorted(set(budgets))))
