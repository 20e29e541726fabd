"""Load on a running service: at its own pace, at a multiple of that for a while, and quiet again.

    python examples/serve/load_test.py PICTURE --url http://127.0.0.1:8000 --times 2 --seconds 600

First the sustainable rate is measured: some clients, each of which asks again as soon as it was answered. Then requests
begin at `--times` that rate, whether earlier ones are answered or not. Every request must be answered or refused (503).
"""
from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import click

TIMEOUT = 30.
FRESH = 2.  # seconds for which an idle connection is used again: the service closes them some time


class Load:
    """What became of requests."""

    def __init__(self, host: str, port: int, body: bytes) -> None:
        self.host, self.port, self.body = host, port, body
        self.idle: list = []  # connections, and since when
        self.reset()

    def reset(self) -> None:
        self.statuses, self.budgets, self.times, self.lost, self.without_hint = Counter(), Counter(), [], [], 0

    async def ask(self, method: str = 'POST', path: str = '/predict', body: bytes = b'') -> tuple[int, str, bytes]:
        """Status, head and body of a response."""
        while self.idle and time.perf_counter() - self.idle[-1][2] > FRESH:
            self.idle.pop()[1].close()
        reader, writer, _ = self.idle.pop() if self.idle else (
            *await asyncio.open_connection(self.host, self.port), 0.)
        keep = False
        try:
            writer.write(f'{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n'.encode() + body)
            await writer.drain()
            head = (await reader.readuntil(b'\r\n\r\n')).decode()
            answer = await reader.readexactly(int(re.search(r'content-length: (\d+)', head, re.IGNORECASE)[1]))
            keep = 'connection: close' not in head.lower()
            return int(head.split()[1]), head, answer
        finally:
            if keep:
                self.idle.append((reader, writer, time.perf_counter()))
            else:
                writer.close()

    async def close(self) -> None:
        """Close all connections."""
        for _, writer, _ in self.idle:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        self.idle = []

    async def request(self) -> None:
        """One picture, counted."""
        begin = time.perf_counter()
        try:
            status, head, answer = await asyncio.wait_for(self.ask(body=self.body), TIMEOUT)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError) as e:
            self.lost.append(repr(e))
            return
        self.statuses[status] += 1
        self.without_hint += status == 503 and 'retry-after' not in head.lower()
        if status == 200:
            self.times.append(time.perf_counter() - begin)
            self.budgets[json.loads(answer)['n_tokens']] += 1

    async def closed(self, clients: int, seconds: float) -> float:
        """Answers a second to clients that ask one after the other."""
        until = time.perf_counter() + seconds

        async def client() -> None:
            while time.perf_counter() < until:
                await self.request()

        await asyncio.gather(*(client() for _ in range(clients)))
        return self.statuses[200] / seconds

    async def open(self, rate: float, seconds: float) -> None:
        """Requests that begin at a rate, for a while."""
        tasks, begin, sent = set(), time.perf_counter(), 0
        while (now := time.perf_counter() - begin) < seconds:
            while sent < rate * now:
                task = asyncio.create_task(self.request())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                sent += 1
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)

    async def memory(self) -> float:
        """MB of the service."""
        _, _, text = await self.ask('GET', '/metrics')
        return int(re.search(rb'process_resident_memory_bytes (\d+)', text)[1]) / 1e6

    def report(self, name: str, seconds: float) -> str:
        times = sorted(self.times) or [0.]
        answered = sum(self.budgets.values())
        tokens = '  '.join(f'{n}: {100 * c / answered:.0f} %' for n, c in sorted(self.budgets.items()))
        said = ', '.join(f'{status}: {count}' for status, count in sorted(self.statuses.items()))
        first = f' (the first: {self.lost[0]})' if self.lost else ''
        return (
            f'{name}: {sum(self.statuses.values()) + len(self.lost)} requests in {seconds:.0f} s, {said}, '
            f'lost {len(self.lost)}{first}, 503 without Retry-After {self.without_hint}, answered '
            f'{self.statuses[200] / seconds:.1f}/s, median {1e3 * times[len(times) // 2]:.0f} ms, 99 % '
            f'{1e3 * times[int(0.99 * (len(times) - 1))]:.0f} ms, tokens {tokens}')


async def run(load: Load, clients: int, times: float, seconds: float, quiet: float) -> bool:
    """Whether every request was answered or refused."""
    await load.closed(1, 2.)
    load.reset()
    rate = await load.closed(clients, min(10., seconds))
    click.echo(load.report(f'sustainable, {clients} clients', min(10., seconds)))
    lost, before = len(load.lost), await load.memory()
    parts = max(1, round(seconds / 60))
    for part in range(parts):
        load.reset()
        await load.open(times * rate, seconds / parts)
        lost += len(load.lost) + sum(n for status, n in load.statuses.items() if status not in (200, 503))
        lost += load.without_hint
        click.echo(f'{load.report(f"{times:g} times, part {part + 1}", seconds / parts)}, {await load.memory():.0f} MB')
    load.reset()
    await load.open(2., quiet)
    lost += len(load.lost)
    click.echo(f'{load.report("quiet", quiet)}, memory {before:.0f} -> {await load.memory():.0f} MB')
    await load.close()
    return not lost


@click.command(help=__doc__)
@click.argument('picture', type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option('--url', default='http://127.0.0.1:8000', show_default=True)
@click.option('--clients', default=32, show_default=True, help='That find the sustainable rate.')
@click.option('--times', default=2., show_default=True)
@click.option('--seconds', default=60., show_default=True)
@click.option('--quiet', default=10., show_default=True, help='Seconds at two requests a second afterwards.')
def main(picture: Path, url: str, clients: int, times: float, seconds: float, quiet: float) -> None:
    parts = urlsplit(url)
    load = Load(parts.hostname, parts.port, picture.read_bytes())
    if not asyncio.run(run(load, clients, times, seconds, quiet)):
        raise click.ClickException('requests were lost')


if __name__ == '__main__':
    main()
