"""A load generator with low CPU cost: prepared HTTP/1.1 requests over kept connections, closed or open loop.

Closed loop: each of n clients sends its next request when it has its response. Open loop: requests start at random
moments (Poisson) with a given rate, whether or not earlier ones have been answered, like those of many independent
users. Their latency counts from the moment they were due.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

BROKEN = 0  # in place of a status: no response


@dataclass
class Load:
    """The results. Times in seconds; ``answers``: moment when due, latency, status."""

    answers: list[tuple[float, float, int]] = field(default_factory=list)
    without_retry_after: int = 0  # refusals without Retry-After
    seconds: float = 0.0
    cpu_s: float = field(default_factory=lambda: -time.process_time())
    started_s: float = field(default_factory=time.perf_counter)

    async def send(self, connection: _Connection, message: bytes, due_s: float) -> None:
        status, told = await connection.ask(message)
        now_s = time.perf_counter()
        self.answers.append((due_s - self.started_s, now_s - due_s, status))
        self.without_retry_after += status in (429, 503) and not told

    def finish(self) -> Load:
        self.seconds = time.perf_counter() - self.started_s
        self.cpu_s += time.process_time()
        return self

    @property
    def statuses(self) -> Counter[int]:
        return Counter(status for _, _, status in self.answers)

    @property
    def rate(self) -> float:
        """Requests per second with status 200."""
        return self.statuses[200] / self.seconds

    def latencies_ms(self, status: int = 200, begin_s: float = 0.0, end_s: float = float("inf")) -> np.ndarray:
        return np.array([1e3 * took for due, took, found in self.answers if found == status and begin_s <= due < end_s])

    def percentile_ms(self, percent: float, **which: float) -> float:
        latencies = self.latencies_ms(**which)
        return float(np.percentile(latencies, percent)) if len(latencies) else float("nan")

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds per request of this tool."""
        return 1e3 * self.cpu_s / max(len(self.answers), 1)


def request(host: str, port: int, path: str, body: bytes, content_type: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def multipart(data: bytes) -> tuple[bytes, str]:
    """Body and content type of a multipart form with one file."""
    head = '--b\r\nContent-Disposition: form-data; name="file"; filename="clip.wav"\r\n\r\n'
    return head.encode() + data + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"


class _Connection:
    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, message: bytes) -> tuple[int, bool]:
        """Send a request -> status, and whether the response has Retry-After."""
        try:
            if self.streams is not None and self.streams[0].at_eof():
                self.close()  # the service closed the idle connection
            if self.streams is None:
                self.streams = await asyncio.open_connection(self.host, self.port)
            reader, writer = self.streams
            writer.write(message)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r")[0])
            await reader.readexactly(length)
            if b"connection: close" in head:
                self.close()
            return int(head[9:12]), b"retry-after:" in head
        except (OSError, asyncio.IncompleteReadError, ValueError):
            self.close()
            return BROKEN, False

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


def closed_loop(host: str, port: int, messages: Sequence[bytes], clients: int, seconds: float) -> Load:
    """Run ``clients`` that send one request after another."""

    async def run() -> Load:
        load = Load()
        until_s = load.started_s + seconds

        async def client(number: int) -> None:
            connection, turn = _Connection(host, port), number
            while (now_s := time.perf_counter()) < until_s:
                await load.send(connection, messages[turn % len(messages)], now_s)
                turn += clients
            connection.close()

        await asyncio.gather(*(client(number) for number in range(clients)))
        return load.finish()

    return asyncio.run(run())


def open_loop(host: str, port: int, messages: Sequence[bytes], rate: float, seconds: float, seed: int = 0) -> Load:
    """Start requests at ``rate`` a second, Poisson, on as many connections as needed."""

    async def run() -> Load:
        rng, load = random.Random(seed), Load()
        idle: list[_Connection] = []
        tasks: set[asyncio.Task[None]] = set()

        async def one(message: bytes, due_s: float) -> None:
            connection = idle.pop() if idle else _Connection(host, port)
            await load.send(connection, message, due_s)
            idle.append(connection)

        due_s, turn = load.started_s, 0
        while due_s < load.started_s + seconds:
            await asyncio.sleep(max(due_s - time.perf_counter(), 0))
            task = asyncio.create_task(one(messages[turn % len(messages)], due_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due_s += rng.expovariate(rate)
            turn += 1
        await asyncio.gather(*tasks)
        for connection in idle:
            connection.close()
        return load.finish()

    return asyncio.run(run())
