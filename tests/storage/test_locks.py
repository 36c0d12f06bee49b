"""Locks between openings and processes, and the branch for Windows with a stand-in for its module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.storage.errors import SerError
from pipeline.storage.locks import only_one, try_lock

ROOT = Path(__file__).resolve().parents[2]


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a/b/.lock"
    with only_one(path, "counting"):
        with pytest.raises(SerError, match="another process is counting"), only_one(path, "counting"):
            pass
        other = subprocess.run(
            [
                sys.executable,
                "-c",
                f"from pipeline.storage.locks import try_lock; print(try_lock(open({str(path)!r}, 'a')))",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert other.stdout == "False\n"
    with only_one(path, "counting"):
        pass


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SerError, match="cannot write"), only_one(tmp_path / "file/.lock", "counting"):
        pass


def test_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: set[int] = set()

    def locking(descriptor: int, mode: int, n_bytes: int) -> None:
        assert (mode, n_bytes) == (2, 1)
        if held:
            raise PermissionError(13, "Permission denied")
        held.add(descriptor)

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(sys, "platform", "win32")
    with (tmp_path / "lock").open("a") as first, (tmp_path / "lock").open("a") as second:
        assert try_lock(first)
        assert not try_lock(second)
