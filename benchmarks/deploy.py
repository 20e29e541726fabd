"""A model on what people run: eager, compiled, ONNX Runtime and OpenVINO, in float32 and int8, and what int8 costs.

    python -m benchmarks deploy

On a GPU (`--device cuda`): eager and compiled, float32 and bfloat16, batches of 1 and 256.
"""
from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import timm_spot
from timm_spot.tasks.deploy.onnx_graph import OPSET
from timm_spot.tasks.deploy.quantize import quantize_dynamic
from timm_spot.tasks.pictures.digits import draw_canvases, load_digits

from .measure import Config, Section, alternate, cpu_flags, milliseconds
from .references import BASE

SMALL = 'spot_vit_small_patch16_in21k'
BUDGETS, BATCHES = (25, 49, 100, 196), (1, 8)
FEW = (25, 49)  # for what takes long to build, of the base model: compiled programs, files of OpenVINO
JUDGED_BATCH = 8
DIGITS = 'spot_vit_pico_patch8_64.digits'
_SIDE = 224
Calls = dict[str, Callable[[], Any]]


def run(config: Config) -> Section:
    section = Section()
    with torch.inference_mode(mode=config.device != 'cpu'), torch.no_grad():
        if config.device != 'cpu':
            _on_gpu(section, config)
            return section
        with tempfile.TemporaryDirectory() as folder:
            _on_cpu(section, config, Path(folder))
        _accuracy(section)
    return section


def _on_cpu(section: Section, config: Config, folder: Path) -> None:
    dense = {name: _dense_sessions(name, config, folder) for name in ('vit_base_patch16_224', 'vit_base_patch32_224')}
    for name in (BASE, SMALL):
        model = timm.create_model(name, **config.model_args).eval().requires_grad_(False)
        files = {
            kind: _exported(model, folder / f'{name}_{kind.replace(" ", "_")}.onnx', config, **options)
            for kind, options in _KINDS.items()}
        rows = section.table(f'{name}, {_SIDE} px, milliseconds a batch', 'batch', 'tokens', *_COLUMNS)
        for batch in BATCHES:
            images = torch.rand(batch, 3, _SIDE, _SIDE)
            for n in BUDGETS:
                calls = _calls(model, files, images, n, folder, config)
                if name == BASE and batch == JUDGED_BATCH and n == FEW[0]:
                    calls.update({f'{vit} {kind}': _session_call(session, images)
                                  for vit, sessions in dense.items() for kind, session in sessions.items()})
                seconds = alternate(calls, config)
                rows.append([str(batch), str(n), *(
                    f"{milliseconds(seconds[c])} ({seconds['eager'] / seconds[c]:.2f})" if c in seconds else ''
                    for c in _COLUMNS)])
                if name == BASE and batch == JUDGED_BATCH and n in FEW:
                    _judge(section, seconds, n)
    section.remarks.append('In brackets: times the speed of eager, of one comparison in turn.')
    if _openvino() is None:
        section.remarks.append('OpenVINO was not measured: pip install openvino.')


_KINDS: dict[str, dict[str, Any]] = {
    'ORT': {}, 'ORT int8': dict(int8=True, force=True),
    'ORT int8 static': dict(int8=True, calibrate=str(Path(__file__).parents[1] / 'examples' / 'photos'), force=True)}
_COLUMNS = ('eager', 'compiled', *_KINDS, 'OpenVINO', 'OpenVINO int8 static')


def _exported(model: nn.Module, path: Path, config: Config, **options: Any) -> timm_spot.OnnxModel:
    timm_spot.export_model(model, path, overwrite=True, **options)
    return timm_spot.OnnxModel(path, threads=config.threads)


