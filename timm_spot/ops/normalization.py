"""Normalization of pixels by a mean and a standard deviation for each channel, as models are trained."""
from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Normalization:
    """What images in [0, 1] have to go through before a model sees them.

    Attributes:
        mean: One value for each channel, of images in [0, 1].
        std: Likewise.

    Example:
        >>> normalize = Normalization(mean=(0.5,), std=(0.25,))
        >>> normalize(torch.tensor([[[0, 255]]], dtype=torch.uint8))
        tensor([[[-2.,  2.]]])
        >>> normalize.undo(torch.tensor([[[-2., 2.]]]))
        tensor([[[0., 1.]]])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def for_channels(self, channels: int) -> Normalization:
        """The same for images of so many channels: their average where the count differs."""
        mean, std = (tuple(v) if len(v) == channels else (sum(v) / len(v),) * channels for v in (self.mean, self.std))
        return Normalization(mean, std)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (..., C, H, W), floating point in [0, 1] or uint8, as a model takes them; float32 of uint8.

        By the operations of timm's transform, so that the results are the same to the last bit.

        Raises:
            TypeError: Other integers, of which nobody knows what is white.
        """
        if not images.is_floating_point() and images.dtype != torch.uint8:
            raise TypeError(f'images are of {images.dtype}: pass floating point in [0, 1], or uint8.')
        mean, std = self._constants(images)
        if images.dtype == torch.uint8:
            return images.to(torch.float32).div_(255).sub_(mean).div_(std)
        return images.sub(mean).div_(std)

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (..., C, H, W) back in [0, 1], up to rounding."""
        mean, std = self._constants(images)
        return images * std + mean

    def _constants(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = images.dtype if images.is_floating_point() else torch.float32
        mean, std = (torch.tensor(v, dtype=dtype, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return mean, std
