"""What a search for placements found, and the file that keeps it."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import to_2tuple

from ...models.checkpoint_file import check_utf8
from ..kept import whole_file


@dataclasses.dataclass
class OracleResult:
    """What a search found, one row for each image.

    Attributes:
        positions: (B, N, 2), the placements kept; with sizes (B, N, 4), spacings (y, x) behind positions.
        losses: (B, steps + 1), the objective at the start and after each step. An image that stopped early keeps its
            last value, here and in `trajectory`.
        logits_before: (B, num_classes) of the start.
        logits_after: (B, num_classes) of `positions`.
        trajectory: (B, steps + 1, N, 2) or (B, steps + 1, N, 4), start and every step; None if it was not recorded.
        correct_before: (B,), whether `logits_before` names the target; None without targets.
        correct_after: (B,), the same of `logits_after`.
    """

    positions: torch.Tensor
    losses: torch.Tensor
    logits_before: torch.Tensor
    logits_after: torch.Tensor
    trajectory: torch.Tensor | None = None
    correct_before: torch.Tensor | None = None
    correct_after: torch.Tensor | None = None

    def snap(self, grid: int | tuple[int, int]) -> torch.Tensor:
        """Positions moved to the nearest patch centre, (B, N, 2), to compare with what a grid allows.

        Tokens that share a nearest patch stay doubled; sizes, (B, N, 4), stay as they are.

        Args:
            grid: Rows and columns of patches, such as `model.patch_embed.grid_size`.
        """
        rows, columns = to_2tuple(grid)
        if min(rows, columns) < 1:
            raise ValueError(f'grid={grid} must have at least one row and column.')
        cells = self.positions.new_tensor([rows, columns])
        positions, sizes = self.positions[..., :2], self.positions[..., 2:]
        snapped = ((positions * cells).floor().clamp(min=0.).minimum(cells - 1) + 0.5) / cells
        return torch.cat([snapped, sizes], dim=-1)

    def to_safetensors(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write to a file, whole or not at all.

        Args:
            path: The file; its folder exists.
            metadata: For the file's header. With more than one entry their order, and so the bytes, may vary.
        """
        check_utf8(path)
        tensors = {k: v.cpu().contiguous() for k, v in self._tensors().items()}
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata=metadata)

    @classmethod
    def from_safetensors(cls, path: str | Path) -> OracleResult:
        """Read what `to_safetensors` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or holds something else.
        """
        check_utf8(path)
        try:
            tensors = load_file(path)
        except SafetensorError as e:
            raise ValueError(f'{path} is no whole safetensors file ({e}): it is damaged, or something else.') from e
        fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}
        missing = [name for name, required in fields.items() if required and name not in tensors]
        unknown = [name for name in tensors if name not in fields]
        if missing or unknown:
            raise ValueError(f'{path} is no oracle result: it lacks {missing} and has the unknown {unknown}.')
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if len({shape[:1] for shape in shapes.values()}) > 1 or len(shapes['positions']) != 3:
            raise ValueError(f'{path} is no oracle result, which has a row for each image: its shapes are {shapes}.')
        return cls(**tensors)

    @classmethod
    def concat(cls, results: Sequence[OracleResult]) -> OracleResult:
        """Join the rows of results of the same budget and number of steps.

        Raises:
            ValueError: No result, or results that differ in what they hold.
        """
        if not results:
            raise ValueError('results is empty, there is nothing to join.')
        kinds = [{k: tuple(v.shape[1:]) for k, v in r._tensors().items()} for r in results]
        for i, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise ValueError(f'results differ: number 0 has rows of {kinds[0]}, number {i} of {kind}.')
        return cls(**{k: torch.cat([getattr(r, k) for r in results]) for k in kinds[0]})

    def _tensors(self) -> dict[str, torch.Tensor]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in fields.items() if v is not None}
