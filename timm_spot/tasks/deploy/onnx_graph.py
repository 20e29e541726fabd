"""A subpixel ViT as an ONNX graph: any image size and any budget where the model allows it, uint8 images, defaults.

An input that has a default may be left out: it is an initializer of the same name (ONNX allows that since version 4 of
its format), so that one file answers with the model's own placement, and with any other that it is given.
"""
from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...models.density_placer import in_colour, start_lattice, thumbnail_weights
from ...models.placement import fixed_placement
from ..extras import need
from .onnx_info import EACH, INSIDE, KEY, LATTICE, OnnxInfo

if TYPE_CHECKING:
    import onnx

IMAGES, POSITIONS, LOGITS = 'images', 'positions', 'logits'
LATTICE_INPUTS = ('lattice', 'rows', 'columns')  # of the network that carries it, and what makes its thumbnail
OPSET = 20


class Deployed(nn.Module):
    """A model as its file is called: images, as floats or bytes, and what places its tokens.

    Args:
        model: A subpixel ViT in eval mode.
        info: Of the file.
    """

    def __init__(self, model: nn.Module, info: OnnxInfo) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half() if info.precision == 'float16' else model
        self.image_size = info.image_size

    def forward(
            self,
            images: torch.Tensor,
            placement: torch.Tensor | None = None,
            rows: torch.Tensor | None = None,
            columns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        images = self.model.patch_embed.normalize(images)
        if rows is not None:  # the placement is a lattice for a network, which sees a thumbnail by rows and columns
            density = self.model.placer.thumbnail_density(rows @ in_colour(images) @ columns)
            placement = self.model.placer.carry(placement, density, self.image_size)
        return self.model(images, placement).float()


def placement_inputs(info: OnnxInfo, n_tokens: int, image_size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What a file is given, beside the images, to place a budget of tokens as its model does.

    Raises:
        ValueError: The sampler has no such budget.
    """
    cpu = torch.device('cpu')
    if info.placement == LATTICE:
        lattice = start_lattice(n_tokens, image_size, cpu, cells=False)
        return dict(zip(LATTICE_INPUTS, (lattice, *thumbnail_weights(image_size))))
    placed = fixed_placement(
        info.sampler, n_tokens, image_size, info.window, cpu, info.seed, info.coverage, info.n_coarse)
    return {POSITIONS: placed if info.placement == EACH else placed[0]}


def trace_onnx(model: nn.Module, info: OnnxInfo) -> onnx.ModelProto:
    """The graph of a model; its placement, where it is no part of it, is an input without a default as yet."""
    for module in ('onnx', 'onnxruntime', 'onnxscript'):
        need(module)
    inputs = _examples(info, model.n_tokens)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # the exporter's own use of what it deprecates
        program = torch.onnx.export(
            Deployed(model, info), tuple(inputs.values()), dynamo=True, dynamic_shapes=_dynamic(info, inputs),
            opset_version=OPSET, verbose=False, input_names=list(inputs), output_names=[LOGITS])
    return program.model_proto


def finish(proto: onnx.ModelProto, info: OnnxInfo) -> None:
    """Write the record of a file into it, and the model's own placement as the default of its inputs."""
    from onnx import helper, numpy_helper

    helper.set_model_props(proto, {KEY: info.to_json()})
    if info.placement in (INSIDE, EACH):
        return
    for name, value in placement_inputs(info, info.budget(info.image_size), info.image_size).items():
        proto.graph.initializer.append(numpy_helper.from_array(value.contiguous().numpy(), name))


def _examples(info: OnnxInfo, n_tokens: int) -> dict[str, torch.Tensor]:
    """Inputs of the right shapes, none of whose sides that may change is like another."""
    size = (info.image_size[0] + 2 * info.window, info.image_size[1] + 3 * info.window)
    size = size if info.any_size else info.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, info.channels, *size, generator=generator)
    inputs = {IMAGES: (255 * images).to(torch.uint8) if info.images == 'uint8' else images}
    if info.placement == LATTICE:
        inputs.update(placement_inputs(info, max(2, n_tokens), size))
    elif info.placement != INSIDE:
        positions = torch.rand(2, max(2, n_tokens), info.columns, generator=generator) + 0.5
        inputs[POSITIONS] = positions if info.placement == EACH else positions[0]
    return inputs


def _dynamic(info: OnnxInfo, inputs: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    dynamic = torch.export.Dim.DYNAMIC
    shapes: dict[str, dict[int, Any]] = {IMAGES: {0: dynamic}}
    if info.any_size:
        shapes[IMAGES].update({2: dynamic, 3: dynamic})
        shapes.update(rows={0: dynamic, 1: dynamic}, columns={0: dynamic, 1: dynamic})
    else:
        shapes.update(rows={}, columns={})
    shapes.update(lattice={0: dynamic}, positions={0: dynamic, 1: dynamic} if info.placement == EACH else {0: dynamic})
    return tuple(shapes[name] for name in inputs)
