"""The service in examples/serve: batches, budgets by load, refusals; over loopback as it is started."""
from __future__ import annotations

import asyncio
import importlib
import io
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

import timm_spot

SERVE = Path(__file__).parents[1] / 'examples' / 'serve'


@pytest.fixture(scope='module')
def modules():
    sys.path.insert(0, str(SERVE))
    try:
        yield {name: importlib.import_module(name) for name in ('batching', 'serve', 'load_test')}
    finally:
        sys.path.remove(str(SERVE))


class Toy:
    """Logits are the image's first pixel and the budget; each batch takes as long as is asked."""

    def __init__(self, seconds=0.):
        self.seconds, self.seen = seconds, []

    def __call__(self, images, n_tokens):
        self.seen.append((len(images), n_tokens))
        time.sleep(self.seconds)
        if (images == 255).any():
            raise RuntimeError('white')
        return np.stack([images[:, 0, 0, 0], np.full(len(images), n_tokens)], axis=1).astype(np.float32)


def image(value):
    return np.full((3, 2, 2), value, np.uint8)


def batched(modules, model, ask, **options):
    """The result of a coroutine function that is given a batcher at work."""
    async def main():
        batcher = modules['batching'].Batcher(
            model, **dict(dict(budgets=(25, 4), seconds={4: 0.01, 25: 0.1}, wait=0.02), **options))

        async def answer(value):
            with batcher.admit():
                return await batcher.answer(image(value))

        work = asyncio.create_task(batcher.run())
        try:
            return await ask(batcher, answer)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    return asyncio.run(main())


def test_each_gets_its_own_answer_from_one_batch(modules):
    model = Toy()

    async def ask(batcher, answer):
        return await asyncio.gather(*map(answer, range(5)))

    answers = batched(modules, model, ask, target=9.)
    assert model.seen == [(5, 25)] and [a.logits.tolist() for a in answers] == [[i, 25.] for i in range(5)]
    assert batched(modules, model, ask, largest=2)[-1].logits.tolist()[0] == 4 and model.seen[1][0] == 2


@pytest.mark.parametrize('waiting, n_tokens', [(1, 25), (2, 25), (3, 4), (20, 4), (999, 4)])
def test_the_budget_is_the_largest_that_answers_in_time(modules, waiting, n_tokens):
    batcher = modules['batching'].Batcher(Toy(), (4, 25), {4: 0.01, 25: 0.1}, target=0.2)
    assert batcher.choose(waiting) == n_tokens


def test_the_budget_moves_with_the_load_and_comes_back(modules):
    async def ask(batcher, answer):
        await answer(0)
        await asyncio.gather(*map(answer, range(30)))
        crowded = batcher.n_tokens
        for _ in range(3):
            await answer(0)
        return crowded, batcher.n_tokens, batcher.pending, batcher.counts.images

    crowded, alone, pending, counted = batched(modules, Toy(), ask, target=0.2)
    assert (crowded, alone, pending) == (4, 25, 0) and sum(counted.values()) == 34


def test_beyond_the_limit_is_refused_and_nothing_is_lost(modules):
    async def ask(batcher, answer):
        return await asyncio.gather(*map(answer, range(10)), return_exceptions=True), batcher.counts.refused

    answers, refused = batched(modules, Toy(0.01), ask, limit=4)
    busy = [a for a in answers if isinstance(a, modules['batching'].Busy)]
    assert len(busy) == refused == 6 and all(b.seconds == pytest.approx(0.04) for b in busy)
    assert [a.logits[0] for a in answers[:4]] == [0, 1, 2, 3]


def test_an_error_of_the_model_reaches_those_who_asked_and_no_others(modules):
    async def ask(batcher, answer):
        wrong = await asyncio.gather(answer(255), answer(1), return_exceptions=True)
        return wrong, await answer(7), batcher.pending

    wrong, right, pending = batched(modules, Toy(), ask)
    assert all(isinstance(e, RuntimeError) for e in wrong) and right.logits[0] == 7 and pending == 0


