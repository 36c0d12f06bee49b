"""Freed memory that stays in the process, seen by what the kernel has to clear again."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.training import loop

ROOT = Path(__file__).resolve().parents[2]

# blocks as large as activations, freed and asked for again; prints the page faults of the last round
ROUNDS = """
import resource, sys, threading
from pipeline.training.loop import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory(), file=sys.stderr)
def rounds():
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [b"x" * 40_000_000 for _ in range(4)]
        del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=rounds)
thread.start() if sys.argv[2] == "thread" else rounds()
"""


def faults(keep: str, where: str, **environment: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", ROUNDS, keep, where],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return int(run.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_blocks_are_found_again_without_a_page_fault() -> None:
    pages = 4 * 40_000_000 // 4096
    assert faults("give back", "main") > pages / 2, "nothing is given back here: this test cannot fail"
    assert faults("keep", "main") < pages / 100
    assert faults("keep", "thread", **loop.IN_WORKERS) < pages / 100


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.sys, "platform", "win32")
    assert loop.keep_freed_memory() is False
    monkeypatch.setattr(loop.sys, "platform", "linux")
    monkeypatch.setattr(loop.ctypes, "CDLL", lambda _: object())
    assert loop.keep_freed_memory() is False
