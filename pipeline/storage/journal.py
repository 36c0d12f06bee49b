"""The files of a long job in its output folder: after a crash, the same command continues and repeats no finished part.

A job holds a lock on its folder, which ends with its process. ``plan.json`` identifies the job: a later start with
other inputs or settings is refused. Files appear complete or not at all: each is written under a temporary name in the
same folder and then renamed. A record, written last, marks the job as finished. ``CrashLog`` records which recording of
a block a worker decodes, so a retry after a crash can isolate it.
Sources: write-ahead logs of databases; POSIX rename; the library ``filelock``. Limits: the folder must be on a file
system with atomic rename and locks (NFSv4 has them).
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.storage.errors import SerError

if TYPE_CHECKING:
    import pyarrow as pa

PLAN = "plan.json"
PLAN_FORMAT = 1
_POSITION_BYTES = 8
RETRIES = 20  # crashed attempts at a block after which the job gives up
_SUSPECT_ALL = 4  # crashed attempts at a block after which each of its recordings is decoded in isolation


@contextmanager
def locked(path: Path, doing: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path`` until the end of the block or of the process; creates it and its folders.

    Args:
        doing: the holder's activity, for the message, for example "training into runs/first".

    Raises:
        SerError: another process holds the lock for longer than ``wait_s``, or the file cannot be created.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait_s, poll_interval=0.1)
    except Timeout:
        raise SerError(f"another process is {doing}; wait for it, or choose another --out") from None
    except OSError as error:
        raise SerError(f"cannot write into {path.parent}: {error.strerror}; choose another --out") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def atomic_path(path: Path, *, on_disk: bool = False) -> Iterator[Path]:
    """A temporary path to write to; renamed to ``path`` at the end of the block, removed after an error.

    ``on_disk``: wait until the content is on the disk, so that it also survives a power cut.
    """
    beside = temporary(path)
    try:
        yield beside
        if on_disk:
            with beside.open("r+b") as file:  # Windows can sync only a file opened for writing
                os.fsync(file.fileno())
        beside.replace(path)
        if on_disk:
            _sync_names(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """A unique temporary name in the folder of ``path``, also across machines: ``.NAME.<random>.tmp``."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def remove_temporaries(folder: Path, pattern: str = "*") -> None:
    """Remove temporary files, left by killed processes, of files whose names match ``pattern``."""
    for path in folder.glob(f".{pattern}.tmp"):
        path.unlink(missing_ok=True)


def _sync_names(folder: Path) -> None:
    """Write the folder's entries to the disk, where the system supports that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, values: Mapping[str, Any], *, on_disk: bool = False) -> None:
    """Write a JSON object to ``path``, completely or not at all."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path, on_disk=on_disk) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def write_plan(folder: Path, kind: str, values: Mapping[str, Any]) -> None:
    """Write ``plan.json`` of a job; ``kind`` is "scoring", "extraction" or "training"."""
    write_json(folder / PLAN, {"kind": kind, "format": PLAN_FORMAT, **values})


def read_plan(folder: Path, kind: str) -> dict[str, Any] | None:
    """The values given to `write_plan` for a job of this kind in ``folder``; None if there is no such plan.

    Earlier versions wrote no kind: a plan with ``blocks`` is an extraction's, with ``block_rows`` scoring's, else
    training's.

    Raises:
        SerError: a plan of a newer version.
    """
    values = read_json(folder / PLAN)
    if values is None:
        return None
    earlier = "extraction" if "blocks" in values else "scoring" if "block_rows" in values else "training"
    if values.pop("kind", earlier) != kind:
        return None
    if values.pop("format", PLAN_FORMAT) != PLAN_FORMAT:
        raise SerError(f"{folder / PLAN} is of a newer version; use that version, or choose another --out")
    return values


def write_part(path: Path, table: pa.Table, *, on_disk: bool = False) -> None:
    """Write the finished part of a block as Parquet, completely or not at all.

    Raises:
        SerError: the disk is full or cannot be written; parts written before are safe.
    """
    import pyarrow.parquet as pq

    try:
        with atomic_path(path, on_disk=on_disk) as beside:
            pq.write_table(table, beside, compression="zstd", compression_level=1)
    except OSError as error:
        raise SerError(
            f"cannot write {path}: {error.strerror or error}; free some space and give the same command again: "
            "it continues where it stopped"
        ) from error


def part_counts(path: Path) -> tuple[int, int] | None:
    """(rows, failed rows) of a part; None if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        status = pq.ParquetFile(path).read(["status"])["status"].to_pylist()
    except (OSError, pa.ArrowException):
        return None
    return len(status), sum(code != "ok" for code in status)


class CrashLog:
    """One attempt at a block: records which recording is being decoded, and reads the records of crashed attempts.

    ``suspects``: positions in the block of the recordings at which earlier attempts crashed. ``attempts``: number of
    crashed attempts with this ``run``; those of another run may have ended with their job. If this machine cannot
    write into the folder, nothing is recorded and no recording is suspected.
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
        """Raise SerError after more than ``RETRIES`` crashed attempts."""
        if self.attempts > RETRIES:
            block = int(self._own.name.split(".")[0])
            raise SerError(
                f"block {block} crashed its process {self.attempts} times; check free memory, and see Ray's logs"
            )

    def isolated(self, position: int) -> bool:
        """Whether to decode the recording at this position in a process of its own."""
        return position in self.suspects or self.attempts >= _SUSPECT_ALL

    def begin(self, position: int) -> None:
        """Record that the recording at ``position`` of the block is being decoded from now on."""
        if self._file is not None:
            with suppress(OSError):
                self._file.seek(0)
                self._file.write(position.to_bytes(_POSITION_BYTES, "little"))

    def close(self) -> None:
        """End the attempt, which did not crash: remove its record."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._own.unlink(missing_ok=True)
