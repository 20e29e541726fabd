"""Export of a model to ONNX or to PyTorch's exported program, verified after writing."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ...models.placement import SampledPlacer
from ...models.spot_vit import SubpixelVisionTransformer
from ..kept import whole_file

TOLERANCE = 1e-4


def export_model(model: nn.Module, path: str | Path, positions_as_input: bool = False) -> float:
    """Write a model as `.onnx` or `.pt2` with dynamic batch, read it back and compare its answers.

    The file appears under its name once it was compared, or not at all.

    Inputs are `images` (B, C, H, W) of the model's nominal size, normalised, and, if asked for, `positions` (B, N, 2)
    of any budget N, of a model that places sizes (B, N, 4) with spacings; the output is `logits`. Without positions the
    placement of the model's sampler is part of the file, or the network that places its tokens.

    Args:
        model: A subpixel ViT in eval mode, on the CPU.
        path: File to write; its suffix says which kind. ONNX needs the extra `export`.
        positions_as_input: Whether the placement is an input of the file.

    Returns:
        The largest difference between the file's and the model's logits.

    Raises:
        ValueError: Another suffix, a model in train mode, a sampler whose placement depends on the image without
            `positions_as_input`.
        TypeError: `model` is no subpixel ViT.
        FileNotFoundError: There is no such folder.
        ModuleNotFoundError: The packages for ONNX are missing.
        RuntimeError: The file answers differently from the model, by more than 1e-4.

    Example:
        >>> import tempfile, timm, timm_spot
        >>> model = timm.create_model('spot_vit_pico_patch8_64', n_tokens=9, depth=1).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     difference = timm_spot.export_model(model, f'{folder}/model.pt2')
        >>> difference < 1e-4
        True
    """
    path = Path(path)
    _check(model, path, positions_as_input)
    write, read = (_write_onnx, _read_onnx) if path.suffix == '.onnx' else (_write_program, _read_program)
    with torch.no_grad(), whole_file(path) as partial:
        write(model, partial, _inputs(model, 2, model.n_tokens, positions_as_input))
        answer = read(partial)
        differences = []
        # Another batch and budget than the file was traced with.
        for batch_size, n_tokens in ((2, model.n_tokens), (3, model.n_tokens + 2)):
            inputs = _inputs(model, batch_size, n_tokens, positions_as_input)
            differences.append((answer(*inputs) - model(*inputs)).abs().max().item())
        difference = max(differences)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f'{path} was written, but its logits differ from the model\'s by {difference:.2g}. Nothing was kept.')
    return difference


def _check(model: nn.Module, path: Path, positions_as_input: bool) -> None:
    if path.suffix not in ('.onnx', '.pt2'):
        raise ValueError(f"path={str(path)!r} must end in '.onnx' or '.pt2'.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f'{path.absolute().parent}, in which {path.name} is to be written, is no folder.')
    if not isinstance(model, SubpixelVisionTransformer):
        raise TypeError(f'model must be a subpixel ViT, got {type(model).__name__}.')
    if model.training:
        raise ValueError('model is in train mode, in which it draws its placements: call model.eval() first.')
    placer = model.placer
    if isinstance(placer, SampledPlacer) and placer.reads_images and not positions_as_input:
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
    torch.export.save(torch.export.export(model, inputs, dynamic_shapes=_dynamic(inputs)), path)


def _read_program(path: Path) -> Callable[..., torch.Tensor]:
    return torch.export.load(path).module()


def _write_onnx(model: nn.Module, path: Path, inputs: tuple[torch.Tensor, ...]) -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(f"ONNX needs {e.name}: pip install 'timm-spot[export]'.", name=e.name) from e
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the exporter's own use of what it deprecates
        torch.onnx.export(
            model, inputs, path, dynamo=True, dynamic_shapes=_dynamic(inputs), verbose=False, external_data=False,
            input_names=['images', 'positions'][:len(inputs)], output_names=['logits'])


def _read_onnx(path: Path) -> Callable[..., torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    names = [i.name for i in session.get_inputs()]

    def answer(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(['logits'], {n: x.numpy() for n, x in zip(names, inputs)})[0])

    return answer


def _dynamic(inputs: tuple[torch.Tensor, ...]) -> tuple[dict, ...]:
    dynamic = torch.export.Dim.DYNAMIC
    return ({0: dynamic}, {0: dynamic, 1: dynamic})[:len(inputs)]
