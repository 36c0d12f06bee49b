"""Kill model workers with ``kill -9`` under load; count failed requests, and measure the time to recovery.

    python -m benchmarks.kill_replica [--replicas 2 --kills 5 --clients 4 --pause_s 15]

Load: ``serve.client.AsyncClient`` in a closed loop with its retries, and one client without retries. The service has
recovered when as many workers as before run, under new pids, and it answers at the previous rate.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter

from benchmarks.common import clips
from benchmarks.services import Running, ours, started
from serve.client import AsyncClient, ClientError, Refused
from tests.support.processes import machine

_RECOVERED = 0.8  # of the rate before the kill
_SPAN_S = 2.0
_WAIT_S = 120.0


class Traffic:
    """Clients that send one request after another; ``ended`` has the time of each answer."""

    def __init__(self, url: str, clients: int, retries: int) -> None:
        self.url, self.clients, self.retries = url, clients, retries
        self.ended: list[float] = []
        self.failures: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.stopped = False

    async def run(self, data: list[bytes]) -> None:
        await asyncio.gather(*(self._client(data, number) for number in range(self.clients)))

    async def _client(self, data: list[bytes], turn: int) -> None:
        async with AsyncClient(self.url, retries=self.retries) as client:
            while not self.stopped:
                begun_s = time.monotonic()
                try:
                    await client.predict(data[turn % len(data)])
                except Refused as error:
                    self.failures[error.code] += 1
                except ClientError as error:
                    self.failures[type(error).__name__] += 1
                self.ended.append(time.monotonic())
                self.slowest_s = max(self.slowest_s, self.ended[-1] - begun_s)
                turn += self.clients

    def rate(self, since_s: float, until_s: float) -> float:
        return sum(since_s <= moment < until_s for moment in self.ended) / (until_s - since_s)

    def told(self) -> str:
        share = self.failures.total() / max(len(self.ended), 1)
        found = f"{self.failures.total()} of {len(self.ended)} requests failed ({share:.3%})"
        return f"{found} {dict(self.failures) or ''}; slowest {self.slowest_s:.1f} s"


async def kill(service: Running, traffic: Traffic, rng: random.Random) -> str:
    """Kill one worker; returns a description of the recovery."""
    before = service.workers()
    now_s = time.monotonic()
    usual = traffic.rate(now_s - 5.0, now_s)
    victim = rng.choice(before)
    os.kill(victim, signal.SIGKILL)
    while len(set(service.workers()) - {victim}) < len(before):
        await asyncio.sleep(0.1)
        if time.monotonic() - now_s > _WAIT_S:
            raise SystemExit("the worker did not come back")
    process_s = time.monotonic() - now_s
    while True:
        await asyncio.sleep(0.2)
        found_s = time.monotonic()
        if found_s - now_s - process_s >= _SPAN_S and traffic.rate(found_s - _SPAN_S, found_s) >= _RECOVERED * usual:
            break
        if found_s - now_s > _WAIT_S:
            return f"worker {victim}: back after {process_s:.1f} s, but not at its old rate within {_WAIT_S:.0f} s"
    full_s = time.monotonic() - _SPAN_S - now_s
    return f"worker {victim}: new process after {process_s:.1f} s, full rate ({usual:.0f}/s) after {full_s:.1f} s"


async def scenario(service: Running, arguments: argparse.Namespace) -> bool:
    data, rng = clips(4), random.Random(arguments.seed)
    patient = Traffic(service.url, arguments.clients, retries=10)
    impatient = Traffic(service.url, 1, retries=0)
    running = [asyncio.create_task(traffic.run(data)) for traffic in (patient, impatient)]
    await asyncio.sleep(10.0)
    for _ in range(arguments.kills):
        print(" ", await kill(service, patient, rng), flush=True)
        await asyncio.sleep(arguments.pause_s)
    patient.stopped = impatient.stopped = True
    await asyncio.gather(*running)
    print(f"with the client's retries: {patient.told()}\nwithout: {impatient.told()}")
    return patient.failures.total() <= 0.01 * len(patient.ended)


def main() -> int:
    """Start, load, kill, print; 0 where fewer than 1 % of the requests failed after retries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pause_s", type=float, default=15.0, help="seconds between a recovery and the next kill")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"machine: {machine()}\n{arguments.replicas} workers, {arguments.kills} kills, {arguments.clients} clients")
    size = ("--replicas", str(arguments.replicas), "--max_replicas", str(arguments.replicas))
    with started(ours(*size)) as service:
        return 0 if asyncio.run(scenario(service, arguments)) else 1


if __name__ == "__main__":
    sys.exit(main())
