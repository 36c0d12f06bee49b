"""The output folder of a scoring run: its plan, finished parts, outputs and record; finished blocks are not rescored.

The manifest is cut into numbered blocks of rows. ``OUT/.score/plan.json`` states the input, model and options, which
together decide the result. ``OUT/.score/part-NNNNNN.parquet`` holds a finished block. Only the driver writes parts,
under a lock. After a crash, only the blocks without a part are scored again. ``OUT/run.json``, the record of the run,
is written last and marks it as finished; then the work folder is removed.

Ray Data's own checkpointing is not used, for three reasons (Ray 2.60). It silently scores everything twice if the
source is not a file read. It deletes committed rows if a resumed run overwrites. It does not record the model, options
and input of the committed rows.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.audio.windows import LONG_S
from pipeline.inference.predictor import ScoreOptions
from pipeline.models.bundle import Bundle
from pipeline.reporting import REPORT
from pipeline.scoring import AUDACITY
from pipeline.storage.errors import SerError
from pipeline.storage.files import stamps_of
from pipeline.storage.journal import (
    locked,
    part_counts,
    read_json,
    read_plan,
    remove_temporaries,
    write_json,
    write_part,
    write_plan,
)

RUN = "run.json"
TABLES = ("predictions", "segments", "channels", "timeline")
OUTPUTS = (RUN, *(f"{t}.{form}" for t in TABLES for form in ("parquet", "csv", "jsonl")), AUDACITY, *REPORT)

LEDGER_VERSION = 1
_LOCK, _WORK = ".score.lock", ".score"


class LedgerError(SerError):
    """An output folder holds another run or files of an unknown one, or lacks tables, or a part is damaged."""


class Ledger:
    """The output folder of one run; use it inside ``with open_ledger(...)``."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.work = out / _WORK
        self.notes = self.work / "notes"

    def finished(self) -> dict[str, Any] | None:
        """``run.json`` of a finished run, or None."""
        return read_json(self.out / RUN)

    def check_or_init(
        self, plan: Mapping[str, Any], block_rows: int, *, overwrite: bool, tables: Sequence[str] = ()
    ) -> int:
        """Write ``plan`` into the folder, or check that the folder already belongs to it; returns its rows per block.

        Args:
            block_rows: rows per block for a new run.
            tables: names of the Parquet tables that a finished run must have.

        Raises:
            LedgerError: without ``overwrite``: another run, an unknown one, or a finished one without its tables.
        """
        finished, begun = self.finished(), read_plan(self.work, "scoring")
        known = finished or begun
        if known is None and not overwrite and (table := next(filter(Path.exists, self._outputs()), None)):
            raise LedgerError(f"{table} is of an unknown run; choose another --out, or --overwrite to replace it")
        if overwrite or known is None:
            for path in [*self._outputs(), *self._half_written()]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            shutil.rmtree(self.work, ignore_errors=True)
            self.notes.mkdir(parents=True)
            write_plan(self.work, "scoring", {"plan": dict(plan), "block_rows": block_rows})
            return block_rows
        differing = [key for key in plan if plan[key] != known.get("plan", {}).get(key)]
        if differing:
            raise LedgerError(
                f"{self.out} holds a run with {_difference(differing, known.get('plan', {}), plan)}; "
                "choose another --out, or --overwrite to start again"
            )
        if finished is None:
            self.notes.mkdir(parents=True, exist_ok=True)
        elif gone := [name for name in tables if not (self.out / f"{name}.parquet").is_file()]:
            raise LedgerError(
                f"the run in {self.out} is finished, but its {gone[0]}.parquet is missing; "
                "put it back, or --overwrite to score again"
            )
        remove_temporaries(self.work)
        for path in self._half_written():
            path.unlink(missing_ok=True)
        return int(known.get("block_rows", block_rows))

    def part_path(self, block: int) -> Path:
        """Path of the part of a block."""
        return self.work / f"part-{block:06d}.parquet"

    def commit(self, block: int, table: pa.Table) -> None:
        """Write a block's part to the disk, completely or not at all. Raises SerError, as ``write_part``."""
        write_part(self.part_path(block), table, on_disk=True)

    def committed(self, sizes: Mapping[int, int]) -> dict[int, int]:
        """Block -> failed rows, for every valid part; one that is damaged or has not ``sizes`` rows is removed."""
        found: dict[int, int] = {}
        for block, wanted in sizes.items():
            rows, failed = part_counts(self.part_path(block)) or (-1, 0)
            if rows == wanted:
                found[block] = failed
            else:
                self.part_path(block).unlink(missing_ok=True)
        return found

    def finish(self, run: Mapping[str, Any]) -> None:
        """Write ``run.json`` to the disk, then remove the work folder."""
        write_json(self.out / RUN, run, on_disk=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def _outputs(self) -> list[Path]:
        """Paths of all possible outputs; those of an earlier run are removed, so that two runs are never mixed."""
        return [self.out / name for name in OUTPUTS]

    def _half_written(self) -> list[Path]:
        """Temporary files (``.NAME.<random>.tmp``) of runs that were killed while writing their outputs."""
        return [path for path in self.out.glob(".*.tmp") if path.name[1:].rsplit(".", 2)[0] in OUTPUTS]


@contextmanager
def open_ledger(out: Path) -> Iterator[Ledger]:
    """The ledger in ``out`` (created if missing), locked until the end of the ``with`` block or of the process.

    Raises:
        SerError: another run is writing into ``out``, or it cannot be written.
    """
    with locked(out / _LOCK, f"writing into {out}"):
        yield Ledger(out)


def _difference(keys: list[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The differences between two plans, as one line of text."""
    parts = []
    for key in keys:
        before, after = str(old.get(key)), str(new[key])
        short = max(len(before), len(after)) <= 24
        parts.append(f"{key} {before} instead of {after}" if short else f"another {key}")
    return ", ".join(parts)


@dataclass
class Tally:
    """Sums over the parts of a run."""

    statuses: Counter[str] = field(default_factory=Counter)
    duration_s: float = 0.0
    scored_s: float = 0.0
    long: int = 0  # recordings of more than `LONG_S`
    noted: int = 0  # recordings with a notice

    def add(self, part: pa.Table) -> None:
        """Count the rows of a part."""
        self.statuses.update(part["status"].to_pylist())
        self.duration_s += pc.sum(part["duration_s"]).as_py() or 0.0
        self.scored_s += pc.sum(part["scored_s"]).as_py() or 0.0
        if "notice" in part.column_names:
            self.noted += len(part) - part["notice"].null_count
        self.long += pc.sum(pc.greater(part["duration_s"], LONG_S)).as_py() or 0


def plan_of(table: pd.DataFrame, bundle: Bundle, options: ScoreOptions) -> dict[str, Any]:
    """Everything that decides the result; all of it must be equal when a run is resumed."""
    return {
        "version": LEDGER_VERSION,
        "model": bundle.weights_sha256,
        "labels": list(bundle.labels),
        "temperature": bundle.temperature,
        "features": bundle.features.fingerprint(),
        **asdict(options),
        "crops": options.crops or bundle.crops,
        "rows": len(table),
        "input": _digest(table),
        "recordings": hashlib.sha256(stamps_of(table["speech"].tolist()).tobytes()).hexdigest(),
    }


def record_of(
    plan: Mapping[str, Any],
    block_rows: int,
    bundle: Bundle,
    options: ScoreOptions,
    tally: Tally,
    scored: int,
    seconds: float,
) -> dict[str, Any]:
    """The content of ``run.json``; ``tally`` is of all rows, ``scored`` were scored by this start, in ``seconds``."""
    rows, good = tally.statuses.total(), tally.statuses["ok"]
    unheard = f"{tally.scored_s:,.0f} s of {tally.duration_s:,.0f} s" if tally.long > good / 2 else None
    return {
        "version": LEDGER_VERSION,
        "model": bundle.name,
        "model_sha256": bundle.weights_sha256,
        "features_fingerprint": plan["features"],
        "labels": list(bundle.labels),
        "options": asdict(options),
        "rows": rows,
        "ok": good,
        "failed": rows - good,
        "statuses": dict(sorted(tally.statuses.items())),
        "duration_s": round(tally.duration_s, 3),
        "scored_s": round(tally.scored_s, 3),
        "noted": tally.noted,
        "unheard": unheard if options.window_s is None else None,
        "silence_s": None if options.window_s is None else round(tally.duration_s - tally.scored_s, 3),
        "scored_now": scored,
        "seconds": round(seconds, 3),
        "files_per_s": round(scored / seconds, 2) if seconds else 0.0,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "plan": dict(plan),
        "block_rows": block_rows,
    }


def _digest(table: pd.DataFrame) -> str:
    """Hash of the manifest's cells and column names."""
    digest = hashlib.sha256(repr(list(table.columns)).encode())
    for begin in range(0, len(table), 4096):
        digest.update(table.iloc[begin : begin + 4096].to_csv(index=False, header=False).encode())
    return digest.hexdigest()
