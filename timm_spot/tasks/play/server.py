"""The server of `timm-spot play`: a stage answers in JSON what the page in `page/` asks, here only (extra `play`).

    GET  api/state                                      what `Stage.describe` says
    GET  api/example/NUMBER, POST api/picture?name=     a picture: those to begin with, or the body's bytes
    POST api/place, api/answer, api/density, api/search JSON to JSON; a search gives a line for each step
"""
from __future__ import annotations

import io
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import need
from ..pictures.images import PictureError
from .search import search_steps
from .stage import Stage, UnknownPicture

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PAGE = Path(__file__).parent / 'page'
HOSTS = ['127.0.0.1', 'localhost', '::1', '[::1]']
MAX_BYTES = 192 * 2 ** 20  # of a picture's file: 50 megapixels without compression, and some room
_HEADERS = {
    'Cache-Control': 'no-store',
    'Content-Security-Policy': "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    'X-Content-Type-Options': 'nosniff',
}


class _TooLarge(ValueError):
    """A body above the limit."""


def create_app(stage: Stage) -> Starlette:
    """The page and what it asks of a stage, as an ASGI application.

    It answers to the names of this machine only, so that no page from elsewhere reaches it under a name of its own.

    Raises:
        ModuleNotFoundError: Starlette is missing.
    """
    need('starlette')
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    async def state(request: Request) -> Response:
        return JSONResponse(stage.describe(), headers=_HEADERS)

    async def example(request: Request) -> Response:
        shown = await run_in_threadpool(stage.show_example, request.path_params['number'])
        return JSONResponse(shown.about, headers=_HEADERS)

    async def picture(request: Request) -> Response:
        body, name = await _read(request, MAX_BYTES), request.query_params.get('name', 'the picture')
        shown = await run_in_threadpool(stage.show, io.BytesIO(body), name)
        return JSONResponse(shown.about, headers=_HEADERS)

    def asked(answer: Callable[..., Any], **kinds: Any) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            arguments = _arguments(await _read(request, 2 ** 22), kinds)
            return JSONResponse(await run_in_threadpool(answer, **arguments), headers=_HEADERS)

        return endpoint

    async def search(request: Request) -> Response:
        arguments = _arguments(await _read(request, 2 ** 22), dict(
            picture=str, positions=list, objective=str, label=int, steps=int, lr=float))
        steps = search_steps(stage, **arguments)
        return StreamingResponse(_lines(steps), media_type='application/x-ndjson', headers=_HEADERS)

    routes = [
        Route('/api/state', state),
        Route('/api/example/{number:int}', example),
        Route('/api/picture', picture, methods=['POST']),
        Route('/api/place', asked(stage.place, picture=str, prior=str, n_tokens=int, seed=int), methods=['POST']),
        Route('/api/answer', asked(
            stage.answer, picture=str, positions=list, keep_rate=float, worth=bool), methods=['POST']),
        Route('/api/density', asked(stage.density, picture=str), methods=['POST']),
        Route('/api/search', search, methods=['POST']),
        Mount('/', StaticFiles(directory=PAGE, html=True)),
    ]
    return Starlette(
        routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
        exception_handlers={ValueError: _refuse, IndexError: _refuse, UnknownPicture: _refuse, OSError: _refuse})


async def _refuse(request: Request, error: Exception) -> Response:
    """What was wrong, in words, and whether the page can mend it by showing the picture again (404)."""
    from starlette.responses import JSONResponse

    text = 'this picture is not here any more' if isinstance(error, UnknownPicture) else str(error)
    kinds = ((UnknownPicture, 404), (_TooLarge, 413), (PictureError, 422))
    status = next((status for kind, status in kinds if isinstance(error, kind)), 400)
    return JSONResponse(dict(error=text), status_code=status, headers=_HEADERS)


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _TooLarge(f'that is more than {limit // 2 ** 20} MB, which is not read.')
    return bytes(body)


def _arguments(body: bytes, kinds: dict[str, type]) -> dict[str, Any]:
    """The fields of a JSON object, each of its kind; those that are absent or null are left out."""
    try:
        given = json.loads(body)
    except ValueError:
        raise ValueError('the request is no JSON.') from None
    if not isinstance(given, dict):
        raise ValueError('the request must be a JSON object.')
    arguments = {name: value for name, value in given.items() if value is not None}
    for name, value in arguments.items():
        # To Python True is an int, and 1 no float.
        taken = {float: (float, int), int: int}.get(kinds.get(name), kinds.get(name))
        if taken is None or not isinstance(value, taken) or (isinstance(value, bool) and taken is not bool):
            raise ValueError(f'{name}={value!r:.80} is not understood: the fields are {", ".join(kinds)}.')
    needed = {'picture', 'positions', 'prior', 'n_tokens'} & set(kinds)
    missing = sorted(needed - set(arguments))
    if missing:
        raise ValueError(f'the request lacks {", ".join(missing)}.')
    return arguments


async def _lines(steps: Iterator[dict[str, Any]]) -> AsyncIterator[str]:
    """A line of JSON for each step; when the page goes, the search ends."""
    from starlette.concurrency import run_in_threadpool

    try:
        while True:
            step = await run_in_threadpool(next, steps, None)
            if step is None:
                break
            yield json.dumps(step) + '\n'
    except ValueError as e:
        yield json.dumps(dict(error=str(e))) + '\n'
    finally:
        steps.close()  # type: ignore[attr-defined]


def listen(port: int) -> socket.socket:
    """A socket on this machine's own address.

    Raises:
        OSError: The port is taken, or may not be used.
    """
    try:
        return socket.create_server(('127.0.0.1', port))
    except OSError as e:
        raise OSError(f'port={port} cannot be used ({e.strerror}): choose another, or 0 for any that is free.') from e


def serve(stage: Stage, opened: socket.socket) -> None:
    """Serve the page on a socket until Ctrl-C.

    Raises:
        ModuleNotFoundError: uvicorn is missing.
    """
    need('uvicorn')
    import uvicorn

    config = uvicorn.Config(create_app(stage), log_level='warning', timeout_graceful_shutdown=1)
    with suppress(KeyboardInterrupt):  # uvicorn has closed, and raises it again
        uvicorn.Server(config).run(sockets=[opened])
