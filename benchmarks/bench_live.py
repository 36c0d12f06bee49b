"""Measure the latency of live streams, from a sound to the answer that includes it, with several streams at once.

    python -m benchmarks.bench_live [--streams 8 --seconds 30 --engine local --rate_hz 48000 --hop_s 0.5]

Each stream sends the clips of ``samples/`` as 16-bit PCM in real time, in messages of a tenth of a second. The streams
begin at random moments. For a sound every 10 ms, from the first answer on, the latency is the time from its moment in
the stream to the arrival of the first answer whose window includes it. That contains the length of the message and the
hop: a sound just after a window's end waits for the next window. Client and service share the machine; the load average
shows other work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.services import Running, ours, started
from pipeline.audio.load import load
from tests.support.processes import ROOT, cpu_seconds, machine

PIECE_S = 0.1
WANTED_MS = 400.0  # plus the hop


@dataclass
class Spoken:
    """One stream: the time of its first sound, and for each answer its window's end, its arrival and its ``lag_s``."""

    begun_s: float = 0.0
    answers: list[tuple[float, float, float]] = field(default_factory=list)
    skipped: int = 0

    def waits_ms(self) -> list[float]:
        """Latencies in ms of sounds every 10 ms, to the first answer that includes them."""
        found = []
        for (before_s, _, _), (end_s, came_s, _) in zip(self.answers, self.answers[1:], strict=False):
            spoken_s = np.arange(before_s, end_s, 0.01)
            found += list(1e3 * (came_s - self.begun_s - spoken_s))
        return found


def voices(rate_hz: int, seconds: float) -> bytes:
    """The sample clips one after the other, repeated to the given length."""
    files = sorted((ROOT / "samples").glob("*.flac"))
    sound = np.concatenate([load(file, sample_rate_hz=rate_hz).samples for file in files])
    return np.round(32_767 * np.resize(sound, round(rate_hz * seconds))).astype("<i2").tobytes()


async def speak(url: str, sound: bytes, options: argparse.Namespace) -> Spoken:
    """Send the sound in real time; returns the answers."""
    loop, spoken = asyncio.get_running_loop(), Spoken()
    await asyncio.sleep(random.uniform(0, 2))
    address = f"{url.replace('http', 'ws', 1)}/v1/stream?format=s16le&sample_rate_hz={options.rate_hz}"
    async with connect(f"{address}&hop_s={options.hop_s}", compression=None, proxy=None) as socket:
        await socket.recv()
        spoken.begun_s = loop.time()
        hearing = asyncio.create_task(_hear(socket, spoken))
        size = 2 * round(options.rate_hz * PIECE_S)
        for number, at in enumerate(range(0, len(sound), size), start=1):
            await asyncio.sleep(spoken.begun_s + number * PIECE_S - loop.time())
            await socket.send(sound[at : at + size])
        await socket.send('{"type": "end"}')
        await hearing
    return spoken


async def _hear(socket: ClientConnection, spoken: Spoken) -> None:
    async for message in socket:
        told = json.loads(message)
        if told["type"] == "answer":
            now_s = asyncio.get_running_loop().time()
            spoken.answers.append((told["window"]["end_s"], now_s, told["lag_s"]))
        elif told["type"] == "done":
            spoken.skipped = told["skipped"]


async def all_of_them(running: Running, options: argparse.Namespace) -> list[Spoken]:
    sound = voices(options.rate_hz, options.seconds)
    return list(await asyncio.gather(*(speak(running.url, sound, options) for _ in range(options.streams))))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--rate_hz", type=int, default=48_000)
    parser.add_argument("--hop_s", type=float, default=0.5)
    options = parser.parse_args(argv)
    before = os.getloadavg()[0]
    with started(ours("--engine", options.engine)) as running:
        began_s = cpu_seconds(running.pid)
        spoken = asyncio.run(all_of_them(running, options))
        used_s = cpu_seconds(running.pid) - began_s
    waits_ms = [wait for one in spoken for wait in one.waits_ms()]
    lags_ms = [1e3 * lag for one in spoken for _, _, lag in one.answers]
    wanted_ms = WANTED_MS + 1e3 * options.hop_s
    p50, p95, p99 = np.percentile(waits_ms, (50, 95, 99))
    print(machine())
    print(f"load before: {before:.1f}; {options.streams} streams, {options.engine}, {options.rate_hz} Hz, {options}")
    print("\n| sound to answer, hop included | measured | wanted | |\n|---|---|---|---|")
    print(f"| p95 | {p95:.0f} ms | {wanted_ms:.0f} ms | {'reached' if p95 <= wanted_ms else 'MISSED'} |")
    print(f"| p50, p99 | {p50:.0f}, {p99:.0f} ms | | |")
    print(f"| in the service, p50, p95 | {np.percentile(lags_ms, 50):.0f}, {np.percentile(lags_ms, 95):.0f} ms | | |")
    print(f"| answers, skipped windows | {len(lags_ms)}, {sum(one.skipped for one in spoken)} | | |")
    print(f"| CPU of the service per second of sound | {1e3 * used_s / options.seconds / options.streams:.0f} ms | | |")
    return 0 if p95 <= wanted_ms else 3


if __name__ == "__main__":
    raise SystemExit(main())
