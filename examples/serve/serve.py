"""A service around an exported file: pictures in, classes out, in batches, with fewer tokens under load.

    timm-spot export spot_vit_pico_patch8_64 digits.onnx --int8
    python examples/serve/serve.py digits.onnx --budgets 9,16,25,64
    curl --data-binary @examples/digits/00_4.png http://127.0.0.1:8000/predict

POST /predict (the bytes of a picture; ?topk=3), GET /health, GET /metrics. Needs `pip install 'timm-spot[serve]'`.
"""
from __future__ import annotations

import asyncio
import io
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import click
import numpy as np
import uvicorn
from batching import Batcher, Busy
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

import timm_spot
from timm_spot.tasks.pictures.images import PictureError, read_picture

LARGEST_PICTURE = 20_000_000  # bytes


def measure(model: timm_spot.OnnxModel, budgets: list[int], batch: int = 4) -> dict[int, float]:
    """Seconds that an image takes at each budget, in a batch; the first call of each only warms up."""
    images = np.zeros((batch, model.info.channels, *model.info.image_size), np.uint8)
    seconds = {}
    for n in budgets:
        model(images, n)
        begin = time.perf_counter()
        model(images, n)
        seconds[n] = (time.perf_counter() - begin) / batch
    return seconds


def create_app(model: timm_spot.OnnxModel, batcher: Batcher) -> FastAPI:
    """The service; its batcher runs as long as the service does."""
    decoding = ThreadPoolExecutor(max_workers=1)
    responses, started = Counter(), time.time()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batches = asyncio.create_task(batcher.run())
        yield
        app.state.batches.cancel()
        with suppress(asyncio.CancelledError):
            await app.state.batches
        decoding.shutdown(wait=False)

    app = FastAPI(title='timm_spot', lifespan=lifespan)

    @app.middleware('http')
    async def count(request: Request, call_next):
        response = await call_next(request)
        responses[response.status_code] += 1
        return response

    @app.post('/predict')
    async def predict(request: Request, topk: int = 5) -> Response:
        begin = time.perf_counter()
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > LARGEST_PICTURE:
                return _error(413, f'the picture has more than {LARGEST_PICTURE:,} bytes')
        try:
            with batcher.admit():
                image = await asyncio.get_running_loop().run_in_executor(decoding, _decode, model, bytes(data))
                answer = await batcher.answer(image)
        except PictureError as e:
            return _error(400, str(e))
        except Busy as e:
            return _error(503, str(e), {'Retry-After': str(max(1, math.ceil(e.seconds)))})
        return JSONResponse(dict(
            classes=_classes(model, answer.logits, topk), n_tokens=answer.n_tokens,
            milliseconds=round(1e3 * (time.perf_counter() - begin), 1)))

    @app.get('/health')
    async def health() -> Response:
        dead = app.state.batches.done()
        return JSONResponse(
            dict(status='dead' if dead else 'ok', model=model.info.model, file=model.path.name,
                 n_tokens=batcher.n_tokens, waiting=batcher.pending),
            status_code=500 if dead else 200)

    @app.get('/metrics')
    async def metrics() -> PlainTextResponse:
        lines = [f'spot_responses_total{{status="{status}"}} {n}' for status, n in sorted(responses.items())]
        lines += [f'spot_images_total{{n_tokens="{n}"}} {batcher.counts.images[n]}' for n in batcher.budgets]
        lines += [f'spot_seconds_per_image{{n_tokens="{n}"}} {batcher.seconds[n]:.6f}' for n in batcher.budgets]
        lines += [
            f'spot_batches_total {batcher.counts.batches}', f'spot_refused_total {batcher.counts.refused}',
            f'spot_waiting {batcher.pending}', f'spot_n_tokens {batcher.n_tokens}',
            f'spot_uptime_seconds {time.time() - started:.0f}', f'process_resident_memory_bytes {_memory()}']
        return PlainTextResponse('\n'.join(lines) + '\n')

    return app


def _decode(model: timm_spot.OnnxModel, data: bytes) -> np.ndarray:
    return model.prepare(read_picture(io.BytesIO(data), 'the picture'))


def _classes(model: timm_spot.OnnxModel, logits: np.ndarray, topk: int) -> list[dict[str, object]]:
    weights = np.exp(logits - logits.max())
    order = np.argsort(-logits)[:max(1, topk)]
    return [dict(name=model.class_names[i], probability=round(float(weights[i] / weights.sum()), 4)) for i in order]


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(dict(error=message), status_code=status, headers=headers)


def _memory() -> int:
    """Bytes of this process in memory, where Linux says so."""
    status = Path('/proc/self/statm')
    return int(status.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') if status.exists() else 0


@click.command(help=__doc__)
@click.argument('file', type=click.Path(exists=True, dir_okay=False))
@click.option('--budgets', default='25,49,100,196', show_default=True, help='Of which the load chooses.')
@click.option('--host', default='127.0.0.1', show_default=True)
@click.option('--port', default=8000, show_default=True)
@click.option('--threads', type=int, help='Of the model; by default all cores.')
@click.option('--largest-batch', default=16, show_default=True)
@click.option('--wait-ms', default=4., show_default=True, help='For which a batch waits for more pictures.')
@click.option('--target-ms', default=200., show_default=True, help='Within which what waits shall be answered.')
@click.option('--limit', default=128, show_default=True, help='Pictures that may wait; beyond them is answered 503.')
def main(
        file: str, budgets: str, host: str, port: int, threads: int | None, largest_batch: int, wait_ms: float,
        target_ms: float, limit: int) -> None:
    try:
        model = timm_spot.OnnxModel(file, threads=threads)
        chosen = [int(n) for n in budgets.split(',')] if model.info.takes_budgets else [model.budget()]
        seconds = measure(model, chosen)
    except (ValueError, OSError) as e:
        raise click.ClickException(str(e)) from e
    click.echo('  '.join(f'{n} tokens {1e3 * s:.1f} ms' for n, s in seconds.items()))
    batcher = Batcher(model, chosen, seconds, wait_ms / 1e3, largest_batch, target_ms / 1e3, limit)
    uvicorn.run(create_app(model, batcher), host=host, port=port, log_level='warning', timeout_keep_alive=30)


if __name__ == '__main__':
    main()
