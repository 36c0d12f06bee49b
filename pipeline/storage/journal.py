"""The book of a scoring run on disk, so that whatever dies, every recording is scored exactly once.

The manifest is cut into numbered blocks of rows. ``OUT/.score/plan.json`` says what is being scored with what;
``OUT/.score/part-NNNNNN.parquet`` holds a finished block, written under a temporary name, synced and renamed, so
that a part is there whole or not at all. Only the driver writes parts, under a lock (``flock``) that dies with it: what
is missing after a crash is the blocks without a part, and nothing else is scored again. ``OUT/run.json``, written
last, makes the run finished, and the work folder is removed.

Why not Ray Data's own checkpointing: in Ray 2.60 it silently scores everything twice when the source is no file
read, deletes what was committed when a resumed run overwrites, and keeps no record of the model, options or input
that the committed rows came from.

``CrashLog`` is the workers' part: which recording of a block is being decoded, so that a retry after a crash knows whom
to suspect. Sources: the write-ahead habit of databases; POSIX rename and flock. Limits: ``OUT`` lies on a file system
with both (NFSv4 has them).

The names of what a scoring run leaves in its folder: tables, report, exports, and the record that closes it.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.models.bundle import write_json
from pipeline.storage.errors import SerError
from pipeline.storage.locks import try_lock

RUN = "run.json"
AUDACITY = "audacity"  # a folder of label tracks
TABLES = ("predictions", "segments", "channels", "timeline")
REPORT_TABLES = (
    "verdict per_class confusion_counts confusion_normalised breakdowns reliability risk_coverage mistakes failures"
)
REPORT_FIGURES = "confusion_matrix per_class reliability risk_coverage"
REPORT = (
    *(f"{name}.csv" for name in REPORT_TABLES.split()),
    *(f"{name}.{form}" for name in REPORT_FIGURES.split() for form in ("png", "svg")),
    "metrics.json",
    "report.html",
)
OUTPUTS = (RUN, *(f"{t}.{form}" for t in TABLES for form in ("parquet", "csv", "jsonl")), AUDACITY, *REPORT)


LEDGER_VERSION = 1
_LOCK, _WORK, _PLAN = ".score.lock", ".score", "plan.json"
_POSITION_BYTES = 8
RETRIES = 20  # attempts at a block before the job gives up
_SUSPECT_ALL = 4  # attempts at a block that died before each of its recordings is decoded apart


class LedgerError(SerError):
    """An output folder that is in use, holds another run, or cannot be written."""


class Ledger:
    """The output folder of one run; use it inside ``with open_ledger(...)``."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.work = out / _WORK
        self.notes = self.work / "notes"

    def finished(self) -> dict[str, Any] | None:
        """``run.json`` of a finished run, or None."""
        return _read(self.out / RUN)

    def check_or_init(
        self, plan: Mapping[str, Any], block_rows: int, *, overwrite: bool, tables: Sequence[str] = ()
    ) -> int:
        """Make the folder that of ``plan``, or find that it already is; returns the rows a block of this run has.

        Args:
            tables: what a finished run must have, as Parquet.

        Raises:
            LedgerError: the folder holds another run, or a finished one without its tables, and ``overwrite`` is not
                given.
        """
        finished, begun = self.finished(), _read(self.work / _PLAN)
        known = finished or begun
        if known is None and not overwrite and (table := next(filter(Path.exists, self._outputs()), None)):
            raise LedgerError(f"{table} is of no run known here; choose another --out, or --overwrite to replace it")
        if overwrite or known is None:
            for path in [*self._outputs(), *self._half_written()]:
                _remove(path)
            shutil.rmtree(self.work, ignore_errors=True)
            self.notes.mkdir(parents=True)
            write_json(self.work / _PLAN, {"plan": dict(plan), "block_rows": block_rows})
            return block_rows
        differing = [key for key in plan if plan[key] != known.get("plan", {}).get(key)]
        if differing:
            raise LedgerError(
                f"{self.out} holds a run with {_difference(differing, known.get('plan', {}), plan)}; "
                "choose another --out, or --overwrite to begin again"
            )
        if finished is None:
            self.notes.mkdir(parents=True, exist_ok=True)
        elif gone := [name for name in tables if not (self.out / f"{name}.parquet").is_file()]:
            raise LedgerError(
                f"the run in {self.out} is finished, but its {gone[0]}.parquet is gone; "
                "put it back, or --overwrite to score again"
            )
        for path in [*self.work.glob(".*.tmp"), *self._half_written()]:
            path.unlink(missing_ok=True)
        return int(known.get("block_rows", block_rows))

    def part_path(self, block: int) -> Path:
        """Where the part of a block is, or will be."""
        return self.work / f"part-{block:06d}.parquet"

    def commit(self, block: int, table: pa.Table) -> None:
        """Write a block's part, whole or not at all, and have it on the disk before returning.

        Raises:
            LedgerError: the disk is full or cannot be written; what was committed before is safe.
        """
        path = self.part_path(block)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                pq.write_table(table, file, compression="zstd", compression_level=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise LedgerError(
                f"cannot write {path}: {error.strerror or error}; free some space and give the same command again: "
                "it goes on where it stopped"
            ) from error

    def committed(self, sizes: Mapping[int, int]) -> dict[int, int]:
        """Block -> failed rows, of every whole part; a part that is damaged or of another size is removed.

        Args:
            sizes: rows that each block must have.
        """
        found: dict[int, int] = {}
        for block, rows in sizes.items():
            path = self.part_path(block)
            if not path.is_file():
                continue
            try:
                status = pq.read_table(path, columns=["status"])["status"].to_pylist()
            except (OSError, pa.ArrowException):
                status = []
            if len(status) == rows:
                found[block] = sum(code != "ok" for code in status)
            else:
                path.unlink()
        return found

    def finish(self, run: Mapping[str, Any]) -> None:
        """Write ``run.json``, have it on the disk, and remove the work folder."""
        write_json(self.out / RUN, run)
        _sync(self.out / RUN)
        _sync(self.out)
        shutil.rmtree(self.work, ignore_errors=True)

    def _outputs(self) -> list[Path]:
        """What a run leaves; of two models or inputs side by side it would mislead."""
        return [self.out / name for name in OUTPUTS]

    def _half_written(self) -> list[Path]:
        """Temporary files (``.NAME.PID.tmp``) of runs that were killed while they wrote what they leave."""
        return [path for path in self.out.glob(".*.tmp") if path.name[1:].rsplit(".", 2)[0] in OUTPUTS]


@contextmanager
def open_ledger(out: Path) -> Iterator[Ledger]:
    """The ledger in ``out`` (made when missing), locked until the end of the ``with`` block or of the process.

    Raises:
        LedgerError: another run is writing into ``out``, or it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / _LOCK).open("a")
    except OSError as error:
        raise LedgerError(f"cannot write into {out}: {error.strerror}; choose another --out") from error
    with lock:
        if not try_lock(lock):
            raise LedgerError(f"another run is writing into {out}; wait for it, or choose another --out")
        yield Ledger(out)


class CrashLog:
    """One attempt at a block: notes down which recording is being decoded, and reads what earlier attempts noted.

    Where the folder cannot be written from this machine, nothing is noted and nobody suspected.

    Attributes:
        suspects: positions in the block that an attempt which died had begun last.
        attempts: how many attempts with this ``run`` have died; those of another start may have died with the job.
    """

    def __init__(self, folder: Path, block: int, run: str = "") -> None:
        self._own = folder / f"{block:06d}.{run}.{uuid.uuid4().hex}"
        self._file: FileIO | None = None
        self.suspects: frozenset[int] = frozenset()
        self.attempts = 0
        with suppress(OSError):
            earlier = list(folder.glob(f"{block:06d}.*"))
            positions = [path.read_bytes() for path in earlier]
            self.attempts = sum(path.name.split(".")[1] == run for path in earlier)
            self.suspects = frozenset(int.from_bytes(p, "little") for p in positions if len(p) == _POSITION_BYTES)
            self._file = FileIO(self._own, "wb")

    def check(self) -> None:
        """Raise SerError when attempt after attempt has died."""
        if self.attempts > RETRIES:
            block = int(self._own.name.split(".")[0])
            raise SerError(
                f"block {block} took its process down {self.attempts} times; is memory short? See Ray's logs"
            )

    def apart(self, position: int) -> bool:
        """Whether to decode that recording in a process of its own."""
        return position in self.suspects or self.attempts >= _SUSPECT_ALL

    def begin(self, position: int) -> None:
        """The recording at ``position`` of the block is being decoded from now on."""
        if self._file is not None:
            with suppress(OSError):
                self._file.seek(0)
                self._file.write(position.to_bytes(_POSITION_BYTES, "little"))

    def close(self) -> None:
        """The attempt is over, without a crash."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._own.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk; not every file system can."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _difference(keys: list[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What two plans disagree about, for one line."""
    parts = []
    for key in keys:
        before, after = str(old.get(key)), str(new[key])
        short = max(len(before), len(after)) <= 24
        parts.append(f"{key} {before} instead of {after}" if short else f"another {key}")
    return ", ".join(parts)
