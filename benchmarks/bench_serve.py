"""Compare the service with the Predictor in this process, and with a Serve application that does nothing.

    python -m benchmarks.bench_serve [--seconds 30 --overload_s 300 --threads 1 --replicas 1]

Recordings are synthetic 48 kHz mono 16-bit WAV of 3.7 s (355 kB), posted as multipart forms over kept connections.
The load tool runs on the same machine and uses a part of the CPUs; its CPU time is printed too. Rows:

1. the Predictor in this process: recordings a second in batches of 16, with as many math threads as all workers;
2. the cost of Serve itself: the same requests to a deployment that reads the body and answers, and to two in a row,
   without the middlewares that this service adds to Serve's proxy;
3. throughput at 16 clients, compared with 1 minus the CPU time of 2 (two stages) and of the load tool;
4. p50 at 1 client, compared with one recording in this process plus the no-op, in turns, the median of 5 turns;
5. p99 compared with p50 at 80 % of the capacity found in 3, with random arrivals (Poisson);
6. twice the capacity, for minutes: accepted and refused requests, and memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.common import clips
from benchmarks.load import Load, closed_loop, multipart, open_loop, request
from benchmarks.services import HOST, Running, no_op, ours, started
from pipeline.inference.predictor import Predictor
from tests.support.processes import cpu_seconds, machine, watched

BATCH = 16
BESIDE = "measured beside"
STEADY = "p99 within 1.5x, 0 other errors, Retry-After on all, memory flat"
CLIENTS, TURNS = 16, 5


@dataclass
class Verdict:
    """The rows of the table, and whether each target was reached."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def add(self, what: str, measured: str, wanted: str, reached: bool) -> None:
        self.rows.append((what, measured, wanted, reached))

    def print(self) -> None:
        print("\n| what | measured | wanted | |\n|---|---|---|---|")
        for what, measured, wanted, reached in self.rows:
            verdict = "" if wanted == BESIDE else "reached" if reached else "MISSED"
            print(f"| {what} | {measured} | {wanted} | {verdict} |")


def in_batches(predictor: Predictor, data: Sequence[bytes], seconds: float) -> float:
    """Recordings a second in this process, in batches."""
    batch = [data[i % len(data)] for i in range(BATCH)]
    predictor.predict(batch)
    done, start_s = 0, time.perf_counter()
    while time.perf_counter() < start_s + seconds:
        predictor.predict(batch)
        done += BATCH
    return done / (time.perf_counter() - start_s)


def one_by_one(predictor: Predictor, data: Sequence[bytes], seconds: float) -> float:
    """Median milliseconds of one recording in this process."""
    took_ms, until_s = [], time.perf_counter() + seconds
    while (start_s := time.perf_counter()) < until_s:
        predictor.predict([data[len(took_ms) % len(data)]])
        took_ms.append(1e3 * (time.perf_counter() - start_s))
    return statistics.median(took_ms)


def one_client(predictor: Predictor, data: Sequence[bytes], size: Sequence[str], seconds: float) -> list[list[float]]:
    """p50 in ms of one recording in this process, of the no-op and of the service, alternating in `TURNS` turns."""
    bodies = [multipart(clip) for clip in data]
    with started(no_op(two_stages=False)) as nothing, started(ours(*size)) as service:
        plain, real = (
            [request(HOST, running.port, path, *body) for body in bodies]
            for running, path in ((nothing, "/"), (service, "/v1/predict"))
        )
        for running, messages in ((nothing, plain), (service, real)):
            closed_loop(HOST, running.port, messages, 1, min(seconds, 3.0))
        turns = []
        for _ in range(TURNS):
            found = [one_by_one(predictor, data, seconds)]
            for running, messages in ((nothing, plain), (service, real)):
                found.append(closed_loop(HOST, running.port, messages, 1, seconds).percentile_ms(50))
            turns.append(found)
            print("1 client, p50: in process {:.1f} ms, no-op {:.1f} ms, service {:.1f} ms".format(*found), flush=True)
    return turns


def measured(service: Running, messages: Sequence[bytes], clients: int, seconds: float) -> tuple[Load, float]:
    """A closed loop after a warm-up, and the CPU milliseconds per request of the service's processes."""
    closed_loop(HOST, service.port, messages, clients, min(seconds, 5.0))
    before_s = cpu_seconds(service.pid)
    load = closed_loop(HOST, service.port, messages, clients, seconds)
    return load, 1e3 * (cpu_seconds(service.pid) - before_s) / max(len(load.answers), 1)


def show(what: str, load: Load, service_ms: float) -> str:
    """Print the results of a closed loop in one line, and return them."""
    told = f"{load.rate:.1f}/s, p50 {load.percentile_ms(50):.1f} ms, p99 {load.percentile_ms(99):.1f} ms; "
    told += f"CPU a request: service {service_ms:.1f} ms, load tool {load.cpu_ms:.1f} ms"
    print(f"{what}: {told}; {dict(load.statuses)}", flush=True)
    return told


def no_ops(messages_of: Sequence[bytes], seconds: float, verdict: Verdict) -> float:
    """CPU milliseconds per request of the no-op with two stages, and of the load tool, at 16 clients."""
    bodies = [multipart(data) for data in messages_of]
    cost_ms = 0.0
    for two_stages in (False, True):
        name = "no-op, ingress and inner deployment" if two_stages else "no-op"
        with started(no_op(two_stages=two_stages)) as service:
            messages = [request(HOST, service.port, "/", *body) for body in bodies]
            for clients in (1, CLIENTS):
                load, service_ms = measured(service, messages, clients, seconds)
                told = show(f"{name}, {clients} clients", load, service_ms)
                verdict.add(f"{name}, {clients} clients", told, BESIDE, True)
                cost_ms = service_ms + load.cpu_ms
    return cost_ms


