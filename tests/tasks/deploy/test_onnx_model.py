from __future__ import annotations

import dataclasses
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, helper
from PIL import Image

import timm_spot
from timm_spot.models._shallow import shallow_copy
from timm_spot.tasks.pictures.images import model_transform


def at(model, n_tokens):
    return shallow_copy(model, placer=model.placer.replaced(n_tokens=n_tokens))


def pixels(batch, size, channels=3):
    return np.random.default_rng(batch).integers(0, 256, (batch, channels, *size), dtype=np.uint8)


@pytest.fixture(scope='module')
def read(float_file):
    return timm_spot.OnnxModel(float_file, threads=1)


@pytest.mark.parametrize('size', [(64, 64), (48, 88), (96, 71)])
@pytest.mark.parametrize('n_tokens', [1, 9, 25, 50])
@pytest.mark.parametrize('batch', [1, 7])
def test_one_file_has_all_budgets_and_sizes(tiny, read, size, n_tokens, batch):
    images = pixels(batch, size)
    logits = read(images, n_tokens=n_tokens)
    assert logits.shape == (batch, 3) and logits.dtype == np.float32
    with torch.no_grad():
        expected = at(tiny, n_tokens)(torch.from_numpy(images))
        normalized = tiny.patch_embed.normalize(torch.from_numpy(images))
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(read(normalized.numpy(), n_tokens), logits)


def test_without_a_budget_there_are_as_many_tokens_as_patches(tiny, read):
    assert read.budget() == 64 and read.budget((48, 88)) == 66
    images = pixels(2, (48, 88))
    with torch.no_grad():
        expected = tiny(torch.from_numpy(images))
    torch.testing.assert_close(torch.from_numpy(read(images)), expected, rtol=0, atol=1e-4)


def test_positions_instead_of_a_budget(tiny, read):
    images, positions = pixels(2, (64, 64)), np.random.default_rng(0).random((5, 2))
    with torch.no_grad():
        expected = tiny(torch.from_numpy(images), torch.from_numpy(positions).float())
    torch.testing.assert_close(torch.from_numpy(read(images, positions=positions)), expected, rtol=0, atol=1e-4)


def test_a_shipped_network_places_any_budget(tmp_path):
    model = timm.create_model('spot_vit_pico_patch8_64.digits_placed', pretrained=True).eval()
    assert timm_spot.export_model(model, tmp_path / 'placed.onnx') < 1e-4
    read = timm_spot.OnnxModel(tmp_path / 'placed.onnx', threads=1)
    assert read.class_names == list('0123456789')
    for n, size in ((9, (64, 64)), (20, (72, 64))):
        images = pixels(3, size)
        with torch.no_grad():
            expected = at(model, n)(torch.from_numpy(images))
        torch.testing.assert_close(torch.from_numpy(read(images, n)), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match='takes no positions: export it with --positions-as-input'):
        read(images, positions=np.zeros((4, 2)))


@pytest.mark.parametrize('channels', [3, 1])
def test_pictures_are_prepared_as_the_model_s_transform_does(float_file, channels):
    read = timm_spot.OnnxModel(float_file, threads=1)
    read.info = dataclasses.replace(read.info, channels=channels)
    model = timm.create_model('spot_vit_pico_patch8_64', in_chans=channels)
    picture = Image.effect_noise((90, 70), 60).convert('RGB')
    image = read.prepare(picture)
    assert image.shape == (channels, 64, 64) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.asarray(model_transform(model, normalize=False)(picture)))


def test_no_torch_between(read, monkeypatch):
    """The second call of a size and budget draws nothing and runs nothing of torch's."""
    images = pixels(1, (64, 64))
    read(images, 9)
    monkeypatch.setattr(torch.Tensor, '__torch_function__', lambda *a, **k: pytest.fail('torch was called'))
    for name in ('from_numpy', 'tensor', 'empty', 'zeros', 'rand'):
        monkeypatch.setattr(torch, name, lambda *a, **k: pytest.fail('torch was called'))
    read(images, 9)


