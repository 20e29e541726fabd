from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import timm_spot
from timm_spot.tasks.deploy.quantize import quantize_dynamic, quantize_static

# Weights that 7 bits hold: whole numbers, the largest of a column 64 times its step.
WEIGHTS = np.array([[64, 32], [3, -16], [-10, 4], [0, 2]], np.float32)


def product(scope='model.blocks.0'):
    """x (B, N, 4) times `WEIGHTS`."""
    node = helper.make_node('MatMul', ['x', 'w'], ['y'], name='product')
    node.metadata_props.append(onnx.StringStringEntryProto(key='scope', value=f"['', '{scope}.mlp.fc1']"))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ['B', 'N', size]) for name, size in (('x', 4), ('y', 2))]
    graph = helper.make_graph([node], 'product', ends[:1], ends[1:], [numpy_helper.from_array(WEIGHTS, 'w')])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)


def answer(proto, x):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=['CPUExecutionProvider'])
    return session.run(None, dict(x=np.array(x, np.float32)))[0]


def test_scales_follow_from_each_token():
    # Largest values 127, 254 and 12,700: steps of 1, 2 and 100, in which these are whole numbers.
    tokens = [[127, -1, 5, 0], [254, 2, -8, 100], [-12700, 100, 300, 0], [0, 0, 0, 0]]
    quantized = quantize_dynamic(product())
    assert [n.op_type for n in quantized.graph.node].count('MatMulInteger') == 1
    np.testing.assert_allclose(answer(quantized, [tokens]), np.array([tokens]) @ WEIGHTS, rtol=1e-6, atol=1e-4)
    # 0.4 of a step is lost, 0.6 of one becomes a whole.
    np.testing.assert_allclose(
        answer(quantized, [[[127, 0.4, 0, 0], [127, 0.6, 0, 0]]]),
        np.array([[[127, 0, 0, 0], [127, 1, 0, 0]]]) @ WEIGHTS, rtol=1e-6)


def test_a_token_s_scale_is_no_matter_of_its_neighbours():
    quantized, x = quantize_dynamic(product()), np.random.default_rng(0).normal(size=(3, 2, 4))
    np.testing.assert_array_equal(answer(quantized, x)[:1], answer(quantized, x[:1]))
    x[1:] *= 1e4
    np.testing.assert_array_equal(answer(quantized, x)[:1], answer(quantized, x[:1]))


def test_static_scales_are_those_of_the_pictures():
    seen = np.zeros((1, 2, 4), np.float32)
    seen[0, 0] = 0, 255, 100, 3  # 0 to 255: steps of 1, from zero
    quantized = quantize_static(product(), [dict(x=seen)])
    np.testing.assert_allclose(answer(quantized, seen), seen @ WEIGHTS, rtol=1e-6)
    beyond = np.full((1, 1, 4), 300, np.float32)
    np.testing.assert_allclose(answer(quantized, beyond), np.full((1, 1, 4), 255) @ WEIGHTS, rtol=1e-6)


def test_only_blocks_are_quantised(int8_file):
    with pytest.raises(RuntimeError, match='no matrix product of a block'):
        quantize_dynamic(product('model.head'))
    graph = onnx.load(int8_file).graph
    bytes_of = {t.name for t in graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 2}
    assert len(bytes_of) == 4  # qkv, proj, fc1, fc2


def test_bytes_answer_nearly_as_floats(float_file, int8_file):
    """Within 0.3 %; where ONNX Runtime fuses what it took for one scale, they are off by 4 %."""
    images = np.random.default_rng(1).integers(0, 256, (8, 3, 64, 64), dtype=np.uint8)
    wanted, found = (timm_spot.OnnxModel(file, threads=1)(images, 25) for file in (float_file, int8_file))
    assert np.square(found - wanted).mean() < 0.01 ** 2 * wanted.var()


def test_an_image_s_logits_do_not_depend_on_its_neighbours(int8_file):
    read = timm_spot.OnnxModel(int8_file, threads=1)
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 64, 64), dtype=np.uint8)
    images[1:] //= 8
    np.testing.assert_allclose(read(images, 9)[:1], read(images[:1], 9), rtol=0, atol=1e-5)
