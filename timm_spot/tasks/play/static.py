"""The page of `timm-spot play` as a folder of files that needs no server: any static host serves it (extra `export`).

The model is exported to ONNX with its placement as an input, its placer beside it, and run in the browser by
onnxruntime-web, which npm fetches when the folder is made. Placements of samplers are computed here, for every budget.
"""
from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from ...models.density_placer import DensityPlacer
from ...ops.density import place_by_density
from ..pictures.images import model_normalization
from ..publishing.export import export_model
from .server import PAGE
from .stage import Stage

RUNTIME = 'onnxruntime-web@1.30.0'
RUNTIME_SHA512 = 'q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=='
RUNTIME_FILES = ('ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm')
_CROPS = ('squash', 'center')  # what the page does as timm does it
_FILTERS = ('bicubic', 'bilinear')
_TEMPLATE = '<html lang="en">'


class _PlacerOnnx(nn.Module):
    """Positions (1, N, 2) of a lattice (N, 2) on images, and the density that carries it."""

    def __init__(self, placer: DensityPlacer) -> None:
        super().__init__()
        self.placer = placer

    def forward(self, images: torch.Tensor, lattice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        density = self.placer.density(images)
        return place_by_density(lattice, density), density


def write_static(stage: Stage, folder: Path) -> list[Path]:
    """Write the page, the model and the pictures of a stage into a new folder; its files come back.

    Args:
        stage: Its model is on the CPU.
        folder: It appears whole or not at all, and is not there before.

    Raises:
        FileExistsError: It is.
        ModuleNotFoundError: The packages for ONNX are missing.
        RuntimeError: npm is missing or fails; the exported model answers differently from the model.
        ValueError: The model's pictures are cropped or resized in a way that the page does not know.
    """
    if folder.exists():
        raise FileExistsError(f'{folder} is there already: give another folder.')
    config = _picture_config(stage)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}-') as temporary:
        made = Path(temporary, 'made')
        shutil.copytree(PAGE, made)
        page = (made / 'index.html').read_text('utf-8')
        assert _TEMPLATE in page
        page = page.replace(_TEMPLATE, '<html lang="en" data-backend="./static.js">')
        (made / 'index.html').write_text(page, encoding='utf-8')
        _fetch_runtime(made / 'ort')
        export_model(stage.model, made / 'model.onnx', positions_as_input=True)
        if isinstance(stage.model.placer, DensityPlacer):
            _export_placer(stage, made / 'placer.onnx')
        samplers = _write_placements(stage, made / 'placements.bin')
        about = stage.describe()
        learned = [prior for prior in about['priors'] if prior['about'] == 'learned placer' and about['density']]
        about.update(
            priors=[*learned, *(dict(name=name, about='sampler', drawn=False) for name in samplers)], samplers=samplers,
            max_tokens=stage.full_budget, config=config,
            pictures=[stage.show_example(i).about for i in range(len(stage.examples))])
        (made / 'about.json').write_text(json.dumps(about), encoding='utf-8')
        made.rename(folder)
    return sorted(path for path in folder.rglob('*') if path.is_file())


def _picture_config(stage: Stage) -> dict[str, Any]:
    """How the page makes the model's input of a picture."""
    config, normalization = resolve_model_data_config(stage.model), model_normalization(stage.model)
    mode, interpolation = config.get('crop_mode') or 'center', config['interpolation']
    if stage.model.placer.prior.has_sizes:
        raise ValueError(f'{stage.name} places windows of several sizes, which the page does not show.')
    if mode not in _CROPS or interpolation not in _FILTERS or len(normalization.mean) != 3:
        raise ValueError(
            f'{stage.name} takes pictures of {len(normalization.mean)} channels with crop_mode={mode!r} and '
            f"interpolation={interpolation!r}; the page without a server knows 3 channels, {' and '.join(_CROPS)}, "
            f"{' and '.join(_FILTERS)}.")
    return dict(
        mean=list(normalization.mean), std=list(normalization.std), crop_mode=mode, crop_pct=config['crop_pct'],
        interpolation=interpolation)


def _write_placements(stage: Stage, path: Path) -> list[str]:
    """Placements of samplers that do not look at the picture, of 1 token to the full budget: float32, one by one."""
    key, names, parts = stage.show_example(0).about['id'], [], []
    for prior in stage.priors():
        if prior['about'] != 'sampler' or '/' in prior['name']:
            continue
        try:
            placed = [stage.place(key, prior['name'], n) for n in range(1, stage.full_budget + 1)]
        except ValueError:  # it has not every budget
            continue
        names.append(prior['name'])
        parts.append(torch.tensor([pair for placement in placed for pair in placement], dtype=torch.float32))
    path.write_bytes(torch.stack(parts).numpy().astype('<f4').tobytes())
    return names


def _export_placer(stage: Stage, path: Path) -> None:
    """Write the placer as ONNX, and compare it with itself at another budget."""
    import onnxruntime

    images = stage.show_example(0).images
    lattices = [stage.placement(stage.place(stage.show_example(0).about['id'], 'isotropic', n))[0] for n in (9, 7)]
    module = _PlacerOnnx(stage.model.placer).eval()
    with torch.no_grad():
        torch.onnx.export(
            module, (images, lattices[0]), path, dynamo=True, verbose=False, external_data=False,
            dynamic_shapes=({}, {0: torch.export.Dim.DYNAMIC}), input_names=['images', 'lattice'],
            output_names=['positions', 'density'])
        expected = module(images, lattices[1])
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    answer = session.run(None, dict(images=images.numpy(), lattice=lattices[1].numpy()))
    difference = max((torch.from_numpy(a) - e).abs().max().item() for a, e in zip(answer, expected))
    if not difference <= 1e-5:
        raise RuntimeError(f'the exported placer differs from the placer by {difference:.2g}.')


def _fetch_runtime(folder: Path) -> None:
    """onnxruntime-web by npm, compared with what it is known to be."""
    folder.mkdir()
    try:
        done = subprocess.run(
            ['npm', 'pack', RUNTIME, '--silent'], cwd=folder, capture_output=True, text=True, timeout=600)
    except FileNotFoundError as e:
        raise RuntimeError(f'{RUNTIME} is fetched by npm, which is not here: install Node.js.') from e
    if done.returncode:
        raise RuntimeError(f'npm could not fetch {RUNTIME}: {done.stderr.strip()[-300:]}')
    archive = folder / done.stdout.split()[-1]
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != RUNTIME_SHA512:
        raise RuntimeError(f'npm gave another {RUNTIME} than the known one: sha512 {digest}.')
    with tarfile.open(archive) as tar:
        for name in (*(f'dist/{file}' for file in RUNTIME_FILES), 'package.json'):  # the last says its licence
            member = tar.extractfile(f'package/{name}')
            assert member is not None
            (folder / Path(name).name).write_bytes(member.read())
    archive.unlink()