@pytest.mark.parametrize('arguments, error, says', [
    ((torch.zeros(1, 3, 64, 64),), TypeError, r'must be a numpy array \(B, 3, H, W\), got Tensor'),
    ((np.zeros((1, 3, 64, 64)),), TypeError, r'float64, any\.onnx takes uint8 or float32'),
    ((pixels(1, (64, 64))[0],), ValueError, r'\(B, 3, H, W\), got \(3, 64, 64\)'),
    ((pixels(1, (64, 64), 1),), ValueError, r'\(B, 3, H, W\), got \(1, 1, 64, 64\)'),
    ((pixels(1, (64, 64))[:0],), ValueError, r'got \(0, 3, 64, 64\)'),
    ((pixels(1, (64, 7)),), ValueError, '64 x 7 px are smaller than one window of 8 x 8'),
    ((pixels(1, (64, 64)), 0), ValueError, 'n_tokens=0 is not a budget'),
    ((pixels(1, (64, 64)), 9.), TypeError, r'n_tokens must be an int, got 9\.0'),
    ((pixels(1, (64, 64)), 5000), ValueError, 'n_tokens=5000 exceeds the pixels of an image of 64 x 64'),
    ((pixels(1, (64, 64)), 9, np.zeros((9, 2))), ValueError, 'leave it out'),
    ((pixels(2, (64, 64)), None, np.zeros((2, 9, 2))), ValueError, r'\(N, 2\), got \(2, 9, 2\): one placement for all'),
    ((pixels(1, (64, 64)), None, np.full((9, 2), np.nan)), ValueError, 'hold NaN or infinity'),
])
def test_bad_calls(read, arguments, error, says):
    with pytest.raises(error, match=says):
        read(*arguments)


def test_a_file_of_one_budget(tiny, fixed_file):
    read = timm_spot.OnnxModel(fixed_file, threads=1)
    images = pixels(3, (64, 64))
    with torch.no_grad():
        expected = at(tiny, 9)(torch.from_numpy(images))
    for n in (None, 9):
        torch.testing.assert_close(torch.from_numpy(read(images, n)), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r'n_tokens=4: fixed\.onnx has 9 tokens alone: export it without --n-tokens'):
        read(images, 4)
    with pytest.raises(ValueError, match=r'64 x 72 px, fixed\.onnx takes 64 x 64 px alone: export it without'):
        read(pixels(1, (64, 72)))
    with pytest.raises(TypeError, match=r'images are of float32, fixed\.onnx takes uint8'):
        read(np.zeros((1, 3, 64, 64), np.float32))


def test_positions_of_each_image(tiny, tmp_path):
    model = shallow_copy(tiny, placer=tiny.placer.replaced(sampler='salient', saliency='energy'))
    timm_spot.export_model(model, tmp_path / 'each.onnx', positions_as_input=True)
    read = timm_spot.OnnxModel(tmp_path / 'each.onnx', threads=1)
    images, positions = pixels(2, (64, 80)), np.random.default_rng(0).random((2, 5, 2), np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images), torch.from_numpy(positions))
    torch.testing.assert_close(torch.from_numpy(read(images, positions=positions)), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(read(images, positions=positions[0])[0], read(images, positions=positions)[0], atol=1e-5)
    with pytest.raises(ValueError, match=r'exported without what places its tokens: give positions, \(B, N, 2\)'):
        read(images)
    with pytest.raises(ValueError, match=r'must have shape \(2, N, 2\), got \(1, 5, 2\)'):
        read(images, positions=positions[:1])


def foreign(path):
    node = helper.make_node('Relu', ['images'], ['logits'])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ('images', 'logits')]
    onnx.save(helper.make_model(
        helper.make_graph([node], 'relu', ends[:1], ends[1:]), opset_imports=[helper.make_opsetid('', 20)],
        ir_version=10), path)


def test_files_that_cannot_be_used(float_file, tmp_path):
    path = tmp_path / 'm.onnx'
    with pytest.raises(FileNotFoundError, match=r'm\.onnx is no file'):
        timm_spot.OnnxModel(path)
    whole = float_file.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r'm\.onnx (is damaged|was not written by)'):
            timm_spot.OnnxModel(path)
    path.write_bytes(b'PNG' * 100)
    with pytest.raises(ValueError, match=r'm\.onnx is damaged, or no ONNX file') as caught:
        timm_spot.OnnxModel(path)
    assert '\n' not in str(caught.value)
    foreign(path)
    with pytest.raises(ValueError, match=r'm\.onnx was not written by `timm-spot export`'):
        timm_spot.OnnxModel(path)


def test_other_programs_run_the_file_by_its_images_alone(tiny, float_file):
    images = torch.randn(2, 3, 64, 64)
    answer = onnxruntime.InferenceSession(float_file).run(None, dict(images=images.numpy()))[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(answer), tiny(images), rtol=0, atol=1e-4)


def test_onnxruntime_is_an_extra(float_file, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'timm-spot\[export\]'"):
        timm_spot.OnnxModel(float_file)
