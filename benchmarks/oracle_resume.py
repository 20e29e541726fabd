"""Kill `timm-spot oracle` again and again, restart it, and compare its result with that of an uninterrupted run.

    python -m benchmarks.oracle_resume

Writes canvases of held-out digits to a temporary folder, runs the command once to its end, and once killed with
SIGKILL after a random time, over and over, until it ends by itself. Prints the SHA-256 of both results.
"""
from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List

import click
import torch
from PIL import Image

from timm_spot.tasks.pictures.digits import draw_canvases, load_digits


def write_canvases(folder: Path, count: int) -> None:
    digits, labels = load_digits('held_out')
    chosen = torch.arange(count) % len(digits)
    canvases = draw_canvases(digits[chosen], torch.Generator().manual_seed(4))
    for i, (canvas, label) in enumerate(zip(canvases, labels[chosen].tolist())):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas.numpy()).save(folder / str(label) / f'{i:05d}.png')


@click.command(help=__doc__)
@click.option('--canvases', default=2000, show_default=True)
@click.option('--n-tokens', default=9, show_default=True)
@click.option('--steps', default=2, show_default=True)
@click.option('--kills', default=4, show_default=True, help='Kills, spread over the time of the whole run.')
@click.option('--seed', default=0, show_default=True)
def main(canvases: int, n_tokens: int, steps: int, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_canvases(folder / 'canvases', canvases)

        def command(out: str) -> List[str]:
            return [
                sys.executable, '-m', 'timm_spot.cli', 'oracle', str(folder / 'canvases'), '--n-tokens', str(n_tokens),
                '--steps', str(steps), '--init', 'uniform', '--out', str(folder / out)]

        begin = time.monotonic()
        subprocess.run(command('whole.safetensors'), check=True)
        duration = time.monotonic() - begin
        killed = 0
        while True:
            with subprocess.Popen(command('killed.safetensors')) as process:
                try:
                    process.wait(duration * draw.uniform(0.15, 0.4) if killed < kills else None)
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    killed += 1
            parts = len(list((folder / 'killed.safetensors.parts').glob('*.safetensors')))
            click.echo(f'killed, {parts} parts are written')
        sums = [hashlib.sha256((folder / f'{n}.safetensors').read_bytes()).hexdigest() for n in ('whole', 'killed')]
    click.echo(f'{canvases} canvases, {killed} kills\nuninterrupted {sums[0]}\nkilled        {sums[1]}')
    if sums[0] != sums[1]:
        raise click.ClickException('the results differ')


if __name__ == '__main__':
    main()