def test_who_waits_when_the_service_ends_is_told(modules):
    async def main(wait):
        batcher = modules['batching'].Batcher(Toy(0.2), (4,), {4: 0.01}, largest=2 if wait == 0. else 9, wait=wait)
        work = asyncio.create_task(batcher.run())
        waiting = [asyncio.create_task(batcher.answer(image(i))) for i in range(5)]
        await asyncio.sleep(0.05)
        work.cancel()
        return await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)

    for wait in (0., 9.):  # while a batch is computed, and while one is gathered
        assert all(isinstance(e, modules['batching'].Busy) for e in asyncio.run(main(wait)))


@pytest.fixture(scope='module')
def service(modules, tmp_path_factory):
    """The service with a small model on a free port: its address, and its batcher."""
    import uvicorn

    path = tmp_path_factory.mktemp('serve') / 'm.onnx'
    timm_spot.export_model(timm.create_model('spot_vit_pico_patch8_64', depth=1).eval(), path)
    model = timm_spot.OnnxModel(path, threads=1)
    seconds = modules['serve'].measure(model, [4, 9])
    batcher = modules['batching'].Batcher(model, (4, 9), seconds, limit=8)
    server = uvicorn.Server(uvicorn.Config(
        modules['serve'].create_app(model, batcher), port=0, log_level='warning'))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f'http://127.0.0.1:{port}', batcher
    server.should_exit = True
    thread.join()


def call(url, data=None):
    """Status, headers and body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.headers, e.read()


def png():
    data = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert('RGB').save(data, 'PNG')
    return data.getvalue()


def test_a_picture_is_answered(service):
    status, _, body = call(f'{service[0]}/predict?topk=3', png())
    answer = json.loads(body)
    assert status == 200 and len(answer['classes']) == 3 and answer['n_tokens'] in (4, 9)
    shares = [c['probability'] for c in answer['classes']]
    assert shares == sorted(shares, reverse=True) and answer['classes'][0]['name'] in '0123456789'


def test_what_is_no_picture_is_refused_in_words(service, modules, monkeypatch):
    status, _, body = call(f'{service[0]}/predict', b'none')
    assert status == 400 and 'the picture is no picture that can be read' in json.loads(body)['error']
    monkeypatch.setattr(modules['serve'], 'LARGEST_PICTURE', 10)
    assert call(f'{service[0]}/predict', png())[0] == 413


def test_at_its_limit_it_says_when_to_come_back(service, monkeypatch):
    url, batcher = service
    monkeypatch.setattr(batcher, 'limit', 0)
    status, headers, _ = call(f'{url}/predict', png())
    assert status == 503 and int(headers['Retry-After']) >= 1


def test_health_and_metrics(service):
    url, _ = service
    status, _, body = call(f'{url}/health')
    assert status == 200 and json.loads(body)['status'] == 'ok'
    call(f'{url}/predict', png())
    lines = dict(line.split() for line in call(f'{url}/metrics')[2].decode().splitlines())
    assert int(lines['spot_responses_total{status="200"}']) >= 2
    assert float(lines['spot_seconds_per_image{n_tokens="4"}']) > 0 and lines['spot_waiting'] == '0'


def test_under_load_nothing_is_lost(service, modules):
    url, batcher = service
    load = modules['load_test'].Load('127.0.0.1', int(url.rpartition(':')[2]), png())

    async def crowd():
        rate = await load.closed(clients=4, seconds=0.5)
        load.reset()
        await load.open(4 * rate, seconds=1.)
        await asyncio.gather(*(load.request() for _ in range(30)))
        memory = await load.memory()
        await load.close()
        return memory

    memory = asyncio.run(crowd())
    assert load.lost == [] and set(load.statuses) == {200, 503} and load.without_hint == 0 and memory > 10
    assert batcher.pending == 0 and 'lost 0' in load.report('x', 1.)
