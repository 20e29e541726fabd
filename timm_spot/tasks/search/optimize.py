"""SPoT-ON: the placement of each image searched by gradient, an upper bound on what a budget of tokens can do.

Paper: `SPoT: Subpixel Placement of Tokens in Vision Transformers` - https://arxiv.org/abs/2507.01654

The model is frozen; only the positions move. With the objective 'label' the search sees the true class, so its accuracy
says how good a placement exists, not how good a placement can be found for a new image. The other objectives
(`objectives.py`) need no label.
"""
from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from torch import nn

from ...models.placement import Saliency
from ...models.subpixel_embed import SubpixelEmbed
from ...ops.samplers import sample_positions
from ...ops.windows import check_images
from .draws import starting_positions
from .objectives import Objective, get_objective
from .result import OracleResult

Callback = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]

_WEIGHT_DECAY = 0.01  # what torch.optim.AdamW does unasked, and so did the authors' search


def optimize_positions(
        model: nn.Module,
        images: torch.Tensor,
        targets: Optional[torch.Tensor] = None,
        *,
        n_tokens: Optional[int] = None,
        init: Union[str, torch.Tensor] = 'isotropic',
        steps: int = 5,
        lr: float = 3e-3,
        optimizer: str = 'adamw',
        optimizer_kwargs: Optional[Dict[str, Any]] = None,
        objective: Union[str, Objective] = 'label',
        keep: str = 'last',
        bounds: str = 'none',
        patience: Optional[int] = None,
        tol: float = 0.,
        record: bool = True,
        amp_dtype: Optional[torch.dtype] = None,
        chunk_size: Optional[int] = None,
        saliency: Optional[Saliency] = None,
        generator: Optional[torch.Generator] = None,
        callback: Optional[Callback] = None,
) -> OracleResult:
    """Search the placement of each image by gradient descent on its own loss (SPoT-ON).

    The model works in eval mode with frozen parameters and is left as it was; so are torch's random generators. An
    image's result depends on that image only, not on its batch.

    Args:
        model: A subpixel ViT.
        images: (B, C, H, W), as the model takes them.
        targets: (B,) class indices, needed by the objective 'label'; given to others, they only set `correct_*`.
        n_tokens: Budget; by default the model's own, or that of `init`.
        init: Where to start: name of a sampler, or a placement (B, N, 2) or (N, 2). Without `generator`, a stochastic
            sampler gives every image the one placement that the model in eval mode would draw by its seed.
        steps: Steps of the optimizer, at least 0.
        lr: Learning rate, in units of the image's side for optimizers such as adamw.
        optimizer: Name of any first-order optimizer of timm.optim. Every image's placement is a parameter of its own.
        optimizer_kwargs: Keywords for it. `weight_decay` is 0.01 unless given, as in the paper's search.
        objective: 'label' (the paper's), 'entropy', 'teacher', 'feature', or a function, see
            `timm_spot.tasks.objectives`. The full budget that the last two agree with is one token for each whole patch
            of the image, evenly placed.
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
    if not isinstance(getattr(model, 'patch_embed', None), SubpixelEmbed):
        raise TypeError(f'model must be a subpixel ViT, such as a spot_vit of timm, got {type(model).__name__}.')
    check_images(images, model.patch_embed.window)
    if not len(images):
        raise ValueError(f'images of shape {tuple(images.shape)} hold no image.')
    _check_choice('keep', keep, ('last', 'best'))
    _check_choice('bounds', bounds, tuple(_BOUNDS))
    _check_int('steps', steps, 0)
    if patience is not None:
        _check_int('patience', patience, 1)
    if chunk_size is not None:
        _check_int('chunk_size', chunk_size, 1)
    function, keywords = get_objective(objective)
    if 'targets' in keywords and targets is None:
        raise ValueError(f'objective={objective!r} needs targets, a tensor of {len(images)} class indices.')
    if targets is not None:
        _check_targets(targets, images, model.num_classes)
    if get_optimizer_info(optimizer).second_order:
        raise ValueError(f'optimizer={optimizer!r} needs second derivatives, the search has first ones only.')

    device = images.device
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == 'cuda' else []))
        stack.enter_context(_frozen(model))
        # A tensor born under inference_mode could not take part in a backward pass.
        images = images.clone() if images.is_inference() else images
        everything = torch.arange(len(images), device=device)
        chunks = everything.split(chunk_size or len(images))

        start = _BOUNDS[bounds](starting_positions(model, images, init, n_tokens, saliency, generator))
        given = dict(index=everything)
        if targets is not None:
            given['targets'] = targets.to(device)
        wanted = [k for k in keywords if k.startswith('full_')]
        if wanted:
            full = [_forward(model, images[i], _full_placement(model, images), amp_dtype) for i in chunks]
            given.update({k: torch.cat([output[k.removeprefix('full_')] for output in full]) for k in wanted})

        def evaluate(index: torch.Tensor, positions: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
            output = _forward(model, images[index], positions, amp_dtype)
            available = {**output, **{k: v[index] for k, v in given.items()}}
            losses = function(**{k: available[k] for k in keywords})
            if not isinstance(losses, torch.Tensor) or losses.shape != index.shape:
                raise ValueError(
                    f'objective={objective!r} must return one loss for each image, a tensor of shape '
                    f'{tuple(index.shape)}, got {getattr(losses, "shape", losses)}.')
            if positions.requires_grad and not losses.requires_grad:
                raise ValueError(f'objective={objective!r} returns losses that do not depend on the positions.')
            return output['logits'], losses

        def make_optimizer(places: List[torch.Tensor]) -> torch.optim.Optimizer:
            arguments = {'weight_decay': _WEIGHT_DECAY, **(optimizer_kwargs or {})}
            if 'kron' in optimizer:
                arguments.setdefault('deterministic', True)  # else it draws from torch's generator
            return create_optimizer_v2(places, optimizer, lr=lr, **arguments)

        result = OracleResult.concat([
            _search(
                evaluate, start[i], i, steps=steps, make_optimizer=make_optimizer, bound=_BOUNDS[bounds],
                keep_best=keep == 'best', patience=patience, tol=tol, record=record, callback=callback)
            for i in chunks])
        if targets is not None:
            result.correct_before = result.logits_before.argmax(dim=-1) == given['targets']
            result.correct_after = result.logits_after.argmax(dim=-1) == given['targets']
        return result


def _search(
        evaluate: Callable[[torch.Tensor, torch.Tensor], Tuple[torch.Tensor, torch.Tensor]],
        start: torch.Tensor,
        index: torch.Tensor,
        *,
        steps: int,
        make_optimizer: Callable[[List[torch.Tensor]], torch.optim.Optimizer],
        bound: Callable[[torch.Tensor], torch.Tensor],
        keep_best: bool,
        patience: Optional[int],
        tol: float,
        record: bool,
        callback: Optional[Callback],
) -> OracleResult:
    """Search images `index` (B,) from `start` (B, N, 2); `evaluate(index, positions)` gives logits and losses."""
    current = start.clone()
    places = list(current.unbind())  # views: the optimizers move `current` itself
    optimizers = [make_optimizer(places)]
    if 'max_grad_norm' in optimizers[0].defaults or hasattr(optimizers[0], 'rng'):
        # lamb clips by the norm over all its parameters, kron draws for all from one source: images would mix.
        optimizers = [make_optimizer([place]) for place in places]

    active = torch.arange(len(start), device=start.device)
    stale = torch.zeros_like(active)
    for step in range(steps + 1):
        last = step == steps
        positions = current[active].requires_grad_(not last)  # a copy: optimizers never write to the graph's leaf
        with torch.set_grad_enabled(not last):
            logits, graph = evaluate(index[active], positions)
        logits, losses = logits.detach(), graph.detach()
        _check_finite('loss', losses, index[active], step)
        if step == 0:
            result = OracleResult(
                positions=start.clone(),
                losses=losses[:, None].repeat(1, steps + 1),
                logits_before=logits,
                logits_after=logits.clone(),
                trajectory=start[:, None].repeat(1, steps + 1, 1, 1) if record else None,
            )
            lowest, mark = torch.full_like(losses, torch.inf), torch.full_like(losses, torch.inf)
        # To the end of the row: an image that stops keeps its last values.
        result.losses[active, step:] = losses[:, None]
        if record:
            result.trajectory[active, step:] = current[active][:, None]
        if callback is not None:
            callback(step, index[active], current[active], losses)

        better = losses < lowest[active] if keep_best else torch.ones_like(losses, dtype=torch.bool)
        kept = active[better]
        lowest[kept], result.positions[kept], result.logits_after[kept] = losses[better], current[kept], logits[better]
        if last:
            break
        fell = losses < mark[active] - tol
        mark[active] = torch.where(fell, losses, mark[active])
        stale[active] = torch.where(fell, 0, stale[active] + 1)
        searching = stale[active] < patience if patience is not None else torch.ones_like(fell)
        if not searching.any():
            break

        graph.backward(torch.ones_like(graph))
        _check_finite('gradient', positions.grad.flatten(1).abs().amax(dim=1), index[active], step)
        for place in places:
            place.grad = None  # optimizers pass over these: a finished image stays where it is
        for i, goes_on, gradient in zip(active.tolist(), searching.tolist(), positions.grad):
            if goes_on:
                places[i].grad = gradient
        for optimizer in optimizers:
            optimizer.step()
        current.copy_(bound(current))
        active = active[searching]
    return result


def _forward(
        model: nn.Module,
        images: torch.Tensor,
        positions: torch.Tensor,
        amp_dtype: Optional[torch.dtype],
) -> Dict[str, torch.Tensor]:
    """Logits and pooled features of placements, in float32 at least."""
    with torch.autocast(images.device.type, amp_dtype) if amp_dtype is not None else contextlib.nullcontext():
        tokens = model.forward_features(images, positions)
        output = dict(logits=model.forward_head(tokens), features=model.forward_head(tokens, pre_logits=True))
    return {k: v.to(torch.promote_types(v.dtype, torch.float32)) for k, v in output.items()}


def _full_placement(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """One token for each whole patch of the image, evenly placed, (1, N, 2)."""
    (H, W), window = images.shape[-2:], model.patch_embed.window
    return sample_positions('isotropic', (H // window) * (W // window), (H, W)).to(images.device)[0]


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
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


def _reflect(positions: torch.Tensor) -> torch.Tensor:
    mirrored = 1. - (1. - positions.remainder(2.)).abs()
    return torch.where((positions < 0) | (positions > 1), mirrored, positions)


_BOUNDS: Dict[str, Callable[[torch.Tensor], torch.Tensor]] = dict(
    none=lambda positions: positions,
    clamp=lambda positions: positions.clamp(0., 1.),
    reflect=_reflect,
)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown, use one of {', '.join(map(repr, choices))}.")


def _check_int(name: str, value: int, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be an int, got {value!r} ({type(value).__name__}).')
    if value < smallest:
        raise ValueError(f'{name}={value} must be at least {smallest}.')


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


def _check_finite(what: str, values: torch.Tensor, index: torch.Tensor, step: int) -> None:
    wrong = (~values.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f'the {what} of image {index[wrong[0]].item()} is {values[wrong[0]].item()} at step {step}: look for NaN '
            'or infinity in that image and in the weights, or lower lr.')
