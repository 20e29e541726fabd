"""Where a search starts, and what an evaluation draws: placements of images of a data set, each by its own number."""
from __future__ import annotations

from typing import Optional, Union

import torch
from torch import nn

from ...models.placement import Saliency, compute_saliency
from ...ops.samplers import check_n_tokens, sample_positions
from ...ops.windows import check_positions


def starting_positions(
        model: nn.Module,
        images: torch.Tensor,
        init: Union[str, torch.Tensor] = 'isotropic',
        n_tokens: Optional[int] = None,
        saliency: Optional[Saliency] = None,
        generator: Optional[torch.Generator] = None,
) -> torch.Tensor:
    """Where `optimize_positions` starts: (B, N, 2), a copy. Arguments and errors are its own."""
    embed, size = model.patch_embed, tuple(images.shape[-2:])
    if isinstance(init, torch.Tensor):
        check_positions(init, images)
        if n_tokens is not None and n_tokens != init.shape[-2]:
            raise ValueError(f'n_tokens={n_tokens}, but init of shape {tuple(init.shape)} has {init.shape[-2]} tokens.')
        return init.detach().expand(len(images), -1, -1).clone()
    prior = model.placer.prior
    n_tokens = prior.budgets(size)[1] if n_tokens is None else n_tokens
    check_n_tokens(n_tokens)
    saliency = prior.saliency if saliency is None else saliency
    maps = compute_saliency(saliency, embed.normalize(images))
    # Without a generator all images share one placement, as in a model in eval mode: drawn by its seed alone.
    shared = generator is None
    generator = torch.Generator().manual_seed(prior.seed) if shared else generator
    positions = sample_positions(init, n_tokens, size, 1 if shared else len(images), maps, generator, embed.window)
    return positions.to(images.device).expand(len(images), -1, -1).clone()


def image_generator(seed: int, index: int) -> torch.Generator:
    """Source of randomness for image number `index` of a dataset, whichever batch or process it falls to."""
    return torch.Generator().manual_seed(1_000_003 * seed + index)


def draw_placements(
        model: nn.Module,
        images: torch.Tensor,
        sampler: str,
        n_tokens: Optional[int],
        maps: Optional[torch.Tensor],
        index: torch.Tensor,
        seed: int,
) -> torch.Tensor:
    """Placements (B, N, 2) of images of a dataset, drawn for each by `seed` and its number in `index` (B,)."""
    return torch.cat([
        starting_positions(
            model, images[j:j + 1], sampler, n_tokens, None if maps is None else maps[j], image_generator(seed, i))
        for j, i in enumerate(index.tolist())])
