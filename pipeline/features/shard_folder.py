"""The folder of an extraction: held by one process at a time, of one plan, its recordings as they were when it began.

``plan.json`` says what is extracted and how; ``stamps.npy`` holds the stamps of the recordings, int64 ``(n, 2)``,
taken before they are read. Features may outlive their recordings: one that is gone is no change, one that is there with
another stamp is. Folders without ``stamps.npy``, of earlier versions, are taken as they are. The lock (``flock``) dies
with its process; what Ray still runs of a killed one finds that ``.notes/run`` names another and writes nothing.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.data.splits import HASH_COLUMN
from pipeline.features.store import MANIFEST, ShardError
from pipeline.storage.journal import PLAN, atomic_path, locked, part_counts, read_plan, write_plan
from pipeline.storage.remote import stamps_of

STAMPS, NOTES, KIND = "stamps.npy", ".notes", "extraction"
_LOCK, _RUN = ".extract.lock", "run"
_EMPTY = (_LOCK, STAMPS, f".{STAMPS}.*tmp")  # what a start may leave that came no further
_OURS = (PLAN, STAMPS, NOTES, MANIFEST, f".{STAMPS}.*tmp", "part-*.parquet", ".part-*.tmp", "arrays-*", ".arrays-*")


def part_name(block: int) -> str:
    """File name of a block's part."""
    return f"part-{block:05d}.parquet"


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold the folder, made where missing, until the end of the ``with`` block or of the process.

    Raises:
        ShardError: ``out`` is a file, or a folder that is none of ours.
        SerError: another process extracts into it, or it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ShardError(f"{out} is a file; give --out a folder")
    if (
        out.is_dir()
        and read_plan(out, KIND) is None
        and any(not any(path.match(name) for name in _EMPTY) for path in out.iterdir())
    ):
        raise ShardError(f"{out} is not empty and holds no feature shards; give --out a new folder")
    with locked(out / _LOCK, f"extracting into {out}"):
        yield


def check_or_init(
    out: Path, plan: Mapping[str, Any], recordings: Sequence[str], block_rows: int, *, overwrite: bool
) -> None:
    """Make the folder that of ``plan``, or find that it already is.

    Args:
        recordings: the paths of all rows, of which every ``block_rows`` are one part.
        overwrite: begin again where the folder holds something else.

    Raises:
        ShardError: other recordings or settings, or recordings that have changed since (and not ``overwrite``).
    """
    stamps, known = stamps_of(recordings), read_plan(out, KIND)
    if known == plan:
        before = _stamps_before(out)
        if before is None or len(before) != len(recordings):
            return
        extracted = np.array([(out / part_name(i)).is_file() for i in range(int(plan["blocks"]))], dtype=bool)
        extracted = extracted.repeat(block_rows)[: len(recordings)]
        changed = np.flatnonzero(extracted & (stamps[:, 0] >= 0) & (stamps != before).any(axis=1))
        if not len(changed):
            _write_stamps(out, np.where(extracted[:, np.newaxis], before, stamps))
            return
        others = f" and {len(changed) - 1:,} more" if len(changed) > 1 else ""
        reason = f"{out} holds features of {recordings[changed[0]]}{others}, which changed since"
    else:
        reason = f"{out} holds shards of other recordings or settings"
    if known is not None:
        if not overwrite:
            raise ShardError(f"{reason}; give --overwrite to extract again, or another --out")
        _empty(out)
    _write_stamps(out, stamps)
    write_plan(out, KIND, plan)


def known_hashes(folders: Sequence[Path], table: pd.DataFrame) -> pd.Series:
    """Content hash of each recording as the shards hold it; empty where they hold none, or it has changed since.

    Args:
        folders: complete feature folders.
        table: originals among the rows of ``load_features(folders)``.

    A recording that is gone has not changed. One that is there and has another stamp than when it was extracted, or is
    of a folder without stamps, has.
    """
    if HASH_COLUMN not in table.columns:
        return pd.Series("", index=table.index)
    place = table["row_id"].str.rpartition(":")
    before = np.full((len(table), 2), -1, np.int64)
    for number, folder in enumerate(folders):
        stamps = _stamps_before(folder)
        rows = np.flatnonzero(place[0].replace("", "0").astype(int) == number)
        positions = place[2].iloc[rows].astype(int).to_numpy()
        if stamps is not None and len(stamps) > positions.max(initial=-1):
            before[rows] = stamps[positions]
    now = stamps_of(table["speech"].tolist())
    unchanged = (now[:, 0] < 0) | (now == before).all(axis=1)
    return table[HASH_COLUMN].fillna("").where(unchanged, "")


def begin_notes(out: Path, run: str) -> None:
    """Make the folder of notes, and say there which start of the job writes from now on."""
    (out / NOTES).mkdir(exist_ok=True)
    (out / NOTES / _RUN).write_text(run, encoding="ascii")


def check_run(out: Path, run: str) -> None:
    """Raise ShardError unless ``run`` is the start of the job that writes into ``out``."""
    try:
        current = (out / NOTES / _RUN).read_text(encoding="ascii")
    except OSError:
        current = ""
    if current != run:
        raise ShardError(f"another extraction has taken over {out}; this one writes nothing more into it")


def whole_parts(out: Path, blocks: int) -> dict[int, tuple[int, int]]:
    """Block -> (rows, failed rows), of every part that can be read; one that is damaged is as good as missing."""
    found: dict[int, tuple[int, int]] = {}
    for block in range(blocks):
        path = out / part_name(block)
        if (counts := part_counts(path)) is not None:
            found[block] = counts
    return found


def _empty(out: Path) -> None:
    """Remove what an extraction leaves: first what makes it complete, last what makes the folder ours."""
    for path in sorted(out.iterdir(), key=lambda path: (path.name == PLAN, path.name != MANIFEST)):
        if not any(path.match(pattern) for pattern in _OURS):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write_stamps(out: Path, stamps: NDArray[np.int64]) -> None:
    packed = io.BytesIO()  # numpy does not tell why a file cannot be written
    np.save(packed, stamps)
    with atomic_path(out / STAMPS) as beside:
        beside.write_bytes(packed.getvalue())


def _stamps_before(out: Path) -> NDArray[np.int64] | None:
    """The stamps that the folder holds, ``(n, 2)``; None where it holds none."""
    try:
        stamps: NDArray[np.int64] = np.load(out / STAMPS, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return stamps if stamps.ndim == 2 and stamps.shape[1] == 2 else None