def _calls(
        model: nn.Module,
        files: dict[str, timm_spot.OnnxModel],
        images: torch.Tensor,
        n: int,
        folder: Path,
        config: Config,
) -> Calls:
    """All ways to one budget; `model` is given it for the length of the comparison."""
    model.set_placement(n_tokens=n)
    pixels = images.numpy()
    calls: Calls = {'eager': lambda: model(images)}
    for kind, file in files.items():
        calls[kind] = lambda file=file: file(pixels, n)
    if n not in FEW or model.embed_dim < 768:
        return calls
    if not config.quick:
        compiled = timm_spot.compile(model, budgets=(n,))
        calls['compiled'] = lambda: compiled(images)
    openvino = _openvino()
    for kind, options in (('OpenVINO', {}), ('OpenVINO int8 static', _KINDS['ORT int8 static'])) if openvino else ():
        path = folder / f'openvino_{len(options)}_{n}_{model.embed_dim}.onnx'
        if not path.exists():
            timm_spot.export_model(model, path, n_tokens=n, **options)
        network = openvino.Core().compile_model(path, 'CPU', {  # which would take bfloat16 where the CPU has it
            'INFERENCE_NUM_THREADS': config.threads, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'})
        calls[kind] = lambda network=network: network(pixels)
    return calls


def _openvino() -> Any:
    try:
        import openvino
    except ModuleNotFoundError:
        return None
    return openvino


class _Dense(nn.Module):
    """A ViT under the name by which the blocks of exported models are found."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def _dense_sessions(name: str, config: Config, folder: Path) -> dict[str, Any]:
    """timm's dense ViT as our models are exported, in float32 and int8."""
    import onnx
    import onnxruntime

    model = _Dense(timm.create_model(name, **config.model_args)).eval()
    program = torch.onnx.export(
        model, (torch.rand(2, 3, _SIDE, _SIDE),), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        opset_version=OPSET, verbose=False, input_names=['images'])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = config.threads
    sessions = {}
    for kind, proto in (('ORT', program.model_proto), ('ORT int8', quantize_dynamic(program.model_proto))):
        onnx.save(proto, folder / 'dense.onnx')
        sessions[kind] = onnxruntime.InferenceSession(
            folder / 'dense.onnx', options, providers=['CPUExecutionProvider'])
    return sessions


def _session_call(session: Any, images: torch.Tensor) -> Callable[[], Any]:
    return lambda: session.run(None, {'images': images.numpy()})


def _judge(section: Section, seconds: dict[str, float], n: int) -> None:
    what = f'{BASE}, {n} tokens, batch {JUDGED_BATCH}'
    bar = 2.5 if {'avx512_vnni', 'avx_vnni', 'amx_int8'} & cpu_flags() else 2.
    section.judge(
        f'{what}: ONNX Runtime int8, times eager float32', seconds['eager'] / seconds['ORT int8'], at_least=bar)
    section.judge(f'{what}: ONNX Runtime float32, times eager', seconds['eager'] / seconds['ORT'], at_least=1.25)
    for kind in ('ORT', 'ORT int8') if n == FEW[0] else ():
        dense = seconds[f'vit_base_patch16_224 {kind}']
        section.judge(f'{what}: {kind}, times the dense ViT-B/16 on the same', dense / seconds[kind], at_least=6.)
        b32 = seconds[f'vit_base_patch32_224 {kind}']
        section.remarks.append(
            f'{kind}, batch {JUDGED_BATCH}: dense ViT-B/16 {milliseconds(dense)} ms, ViT-B/32 (49 tokens) '
            f'{milliseconds(b32)} ms, {BASE} at {n} tokens {milliseconds(seconds[kind])} ms.')


def _accuracy(section: Section) -> None:
    """Top-1 of the files of the shipped model on canvases of the held-out digits."""
    model = timm.create_model(DIGITS, pretrained=True).eval()
    digits, labels = load_digits('held_out')
    canvases = torch.cat([draw_canvases(digits, torch.Generator().manual_seed(seed)) for seed in range(10)])
    pixels = canvases[:, None].expand(-1, 3, -1, -1).contiguous().numpy()
    right = labels.repeat(10).numpy()
    kinds = {'float32': {}, 'float16': dict(fp16=True), 'int8': dict(int8=True),
             'int8 static': dict(int8=True, calibrate='digits')}
    rows = section.table(f'{DIGITS}: accuracy on {len(right):,} canvases, percent', 'file', 'MB', '9', '25', '64')
    accuracy: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, options in kinds.items():
            path = Path(folder) / 'digits.onnx'
            timm_spot.export_model(model, path, overwrite=True, **options)
            file = timm_spot.OnnxModel(path)
            accuracy[kind] = []
            for n in (9, 25, 64):
                answers = np.concatenate([file(part, n) for part in np.array_split(pixels, len(pixels) // 64)])
                accuracy[kind].append(100 * float((answers.argmax(1) == right).mean()))
            rows.append([kind, f'{path.stat().st_size / 1e6:.1f}', *(f'{a:.2f}' for a in accuracy[kind])])
    for kind in ('int8', 'int8 static'):
        loss = max(a - b for a, b in zip(accuracy['float32'], accuracy[kind]))
        section.judge(f'digits, {kind}: most that a budget loses', loss, at_most=0.3, unit=' points')


def _on_gpu(section: Section, config: Config) -> None:
    rows = section.table(f'{BASE}, {_SIDE} px, images/s', 'dtype', 'batch', 'tokens', 'eager', 'compiled', 'ratio')
    for dtype in (torch.float32, torch.bfloat16):
        model = timm.create_model(BASE, **config.model_args).to(config.device, dtype).eval()
        compiled = timm_spot.compile(deepcopy(model), budgets=BUDGETS)
        for batch in (1, 256):
            images = torch.rand(batch, 3, _SIDE, _SIDE, device=config.device, dtype=dtype)
            compiled.warm_up(images)
            for n in BUDGETS:
                model.set_placement(n_tokens=n)
                seconds = alternate(
                    {'eager': partial(model, images), 'compiled': partial(compiled, images, n)}, config)
                rows.append([
                    str(dtype).removeprefix('torch.'), str(batch), str(n), f"{batch / seconds['eager']:.0f}",
                    f"{batch / seconds['compiled']:.0f}", f"{seconds['eager'] / seconds['compiled']:.2f}"])
