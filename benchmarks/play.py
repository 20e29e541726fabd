"""How soon `timm-spot play` answers a token that is dragged, over HTTP, with random weights where there are no others.

    python -m benchmarks.play
"""
from __future__ import annotations

import json
import os
import statistics
import threading
import time
import urllib.request

import timm
import torch

import timm_spot  # noqa: F401  registers the models
from timm_spot.tasks.play.server import listen, serve
from timm_spot.tasks.play.stage import Stage

MODELS = {
    'spot_vit_pico_patch8_64.digits_placed': True, 'spot_vit_small_patch16_in21k': False,
    'spot_vit_base_patch16_in21k': False}
WARM_UP, ASKED = 3, 15


def measure(address: str, picture: str, positions: list[list[float]]) -> list[float]:
    """Milliseconds from a request to its answer, sorted."""
    times = []
    for _ in range(WARM_UP + ASKED):
        began = time.perf_counter()
        body = json.dumps(dict(picture=picture, positions=positions)).encode()
        with urllib.request.urlopen(urllib.request.Request(f'{address}/api/answer', body), timeout=60) as response:
            response.read()
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times[WARM_UP:])


def main() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    print('| model | tokens | median, ms | fastest to slowest |\n|---|---|---|---|')
    for name, pretrained in MODELS.items():
        stage = Stage(timm.create_model(name, pretrained=pretrained).eval(), name)
        picture = stage.show_example(0).about['id']
        opened = listen(0)
        threading.Thread(target=serve, args=(stage, opened), daemon=True).start()
        address = f'http://127.0.0.1:{opened.getsockname()[1]}'
        for n_tokens in (25, 49, stage.full_budget):
            times = measure(address, picture, stage.place(picture, 'isotropic', n_tokens))
            median = statistics.median(times)
            print(f'| {name} | {n_tokens} | {median:.0f} | {times[0]:.0f} to {times[-1]:.0f} |', flush=True)


if __name__ == '__main__':
    main()
