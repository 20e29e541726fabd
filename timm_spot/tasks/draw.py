"""Pictures of placements (extra `viz`)."""
from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_placement(
        image: torch.Tensor,
        positions: torch.Tensor,
        window: int,
        ax: Optional[Axes] = None,
) -> Axes:
    """Draw an image with the windows of a placement on it.

    Args:
        image: (C, H, W) in [0, 1].
        positions: (N, 2) of (y, x).
        window: Side of a window in pixels.
        ax: Where to draw; a new figure by default.
    """
    import matplotlib.pyplot as plt
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    if ax is None:
        _, ax = plt.subplots(figsize=(4, 4), layout='constrained')
    _, H, W = image.shape
    ax.imshow(image.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).cpu().numpy())
    # imshow puts pixel i's centre at i, a position p lies at p * L - 0.5.
    centres = (positions.detach().cpu() * torch.tensor([H, W]) - 0.5).numpy()
    squares = [Rectangle((x - window / 2, y - window / 2), window, window) for y, x in centres.tolist()]
    ax.add_collection(PatchCollection(squares, facecolor='#0072b240', edgecolor='#ffb000', linewidth=0.8))
    ax.plot(centres[:, 1], centres[:, 0], '.', color='#ffb000', markersize=3)
    ax.set(xlim=(-0.5, W - 0.5), ylim=(H - 0.5, -0.5), xticks=[], yticks=[])
    return ax