def overload(service: Running, messages: Sequence[bytes], rate: float, seconds: float, calm: Load) -> tuple[str, bool]:
    """Run twice the capacity of the service; returns the outcome, and whether it reaches the targets."""
    held: list[dict[str, float]] = []
    with watched(lambda: held.append(service.memory_mib()), every_s=seconds / 50):
        load = open_loop(HOST, service.port, messages, rate, seconds)
    fifth = len(held) // 5  # the first fills buffers and caches
    early, late = (
        {name: max(row[name] for row in part) for name in held[0]} for part in (held[fifth : 2 * fifth], held[-fifth:])
    )
    fifths = [load.percentile_ms(99, begin_s=m * seconds / 5, end_s=(m + 1) * seconds / 5) for m in range(5)]
    statuses = load.statuses
    others = len(load.answers) - statuses[200] - statuses[429] - statuses[503]
    grown = ", ".join(f"{name} {held[0][name]:.0f}, {early[name]:.0f}, {late[name]:.0f}" for name in early)
    print(f"  offered {rate:.0f}/s for {seconds:.0f} s; accepted {load.rate:.1f}/s; statuses {dict(statuses)}")
    print(f"  accepted: p50 {load.percentile_ms(50):.0f} ms, p99 {load.percentile_ms(99):.0f} ms, by fifths", end=" ")
    print(f"{np.round(fifths)}; at 80 % it was {calm.percentile_ms(99):.0f} ms")
    print(f"  refused: p50 {load.percentile_ms(50, status=429):.0f} ms; {load.without_retry_after} without Retry-After")
    print(f"  memory in MiB at first, in the second and in the last fifth: {grown}", flush=True)
    steady = max(fifths) <= 1.5 * min(fifths)
    flat = all(late[name] <= 1.1 * early[name] for name in early)
    told = f"{statuses[200]} accepted, p99 by fifths {min(fifths):.0f}-{max(fifths):.0f} ms; {others} other errors, "
    told += f"{statuses[429]} times 429, {statuses[503]} times 503, {load.without_retry_after} of them without "
    told += f"Retry-After; memory {'flat' if flat else 'GREW'}"
    return told, steady and flat and others == 0 and load.without_retry_after == 0


def main() -> int:
    """Measure, print; 0 where every target is reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--overload_s", type=float, default=300.0)
    parser.add_argument("--threads", type=int, default=1, help="math threads of a model worker")
    parser.add_argument("--replicas", type=int, default=1, help="model workers")
    parser.add_argument("--engine", choices=("ray", "local"), default="ray")
    arguments = parser.parse_args()
    seconds, cpus = arguments.seconds, arguments.threads * arguments.replicas
    print(f"machine: {machine()}\n{arguments.replicas} model workers of {arguments.threads} threads", flush=True)
    data, verdict = clips(), Verdict()
    predictor = Predictor.from_bundle(threads=cpus, batch_size=BATCH)
    batches = in_batches(predictor, data, min(seconds, 15.0))
    print(f"in process, {cpus} threads: batches of 16 {batches:.1f}/s", flush=True)
    size = ("--threads", str(arguments.threads), "--replicas", str(arguments.replicas))
    size += ("--max_replicas", str(arguments.replicas), "--engine", arguments.engine)
    turns = one_client(predictor, data, size, seconds / 5)
    single_ms, no_op_ms, one_ms = map(statistics.median, zip(*turns, strict=True))
    extra_ms = statistics.median(ours_ms - alone_ms - nothing_ms for alone_ms, nothing_ms, ours_ms in turns)
    told = f"{one_ms:.1f} ms; in process {single_ms:.1f}, no-op {no_op_ms:.1f}; {extra_ms:+.1f} ms, {TURNS} turns"
    verdict.add("p50 at 1 client", told, "<= +5 ms", extra_ms <= 5.0)
    cost_ms = no_ops(data, seconds / 2, verdict)

    with started(ours(*size)) as service:
        messages = [request(HOST, service.port, "/v1/predict", *multipart(clip)) for clip in data]
        show("service, 1 client", *measured(service, messages, 1, seconds / 2))
        many, service_ms = measured(service, messages, CLIENTS, seconds)
        show(f"service, {CLIENTS} clients", many, service_ms)
        machine_cpus = len(os.sched_getaffinity(0))
        possible = min(batches, 1e3 * machine_cpus / (1e3 * cpus / batches + cost_ms))
        told = f"{many.rate:.1f}/s = {many.rate / batches:.2f}x in process, {many.rate / possible:.2f}x less Serve CPU"
        verdict.add(f"throughput at {CLIENTS} clients", told, ">= 0.8x", many.rate >= 0.8 * possible)
        calm = open_loop(HOST, service.port, messages, 0.8 * many.rate, 2 * seconds, seed=1)
        p50, p99 = calm.percentile_ms(50), calm.percentile_ms(99)
        told = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms = {p99 / p50:.1f}x; {dict(calm.statuses)}"
        verdict.add(f"80 % of capacity, {0.8 * many.rate:.0f}/s", told, "<= 5x", p99 <= 5 * p50)
        print("twice the capacity:")
        told, reached = overload(service, messages, 2 * many.rate, arguments.overload_s, calm)
        verdict.add(f"{arguments.overload_s:.0f} s at twice the capacity", told, STEADY, reached)
    verdict.print()
    return 0 if all(row[3] for row in verdict.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
