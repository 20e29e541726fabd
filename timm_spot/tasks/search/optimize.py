"""SPoT-ON: the placement of each image searched by gradient, an upper bound on what a budget of tokens can do.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

The model is frozen; only the positions move. With the objective 'label' the search sees the true class, so its accuracy
says how good a placement exists, not how good a placement can be found for a new image. The other objectives
(`objectives.py`) need no label.
"""
from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...models.prior import Saliency
from ...models.subpixel_embed import SubpixelEmbed
from ...ops.windows import check_images, check_sized
from .descent import Callback, descend
from .draws import starting_positions
from .evaluator import Evaluator, frozen
from .objectives import Objective, get_objective
from .result import OracleResult
from .settings import Search


def optimize_positions(
        model: nn.Module,
        images: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        n_tokens: int | None = None,
        init: str | torch.Tensor = 'isotropic',
        steps: int = 5,
        lr: float = 3e-3,
        optimizer: str = 'adamw',
        optimizer_kwargs: dict[str, Any] | None = None,
        objective: str | Objective = 'label',
        keep: str = 'last',
        bounds: str = 'none',
        patience: int | None = None,
        tol: float = 0.,
        record: bool = True,
        amp_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        saliency: Saliency | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        optimize: str | Sequence[str] = ('position',),
) -> OracleResult:
    """Search the placement of each image by gradient descent on its own loss (SPoT-ON).

    The model works in eval mode with frozen parameters and is left as it was; so are torch's random generators. An
    image's result depends on that image only, not on its batch.

    Args:
        model: A subpixel ViT.
        images: (B, C, H, W), as the model takes them.
        targets: (B,) class indices, needed by the objective 'label'; given to others, they only set `correct_*`.
        n_tokens: Budget; by default the model's own, or that of `init`.
        init: Where to start: name of a sampler, that of the model's own placer (`model.placer.name`, for a placement
            network), or a placement (B, N, 2) or (N, 2), with sizes (B, N, 3), (B, N, 4). Without `generator`, a
            stochastic sampler gives every image the one placement that the model in eval mode would draw by its seed.
            Sizes go by the model's coverage.
        steps: Steps of the optimizer, at least 0.
        lr: Learning rate, in units of the image's side for optimizers such as adamw.
        optimizer: Name of any first-order optimizer of timm.optim. Every image's placement is a parameter of its own.
        optimizer_kwargs: Keywords for it. `weight_decay` is 0.01 unless given, as in the paper's search.
        objective: 'label' (the paper's), 'entropy', 'teacher', 'feature', or a function, see
            `timm_spot.tasks.search.objectives`. The full budget that the last two agree with is one token for each
            whole patch of the image, evenly placed.
        keep: 'last' (the paper's), or 'best', the placement of lowest loss among start and steps, for each image.
        bounds: 'none' (the paper's: positions may leave the image), 'clamp' to the image or 'reflect' at its edges.
        patience: Stop an image when its loss has not fallen by more than `tol` for this many steps.
        tol: Smallest fall of the loss that counts, for `patience`.
        record: Keep the trajectory.
        amp_dtype: Run the model under autocast to this type; positions, windows and losses stay float32. The gradient
            is not rescaled: bfloat16 is safe, float16 may lose small gradients.
        chunk_size: Images searched at a time, all by default.
        saliency: Map (B, H, W) or a function from images to one, for samplers that need it; by default the model's.
        generator: Source of the start of a stochastic `init`, drawn for each image anew.
        callback: Called as callback(step, index, positions, losses) at the start (step 0) and after each step, with
            the images still searched: index (b,), positions (b, N, 2) and losses (b,).
        optimize: What moves: 'position', 'size', or both. Sizes move in their logarithm: a step of lr = 0.003 makes a
            window 3 % larger or smaller. Spacings stay between a quarter of a pixel and the longer side of the image.
            The placements found then have spacings, (B, N, 4).

    Raises:
        TypeError: Something that is no subpixel ViT, tensor or int where one is needed.
        ValueError: A wrong shape, range or name; 'label' without targets; an optimizer that needs second derivatives;
            a loss or gradient that is not finite (it names the image).

    Example:
        >>> import timm, torch, timm_spot
        >>> model = timm.create_model('spot_vit_pico_patch8_64', num_classes=10)
        >>> images, targets = torch.rand(2, 3, 64, 64), torch.tensor([3, 7])
        >>> result = timm_spot.optimize_positions(model, images, targets, n_tokens=9, steps=2)
        >>> result.positions.shape, result.trajectory.shape, result.losses.shape
        (torch.Size([2, 9, 2]), torch.Size([2, 3, 9, 2]), torch.Size([2, 3]))
    """
    search = Search(
        steps=steps, lr=lr, optimizer=optimizer, optimizer_kwargs=optimizer_kwargs, objective=objective, keep=keep,
        bounds=bounds, patience=patience, tol=tol, record=record, amp_dtype=amp_dtype, chunk_size=chunk_size,
        optimize=optimize)
    _check_inputs(model, images, targets, search)
    device = images.device
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == 'cuda' else []))
        stack.enter_context(frozen(model))
        # A tensor born under inference_mode could not take part in a backward pass.
        images = images.clone() if images.is_inference() else images
        targets = targets.to(device) if targets is not None else None
        start = search.bound(starting_positions(model, images, init, n_tokens, saliency, generator))
        if 'size' in search.optimize and start.shape[-1] == 2:
            start = F.pad(start, (0, 2), value=1.)  # windows of single pixels
        evaluate = Evaluator(model, images, targets, search)
        largest = max(images.shape[-2:])  # spacing that windows can have
        result = OracleResult.concat(
            [descend(search, evaluate, start[i], i, callback, largest) for i in evaluate.chunks])
        if targets is not None:
            result.correct_before = result.logits_before.argmax(dim=-1) == targets
            result.correct_after = result.logits_after.argmax(dim=-1) == targets
        return result


def _check_inputs(model: nn.Module, images: torch.Tensor, targets: torch.Tensor | None, search: Search) -> None:
    if not isinstance(getattr(model, 'patch_embed', None), SubpixelEmbed):
        raise TypeError(f'model must be a subpixel ViT, such as a spot_vit of timm, got {type(model).__name__}.')
    check_images(images, model.patch_embed.window, model.patch_embed.in_chans)
    if 'size' in search.optimize:
        check_sized(model.patch_embed.convention, f'optimize={search.optimize!r} moves sizes')
    if targets is not None:
        _check_targets(targets, images, model.num_classes)
    elif 'targets' in get_objective(search.objective)[1]:
        raise ValueError(f'objective={search.objective!r} needs targets, a tensor of {len(images)} class indices.')


def _check_targets(targets: torch.Tensor, images: torch.Tensor, num_classes: int) -> None:
    if not isinstance(targets, torch.Tensor) or targets.dtype != torch.int64:
        raise TypeError(
            f'targets must be an int64 tensor of class indices, got {getattr(targets, "dtype", type(targets))}.')
    if targets.shape != images.shape[:1]:
        raise ValueError(
            f'targets of shape {tuple(targets.shape)} do not match {len(images)} images, use ({len(images)},).')
    if num_classes == 0:
        raise ValueError('targets need a classifier, the model was built with num_classes=0.')
    wrong = ((targets < 0) | (targets >= num_classes)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f'targets[{wrong[0]}]={targets[wrong[0]].item()} is no class, the model has classes 0 to {num_classes - 1}.'
        )
