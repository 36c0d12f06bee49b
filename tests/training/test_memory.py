"""Freed memory that stays in the process, seen by what the kernel has to clear again."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.training import loop

ROOT = Path(__file__).resolve().parents[2]

# blocks as large as activations, freed and asked for again; prints the page faults of the last round
ROUNDS = """
import resource, sys, threading
from pipeline.training.loop import keep_freed_memory
def rounds():
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [b"x" * 40_000_000 for _ in range(4)]
        del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[1] == "main":
    rounds()
    keep_freed_memory()
    rounds()
else:
    keep_freed_memory()
    threading.Thread(target=rounds).start()
"""


def faults(where: str, **environment: str) -> list[int]:
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "timeout": 100, "check": True}
    run = subprocess.run([sys.executable, "-c", ROUNDS, where], capture_output=True, text=True, **options)
    return [int(line) for line in run.stdout.split()]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_blocks_are_found_again_without_a_page_fault() -> None:
    pages = 4 * 40_000_000 // 4096
    before, kept = faults("main")
    assert before > pages / 2, "nothing is given back here: this test cannot fail"
    assert kept < pages / 100
    assert faults("thread", **loop.IN_WORKERS)[0] < pages / 100


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.sys, "platform", "win32")
    assert loop.keep_freed_memory() is False
    monkeypatch.setattr(loop.sys, "platform", "linux")
    monkeypatch.setattr(loop.ctypes, "CDLL", lambda _: object())
    assert loop.keep_freed_memory() is False
