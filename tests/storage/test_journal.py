"""The ledger: claims, locks, parts that are whole or not there, a full disk, notes of attempts that died."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.scoring.ledger import Ledger, LedgerError, open_ledger
from pipeline.storage.errors import SerError
from pipeline.storage.journal import CrashLog, atomic_path, locked, read_plan, write_plan

ROOT = Path(__file__).resolve().parents[2]
PLAN: dict[str, Any] = {"model": "a" * 64, "crops": 1, "rows": 4, "input": "c" * 64}
PART = pa.table({"status": ["ok", "not_audio"], "p": [0.5, None]})


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A begun run, in blocks of two rows."""
    with open_ledger(tmp_path / "out") as opened:
        assert opened.check_or_init(PLAN, 2, overwrite=False) == 2
        yield opened


def finish(ledger: Ledger) -> None:
    ledger.finish({"plan": PLAN, "block_rows": 2})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crops": 3}, "crops 1 instead of 3"),
        ({"model": "b" * 64}, "another model"),
        ({"rows": 5, "input": "d" * 64}, "rows 4 instead of 5, another input"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_refused_or_overwritten(
    change: dict[str, Any], words: str, finished: bool, ledger: Ledger
) -> None:
    ledger.commit(0, PART)
    (ledger.out / "audacity").mkdir()
    leftovers = ["predictions.csv", "segments.parquet", "report.html", "audacity/000000-a.txt", "mistakes.csv"]
    leftovers += ["confusion_matrix.png", "verdict.csv", "failures.csv"]
    for name in (*leftovers, "mine.csv"):
        (ledger.out / name).touch()
    if finished:
        finish(ledger)
    with pytest.raises(LedgerError, match=f"{words}.*--overwrite"):
        ledger.check_or_init({**PLAN, **change}, 2, overwrite=False)
    assert all((ledger.out / name).exists() for name in leftovers), "a refusal changes nothing"
    assert ledger.check_or_init({**PLAN, **change}, 3, overwrite=True) == 3
    assert ledger.finished() is None
    assert ledger.committed({0: 2}) == {}
    assert {path.name for path in ledger.out.iterdir()} == {".score", ".score.lock", "mine.csv"}


@pytest.mark.parametrize("finished", [False, True])
def test_half_written_files_of_runs_that_were_killed_are_swept(finished: bool, ledger: Ledger) -> None:
    if finished:
        finish(ledger)
    else:
        (ledger.work / ".part-000005.parquet.77.tmp").touch()
    for name in (".predictions.parquet.77.tmp", ".run.json.77.tmp", ".mine.tmp"):
        (ledger.out / name).touch()
    ledger.check_or_init(PLAN, 2, overwrite=False)
    assert [path.name for path in ledger.out.rglob(".*.tmp")] == [".mine.tmp"]


def test_a_finished_run_whose_tables_are_gone_is_not_taken_for_done(ledger: Ledger) -> None:
    finish(ledger)
    (ledger.out / "predictions.parquet").touch()
    assert ledger.check_or_init(PLAN, 2, overwrite=False, tables=["predictions"]) == 2
    with pytest.raises(LedgerError, match=r"segments\.parquet is missing"):
        ledger.check_or_init(PLAN, 2, overwrite=False, tables=["predictions", "segments"])
    assert ledger.check_or_init(PLAN, 3, overwrite=True, tables=["predictions", "segments"]) == 3


def test_tables_of_nobody_are_not_overwritten_unasked(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        (tmp_path / "predictions.csv").write_text("mine")
        for half_written in ("{", "[]", ""):
            (tmp_path / "run.json").write_text(half_written)
            assert ledger.finished() is None
            with pytest.raises(LedgerError, match="unknown run"):
                ledger.check_or_init(PLAN, 2, overwrite=False)
    assert (tmp_path / "predictions.csv").read_text() == "mine"


def test_a_begun_run_goes_on_in_its_own_blocks_and_does_damaged_ones_again(ledger: Ledger) -> None:
    for block in range(4):
        ledger.commit(block, PART)
    assert ledger.check_or_init(dict(PLAN), 99, overwrite=False) == 2
    whole = ledger.part_path(0).read_bytes()
    ledger.part_path(1).write_bytes(whole[: len(whole) // 2])
    ledger.part_path(2).write_bytes(b"")
    assert ledger.committed({0: 2, 1: 2, 2: 2, 3: 1, 4: 2}) == {0: 1}
    assert not any(ledger.part_path(block).exists() for block in (1, 2, 3)), "what is damaged is removed"


def test_a_full_disk_leaves_no_part_and_says_what_to_do(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.commit(0, PART)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SerError, match="No space left on device"):
        ledger.commit(1, PART)
    assert sorted(path.name for path in ledger.work.iterdir()) == ["notes", "part-000000.parquet", "plan.json"]
    assert ledger.committed({0: 2, 1: 2}) == {0: 1}


def test_a_second_run_is_refused_and_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.scoring.ledger import open_ledger\n"
        "with open_ledger(Path(sys.argv[1])):\n    print('locked', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(SerError, match="another process"), open_ledger(tmp_path / "out"):
            pytest.fail("two runs hold one folder")
        other.kill()
    with open_ledger(tmp_path / "out") as ledger:
        assert ledger.finished() is None


def test_one_holder_of_a_lock_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a/b/.lock"
    refused = pytest.raises(SerError, match="another process is counting")
    with locked(path, "counting"), refused, locked(path, "counting", wait_s=0.1):
        pytest.fail("two hold one lock")
    with pytest.raises(KeyError), locked(path, "counting"):
        raise KeyError
    with locked(path, "counting"):
        pass
    with pytest.raises(SerError, match="cannot write into"), locked(path / "below", "counting"):
        pytest.fail("a file was taken for a folder")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_path(path) as beside:
        beside.write_text("first")
        assert not path.exists()
    with pytest.raises(TypeError), atomic_path(path) as beside:
        beside.write_bytes("no bytes")  # type: ignore[arg-type]
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "first")]


def test_plans_of_each_kind_are_told_apart_those_of_earlier_versions_too(tmp_path: Path) -> None:
    earlier: dict[str, dict[str, Any]] = {
        "scoring": {"plan": {"rows": 4}, "block_rows": 2},
        "extraction": {"plan": "abc", "version": 3, "blocks": 2},
        "training": {"version": 1, "features": "out", "labels": []},
    }
    for kind, values in earlier.items():
        (tmp_path / "plan.json").write_text(json.dumps(values))
        for _ in range(2):
            assert {other: read_plan(tmp_path, other) for other in earlier} == dict.fromkeys(earlier) | {kind: values}
            write_plan(tmp_path, kind, values)
        (tmp_path / "plan.json").write_text(json.dumps({"kind": kind, "format": 2}))
        with pytest.raises(SerError, match="newer version"):
            read_plan(tmp_path, kind)


def test_notes_name_the_recording_at_hand_of_attempts_that_died(tmp_path: Path) -> None:
    dead = CrashLog(tmp_path, 7, "run")
    dead.begin(3)
    dead.begin(300)
    good = CrashLog(tmp_path, 7, "run")
    good.begin(1)
    good.close()
    again, later, other = (CrashLog(tmp_path, block, run) for block, run in ((7, "run"), (7, "later"), (8, "run")))
    assert (again.suspects, again.attempts) == (frozenset({300}), 1), "an attempt that ended well is no suspect"
    assert (later.suspects, later.attempts) == (frozenset({300}), 0), "attempts of an earlier start do not count"
    assert (other.suspects, other.attempts) == (frozenset(), 0)


def test_attempts_that_die_again_and_again_suspect_all_and_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.journal.RETRIES", 5)
    suspected = []
    for _ in range(6):
        notes = CrashLog(tmp_path, 7, "run")
        notes.check()
        suspected.append((notes.isolated(3), notes.isolated(4)))
        notes.begin(3)
    assert suspected == [(False, False), *[(True, False)] * 3, *[(True, True)] * 2]
    with pytest.raises(SerError, match="6 times"):
        CrashLog(tmp_path, 7, "run").check()
    CrashLog(tmp_path, 7, "another start").check()


def test_notes_where_nothing_can_be_written(tmp_path: Path) -> None:
    notes = CrashLog(tmp_path / "gone", 0, "run")
    notes.begin(1)
    notes.close()
    assert (notes.suspects, notes.attempts) == (frozenset(), 0)
