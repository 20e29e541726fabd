"""Export of a model to ONNX or to PyTorch's exported program, verified after writing."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ...models.checkpoint_file import check_utf8
from ...models.placement import SampledPlacer
from ...models.placing import at_budget
from ...models.spot_vit import SubpixelVisionTransformer
from ..deploy.fidelity import Fidelity
from ..deploy.onnx_export import TOLERANCE, OnnxOptions, export_onnx, precision_of
from ..kept import check_overwrite, whole_file


def export_model(
        model: nn.Module,
        path: str | Path,
        positions_as_input: bool = False,
        *,
        n_tokens: int | None = None,
        uint8: bool = False,
        int8: bool = False,
        fp16: bool = False,
        calibrate: str | Path | None = None,
        verify: str | Path | None = None,
        force: bool = False,
        overwrite: bool = False,
) -> float:
    """Write a model as `.onnx` or `.pt2`, read it back and compare its answers.

    The file appears under its name once it was compared, or not at all. The batch is dynamic. An `.onnx`, which
    `timm_spot.OnnxModel` reads, takes `images` (B, C, H, W) of any size, and any budget, if the model allows it; with
    `n_tokens`, and in a `.pt2`, both are fixed, and what places tokens is part of the file. The output is `logits`.

    Args:
        model: A subpixel ViT in eval mode, on the CPU.
        path: File to write; its suffix says which kind. ONNX needs the extra `export`.
        positions_as_input: Whether the placement is an input, (B, N, 2), of a model that places sizes (B, N, 4).
        n_tokens: The one budget of the file.
        uint8: Whether images are bytes, which the file normalises; else they are normalised float32.
        int8: Whether the blocks multiply bytes.
        fp16: Whether weights and features are in half precision, for runtimes on a GPU.
        calibrate: Pictures (a folder, a tar, 'digits') by which the scales of int8 activations are found once for all;
            without them they follow from each token.
        verify: Pictures on which int8 and fp16 are compared with the model; by default those of `calibrate` by which no
            scale was found, for a model of digits the held-out ones, or else generated ones.
        force: Whether a file is kept that loses more than 0.5 points, or without labels changes 3 % of the answers.
        overwrite: Whether a file that is there is written over.

    Returns:
        The largest difference between the file's and the model's logits.

    Raises:
        ValueError: Another suffix, a model in train mode, a sampler whose placement depends on the image without
            `positions_as_input`, options that do not go together.
        TypeError: `model` is no subpixel ViT.
        OSError: There is no such folder; there is such a file, without `overwrite`.
        ModuleNotFoundError: The packages for ONNX are missing.
        RuntimeError: The file answers differently from the model, by more than 1e-4, or in fewer bits loses too much.

    Example:
        >>> import tempfile, timm, timm_spot
        >>> model = timm.create_model('spot_vit_pico_patch8_64', n_tokens=9, depth=1).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     difference = timm_spot.export_model(model, f'{folder}/model.pt2')
        >>> difference < 1e-4
        True
    """
    options = OnnxOptions(
        positions_as_input, n_tokens, uint8, precision_of(int8, fp16),
        None if calibrate is None else str(calibrate), None if verify is None else str(verify), force)
    return export_with(model, path, options, overwrite)[0]


def export_with(
        model: nn.Module,
        path: str | Path,
        options: OnnxOptions,
        overwrite: bool = False,
) -> tuple[float, Fidelity | None]:
    """`export_model`, and how a file in fewer bits answers."""
    path = Path(path)
    _check(model, path, options)
    check_overwrite([path], overwrite)
    if options.n_tokens is not None:
        model = at_budget(model, options.n_tokens)
    if path.suffix == '.onnx':
        return export_onnx(model, path, options)
    with torch.no_grad(), whole_file(path) as partial:
        _write_program(model, partial, _inputs(model, 2, model.n_tokens, options.positions_as_input))
        answer = _read_program(partial)
        differences = []
        # Another batch and budget than the file was traced with.
        for batch_size, n in ((2, model.n_tokens), (3, model.n_tokens + 2)):
            inputs = _inputs(model, batch_size, n, options.positions_as_input)
            differences.append((answer(*inputs) - model(*inputs)).abs().max().item())
        difference = max(differences)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f'{path} was written, but its logits differ from the model\'s by {difference:.2g}. Nothing was kept.')
    return difference, None


def _check(model: nn.Module, path: Path, options: OnnxOptions) -> None:
    if path.suffix not in ('.onnx', '.pt2'):
        raise ValueError(f"path={str(path)!r} must end in '.onnx' or '.pt2'.")
    if path.suffix == '.onnx':
        check_utf8(path)
    if path.suffix == '.pt2' and (options.uint8 or options.precision != 'float32'):
        raise ValueError(f'path={str(path)!r}: files of bytes or half precision are ONNX, ending in .onnx.')
    if options.precision != 'int8' and options.calibrate is not None:
        raise ValueError(f'calibrate={options.calibrate!r} finds the scales of int8: ask for that too.')
    if options.precision == 'float32' and (options.verify is not None or options.force):
        raise ValueError('verify and force are for int8 and fp16: float32 always answers as the model does.')
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f'{path.absolute().parent}, in which {path.name} is to be written, is no folder.')
    if not isinstance(model, SubpixelVisionTransformer):
        raise TypeError(f'model must be a subpixel ViT, got {type(model).__name__}.')
    if model.training:
        raise ValueError('model is in train mode, in which it draws its placements: call model.eval() first.')
    if options.uint8 and model.normalization is None:
        raise ValueError('uint8=True, but the model does not say how to normalise: call patch_embed.set_normalization.')
    placer = model.placer
    if isinstance(placer, SampledPlacer) and placer.reads_images and not options.positions_as_input:
        raise ValueError(
            f'{placer.source} places tokens by the image, which a file with a fixed placement cannot: export with '
            'positions_as_input=True, or choose another sampler.')


def _inputs(model: nn.Module, batch_size: int, n_tokens: int, positions_as_input: bool) -> tuple[torch.Tensor, ...]:
    embed, generator = model.patch_embed, torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, embed.proj.in_channels, *embed.img_size, generator=generator)
    positions = torch.rand(batch_size, n_tokens, 2, generator=generator)
    if model.placer.prior.has_sizes:
        spacing = 1. + 3. * torch.rand(batch_size, n_tokens, 2, generator=generator)
        positions = torch.cat([positions, spacing], dim=-1)
    return (images, positions) if positions_as_input else (images,)


def _write_program(model: nn.Module, path: Path, inputs: tuple[torch.Tensor, ...]) -> None:
    with path.open('wb') as file:  # torch takes no name that is not UTF-8
        torch.export.save(torch.export.export(model, inputs, dynamic_shapes=_dynamic(inputs)), file)


def _read_program(path: Path) -> Callable[..., torch.Tensor]:
    with path.open('rb') as file:
        return torch.export.load(file).module()


def _dynamic(inputs: tuple[torch.Tensor, ...]) -> tuple[dict, ...]:
    dynamic = torch.export.Dim.DYNAMIC
    return ({0: dynamic}, {0: dynamic, 1: dynamic})[:len(inputs)]
