"""A placement network of ten lines, registered, for the tests of what is done with models."""
from __future__ import annotations

from torch import nn

import timm_spot

NAME = 'toy_shift'


@timm_spot.register_placer(NAME)
class ToyPlacer(timm_spot.Placer):
    """An isotropic lattice, moved by a linear function of the image's mean colour."""

    def __init__(self, train_prior, eval_prior):
        super().__init__(train_prior, eval_prior)
        self.net = nn.Linear(3, 2)

    def forward(self, images):
        n = self.budget((images.shape[-2], images.shape[-1]))
        lattice = timm_spot.sample_positions('isotropic', n, tuple(images.shape[-2:])).to(images.device)
        shift = 0.1 * self.net(images.float().mean(dim=(2, 3))).tanh()
        return (lattice + shift[:, None]).clamp(0, 1)
