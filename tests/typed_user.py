"""A user's file: `make lint` checks its types by what the package says of its own names. It is never run."""
from __future__ import annotations

import timm
import torch

import timm_spot


@timm_spot.register_sampler('middle', deterministic=True)
def middle(n_tokens: int, image_size: tuple[int, int]) -> torch.Tensor:
    return torch.full((n_tokens, 2), 0.5)


@timm_spot.register_placer('corner')
class Corner(timm_spot.Placer):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), self.budget((images.shape[-2], images.shape[-1])), 2)


def main() -> None:
    model = timm_spot.retrofit('vit_tiny_patch16_224', n_tokens=25)
    images, targets = torch.rand(2, 3, 224, 224), torch.tensor([1, 2])
    positions: torch.Tensor = timm_spot.sample_positions('isotropic', 25, (224, 224))[0]
    result: timm_spot.OracleResult = timm_spot.optimize_positions(model, images, targets, steps=2)
    print(result.positions, result.trajectory, model(images, positions=positions))
    windows = timm_spot.sample_windows(images, positions, window=16)
    print(windows.shape, timm_spot.list_samplers(), timm_spot.list_placers())
    pruned = timm_spot.sparsify(model, keep_rate=0.7, scorer='received-attention')
    pruned.set_keep_rate(0.5)
    model.set_placement(n_tokens=9)
    timm_spot.draw_placement(images[0], positions, 16)
    difference: float = timm_spot.export_model(model, 'model.onnx')
    print(difference, timm_spot.spectral_residual(images).shape, timm.list_models('spot_*'))


main()
