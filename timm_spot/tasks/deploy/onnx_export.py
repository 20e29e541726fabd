"""Export of a subpixel ViT to one ONNX file, verified after writing."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...models.placing import at_budget
from ..evaluation.flops import count_flops
from ..extras import need
from ..kept import whole_file
from ..pictures.classes import label_names
from ..pictures.datasets import DIGITS, Pictures
from .fidelity import Fidelity, compare, read_batches
from .onnx_graph import finish, trace_onnx
from .onnx_info import EACH, INSIDE, LATTICE, SHARED, OnnxInfo, describe
from .onnx_model import OnnxModel
from .quantize import quantize_dynamic, quantize_static

TOLERANCE = 1e-4
_CALIBRATED = 128  # pictures by which scales are found
_DIGITS = [str(i) for i in range(10)]


@dataclass(frozen=True)
class OnnxOptions:
    """What kind of file is written.

    Attributes:
        positions_as_input: Whether the placement of each image is an input.
        n_tokens: The one budget of the file; by default any, where the model allows that.
        uint8: Whether images are bytes, which the file normalises.
        precision: 'float32', 'float16' or 'int8'.
        calibrate: Pictures by which the scales of 'int8' are found; without any they follow from each token.
        verify: Pictures on which fewer bits are compared with the model; by default the other half of `calibrate`, for
            a model of digits the held-out ones, or else generated ones.
        force: Whether a file that loses too much is kept.
    """

    positions_as_input: bool = False
    n_tokens: int | None = None
    uint8: bool = False
    precision: str = 'float32'
    calibrate: str | None = None
    verify: str | None = None
    force: bool = False


def precision_of(int8: bool, fp16: bool) -> str:
    """Of the file that these two ask for.

    Raises:
        ValueError: They ask for two.
    """
    if int8 and fp16:
        raise ValueError('int8 and fp16 are two files: give one of them.')
    return 'int8' if int8 else 'float16' if fp16 else 'float32'


def export_onnx(model: nn.Module, path: Path, options: OnnxOptions) -> tuple[float, Fidelity | None]:
    """Write a file, read it back and compare: the largest difference of logits, and for fewer bits how it answers.

    Raises:
        ValueError: Pictures that cannot be read.
        RuntimeError: The file answers otherwise than the model, or loses too much.
    """
    need('onnxruntime')
    info = describe(model, options.n_tokens, options.positions_as_input, options.uint8, options.precision)
    info = replace(info, flops=_flops(model, info))
    # All that is given is opened before the work begins.
    calibration = None if options.calibrate is None else Pictures(options.calibrate)
    held_out = calibration if options.verify is None else Pictures(options.verify)
    proto = trace_onnx(model, info)
    with torch.no_grad(), whole_file(path) as partial:
        if options.precision == 'int8':
            _write(proto, info, partial)
            float_file = OnnxModel(partial)
            proto = quantize_dynamic(proto) if calibration is None else quantize_static(
                proto, _feeds(model, float_file, calibration))
        _write(proto, info, partial)
        file = OnnxModel(partial)
        difference = max(_differences(model, file))
        if options.precision == 'float32':
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{path} was written, but its logits differ from the model's by {difference:.2g}. Nothing was "
                    'kept.')
            return difference, None
        own_half = held_out is not None and held_out is calibration
        fidelity = compare(model, file, held_out or _digits_of(model), first=own_half, step=1 + own_half)
        if fidelity.verdict and not options.force:
            raise RuntimeError(
                f'{path} was written in {options.precision}, but {fidelity.verdict}. Nothing was kept: force keeps it '
                'nevertheless.')
    return difference, fidelity


def _write(proto: object, info: OnnxInfo, path: Path) -> None:
    import onnx

    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    finish(whole, info)
    onnx.save(whole, path)


def _differences(model: nn.Module, file: OnnxModel) -> Iterator[float]:
    """Largest differences of logits, of other batches, sizes and budgets than the file was traced with."""
    info, generator = file.info, torch.Generator().manual_seed(0)
    (H, W), n_tokens = info.image_size, model.n_tokens
    cases = [(2, (H, W), n_tokens), (3, (H, W), n_tokens + 2)]
    if info.any_size:
        cases.append((1, (H + info.window, W + 2 * info.window), max(1, n_tokens // 2)))
    for batch, size, n in cases:
        images = torch.rand(batch, info.channels, *size, generator=generator)
        images = (255 * images).to(torch.uint8) if info.images == 'uint8' else 4 * images - 2
        placement = None
        if info.placement in (SHARED, EACH):
            # A sampler may have no such budget.
            placement = torch.rand(batch, n, info.columns, generator=generator)
            placement[..., 2:] = 1. + 3. * placement[..., 2:]
            placement = placement[0] if info.placement == SHARED else placement
        at = model
        if info.placement == LATTICE:
            at = at_budget(model, n)
        positions = None if placement is None else placement.numpy()
        answer = file(images.numpy(), n_tokens=n if info.placement == LATTICE else None, positions=positions)
        yield (torch.from_numpy(answer) - at(images, placement)).abs().max().item()
    if info.placement == SHARED:
        images = torch.zeros(1, info.channels, H, W, dtype=torch.uint8)
        own = model(images if info.images == 'uint8' else model.patch_embed.normalize(images))
        yield (torch.from_numpy(file(images.numpy())) - own).abs().max().item()


def _feeds(model: nn.Module, file: OnnxModel, pictures: Pictures) -> Iterator[dict[str, np.ndarray]]:
    """Every second picture, at the model's budget and where it can be chosen at a quarter of that."""
    budgets = [None, max(1, model.n_tokens // 4)] if file.info.placement in (LATTICE, SHARED) else [None]
    for images, _ in read_batches(file, pictures, 0, 2, _CALIBRATED):
        for n in budgets:
            positions = None
            if file.info.placement == EACH:
                positions = model.place(model.patch_embed.normalize(torch.from_numpy(images))).numpy()
            yield file.feed(images, n, positions)


def _digits_of(model: nn.Module) -> Pictures | None:
    """The held-out digits, for a model of digits."""
    if label_names(model) != _DIGITS:
        return None
    try:
        return Pictures(DIGITS)
    except ModuleNotFoundError:
        return None


@torch.no_grad()
def _flops(model: nn.Module, info: OnnxInfo) -> tuple[float, float, float]:
    """Operations of one image at N tokens, a + b N + c N^2."""
    images = torch.zeros(1, info.channels, *info.image_size)
    if info.placement == INSIDE:
        return float(count_flops(model, images)), 0., 0.
    budgets = (4, 8, 16)
    if info.placement == LATTICE:
        counts = [count_flops(at_budget(model, n), images) for n in budgets]
    else:
        counts = [count_flops(model, images, torch.full((n, info.columns), 0.5)) for n in budgets]
    a, b, c = np.linalg.solve(np.vander(budgets, 3, increasing=True).astype(float), np.array(counts, float))
    return float(round(a)), float(round(b)), float(round(c))
