"""ONNX files with 8-bit weights and activations, by ONNX Runtime's tools; what is sensitive stays in float.

The matrix products of the blocks, 99 % of the work, are quantised, weights by column. The windows' projection, position
feature, norms, attention and head are not.

Weights have 7 bits: where a processor has no VNNI, two products of 8 bits overflow the 16 in which they are added, and
answers would differ from one machine to the next.

Dynamic activations have a scale for each token. ONNX Runtime's has one for the whole batch, which would make an image's
logits depend on its neighbours.
"""
from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

_LEVELS = 127.  # on either side of zero, which is 128


def quantize_dynamic(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A graph whose blocks multiply bytes, with scales that follow from each token when it runs."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as ort_dynamic

    def write(path: Path) -> None:
        ort_dynamic(
            proto, path, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
            nodes_to_quantize=_block_products(proto), extra_options=dict(MatMulConstBOnly=True))

    quantized = _written(write)
    _scale_by_token(quantized.graph)
    return quantized


def quantize_static(proto: onnx.ModelProto, feeds: Iterable[dict[str, np.ndarray]]) -> onnx.ModelProto:
    """A graph whose blocks multiply bytes, with scales found on pictures.

    Args:
        proto: The float graph.
        feeds: Inputs of ONNX Runtime, one dictionary for each batch of pictures.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as ort_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    def write(path: Path) -> None:
        ort_static(
            proto, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=['MatMul'],
            nodes_to_quantize=_block_products(proto), extra_options=dict(
                OpTypesToExcludeOutputQuantization=['MatMul'], MatMulConstBOnly=True))

    return _written(write)


def _block_products(proto: onnx.ModelProto) -> list[str]:
    """Names of the nodes that multiply activations of the blocks by weights."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    names = [
        node.name for node in proto.graph.node if node.op_type == 'MatMul' and node.input[1] in weights
        and any('model.blocks.' in entry.value for entry in node.metadata_props)]
    if not names:
        raise RuntimeError('no matrix product of a block was found in the graph: nothing can be quantised.')
    return names


def _written(write: object) -> onnx.ModelProto:
    """What a tool of ONNX Runtime's writes, quietly."""
    import onnx

    with tempfile.TemporaryDirectory() as folder, _quiet():
        write(Path(folder) / 'model.onnx')
        return onnx.load(Path(folder) / 'model.onnx')


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice to preprocess, which has been done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _scale_by_token(graph: onnx.GraphProto) -> None:
    """Let each token have the scale of its own largest value, instead of one for the batch; zero is 128."""
    from onnx import helper, numpy_helper

    constants = dict(
        token_axis=np.array([-1]), token_levels=np.array(1 / _LEVELS, np.float32), token_one=np.array(1, np.float32),
        token_least=np.array(1e-12, np.float32), token_zero=np.array(128, np.uint8))
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    made_by = {name: node for node in graph.node for name in node.output}
    scales, zeros, nodes = set(), set(), []
    for node in graph.node:
        if node.op_type == 'DynamicQuantizeLinear':
            quantized, scale, zero = node.output
            scales.add(scale)
            zeros.add(zero)
            steps = (
                ('Abs', [node.input[0]], f'{scale}_sizes'),
                ('ReduceMax', [f'{scale}_sizes', 'token_axis'], f'{scale}_largest'),
                ('Mul', [f'{scale}_largest', 'token_levels'], f'{scale}_exact'),
                ('Max', [f'{scale}_exact', 'token_least'], scale),
                ('Div', [node.input[0], scale], f'{scale}_divided'),
                ('QuantizeLinear', [f'{scale}_divided', 'token_one', 'token_zero'], quantized))
        elif node.op_type == 'Mul' and scales.intersection(node.input):
            continue  # of the scales of tokens and weights: see below
        elif node.op_type == 'Mul' and any(_joins_scales(made_by.get(name), scales) for name in node.input):
            # One after the other: ONNX Runtime takes the product of both for a scale of the whole batch, and answers
            # wrongly (its MatMulIntegerToFloatFusion).
            product, = (name for name in node.input if not _joins_scales(made_by.get(name), scales))
            both, = (made_by[name] for name in node.input if name != product)
            weights, = set(both.input) - scales
            token, = set(both.input) & scales
            by_weights = f'{node.output[0]}_by_weights'
            steps = (('Mul', [product, weights], by_weights), ('Mul', [by_weights, token], node.output[0]))
        else:
            node.input[:] = ['token_zero' if name in zeros else name for name in node.input]
            nodes.append(node)
            continue
        nodes += [helper.make_node(op, inputs, [output], name=f'{output}_node') for op, inputs, output in steps]
    del graph.node[:]
    graph.node.extend(nodes)


def _joins_scales(node: onnx.NodeProto | None, scales: set[str]) -> bool:
    """Whether a node multiplies scales of tokens by those of weights."""
    return node is not None and node.op_type == 'Mul' and bool(scales.intersection(node.input))
