"""Used by several benchmarks: timing in turns, commands in child processes, recordings to send."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from tests.support.processes import ROOT, command_of, descendants
from tests.support.recordings import encode, synthetic_speech

CLIP_S, RATE_HZ = 3.7, 48_000
Seconds = dict[str, list[float]]


def timed(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def in_turns(sides: Mapping[str, Callable[[], float]], turns: int, unit: str = "s", factor: float = 1.0) -> Seconds:
    """Measure the sides alternately, so that other work on the machine affects all; prints each turn."""
    found: Seconds = {name: [] for name in sides}
    for turn in range(1, turns + 1):
        for name, measure in sides.items():
            found[name].append(measure())
        told = ", ".join(f"{name} {values[-1] * factor:.2f} {unit}" for name, values in found.items())
        print(f"  turn {turn}: {told}", flush=True)
    return found


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios of each turn."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def clips(count: int = 16, duration_s: float = CLIP_S, rate_hz: int = RATE_HZ) -> list[bytes]:
    """Different recordings of one length: synthetic speech as 16-bit mono WAV."""
    return [encode(synthetic_speech(duration_s, rate_hz, seed=seed), rate_hz, "WAV", "PCM_16") for seed in range(count)]


def start_job(*words: object) -> subprocess.Popen[str]:
    """Start ``python -m WORDS``; its errors can be read, its output is dropped."""
    line = [sys.executable, "-m", *map(str, words)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_driver(process: subprocess.Popen[str]) -> str:
    """Kill a command that uses Ray or child processes; returns how its other processes ended."""
    family = [pid for pid in descendants(process.pid) if "Agent" not in command_of(pid)]  # Ray's agents linger
    process.kill()
    process.communicate()
    start_s = time.monotonic()
    while any(map(command_of, family)) and time.monotonic() - start_s < 60:
        time.sleep(0.1)
    gone_s, left = time.monotonic() - start_s, sum(bool(command_of(pid)) for pid in family)
    return f"its {len(family)} processes gone after {gone_s:.1f} s, {left} left"
