"""Build wheel and sdist, check them, install each into an empty environment and use it there without a network.

    python tests/run_package_smoke.py [--out dist] [--environment build/smoke]

An environment that is there already is used again: its dependencies are installed once (some GB, unless pip is told of
PyTorch's CPU wheels), the package anew.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What is run in the empty environment. Any connection is an error, and so is any warning at import.
USE = r"""
import json, re, socket, subprocess, sys, tempfile, warnings
from pathlib import Path

def refuse(*arguments, **keywords):
    raise OSError('no network: something connects')

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
with warnings.catch_warnings():
    warnings.simplefilter('error')
    import timm
    import timm_spot
import torch
import timm_spot.cli

version, folder = sys.argv[1], Path(timm_spot.__file__).parent
assert timm_spot.__version__ == version, timm_spot.__version__
assert 'site-packages' in folder.parts, folder
for name in ('py.typed', 'tasks/play/page/index.html', 'tasks/play/pictures/00_4.png', 'weights'):
    assert (folder / name).exists(), name
for module in ('matplotlib', 'sklearn', 'onnx', 'starlette'):
    assert module not in sys.modules

model = timm.create_model('spot_vit_pico_patch8_64', pretrained=True, n_tokens=25).eval()
image = torch.zeros(1, 3, 64, 64)
assert model(image).shape == (1, 10) and model(image, positions=torch.rand(7, 2)).shape == (1, 10)
assert timm_spot.optimize_positions(model, image, torch.tensor([3]), steps=1).positions.shape == (1, 25, 2)
assert timm_spot.sparsify(model, scorer='received-attention')(image).shape == (1, 10)

from click.testing import CliRunner
run = lambda *arguments: CliRunner().invoke(timm_spot.cli.main, [str(a) for a in arguments])
picture = folder / 'tasks/play/pictures/00_4.png'
result = run('predict', picture, '--json')
assert result.exit_code == 0 and json.loads(result.stdout)[0]['classes'][0]['name'] == '4', result.output
with tempfile.TemporaryDirectory() as out:
    result = run('vectorize', folder / 'tasks/play/pictures/cowbike.jpg', '--out', out, '--regions', 50)
    assert result.exit_code == 0 and (Path(out) / 'cowbike.svg').read_text().startswith('<svg'), result.output
    result = run('export', 'spot_vit_pico_patch8_64', Path(out) / 'digits.pt2', '--n-tokens', 25)
    assert result.exit_code == 0, result.output
for command, extra in ((['play', '--port', '0'], 'play'), (['draw', picture, '--out', 'x.png'], 'viz')):
    result = run(*command)
    assert result.exit_code == 1 and f"pip install 'timm-spot[{extra}]'" in result.output, result.output
script = Path(sys.executable).with_name('timm-spot')
said = subprocess.run([script, '--version'], capture_output=True, text=True, check=True).stdout
assert said.split()[-1] == version, said
assert 'predict' in subprocess.run([script, '--help'], capture_output=True, text=True, check=True).stdout
print('works offline:', version)
"""


def call(*command: object, **keywords: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **keywords)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=ROOT / 'dist')
    parser.add_argument('--environment', type=Path, default=ROOT / 'build' / 'smoke')
    args = parser.parse_args()

    for old in args.out.glob('timm_spot-*'):
        old.unlink()
    call(sys.executable, '-m', 'build', '--outdir', args.out, ROOT, stdout=subprocess.DEVNULL)
    files = sorted(args.out.glob('timm_spot-*'))
    assert [f.suffix for f in files] == ['.whl', '.gz'], files
    call(sys.executable, '-m', 'twine', 'check', '--strict', *files)
    version = files[0].name.split('-')[1]

    python = args.environment / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
    if not python.exists():
        venv.create(args.environment, with_pip=True)
    began = time.time()
    call(python, '-m', 'pip', 'install', '--quiet', files[0])
    size = sum(f.stat().st_size for f in args.environment.rglob('*') if f.is_file() and not f.is_symlink())
    print(f'installed in {time.time() - began:.0f} s, the environment has {size / 1e9:.2f} GB', flush=True)
    for file in files:
        call(python, '-m', 'pip', 'install', '--quiet', '--force-reinstall', '--no-deps', file)
        call(python, '-c', USE, version, cwd=args.environment, env=dict(os.environ, HF_HUB_OFFLINE='1', PYTHONPATH=''))
    call(python, '-m', 'pip', 'check')


if __name__ == '__main__':
    main()
