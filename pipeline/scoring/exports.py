"""What a finished run can also be had as: one segment per stretch of one emotion, JSON Lines, Audacity label tracks.

Everything is made from the tables of the run, a piece at a time; nothing is scored again. ``timeline`` is ``segments``
with neighbours that agree merged. Source: Audacity manual, "Importing and Exporting Labels" (start, end, text,
separated by tabs, in seconds).
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from pipeline.data.table_files import table_files
from pipeline.inference.timeline import Timeline, no_windows
from pipeline.scoring.predictions import read_segments, segments_table
from pipeline.storage.errors import SerError
from pipeline.storage.files import local_path
from pipeline.storage.outputs import AUDACITY, TABLES

_AT_ONCE = 1000


def write_exports(out: Path, labels: Sequence[str], formats: Sequence[str] = (), *, merge: bool = False) -> list[Path]:
    """Write the exports of the run in ``out``; returns the files and folders.

    Args:
        labels: the model's, in its order.
        formats: ``jsonl``: every table as JSON Lines; ``audacity``: a label track for each recording.
        merge: write ``timeline``; the label tracks then hold it in place of single windows.

    Raises:
        SerError: segments are asked for and the run has none, or the disk is full.
    """
    written: list[Path] = []
    if merge:
        written += _write_timeline(out, labels)
    if "jsonl" in formats:
        written += _write_jsonl(out)
    if "audacity" in formats:
        written.append(_write_audacity(out, labels, merge=merge))
    return written


def _segments(out: Path, labels: Sequence[str], *, merge: bool) -> Iterator[tuple[int, str, Timeline, list[str]]]:
    for row, speech, timeline, names in read_segments(out, labels):
        yield (row, speech, *timeline.merged(names)) if merge else (row, speech, timeline, names)


def _write_timeline(out: Path, labels: Sequence[str]) -> list[Path]:
    segments = _segments(out, labels, merge=True)
    with table_files(out) as files:
        while True:
            held = list(islice(segments, _AT_ONCE))
            rows, speech, timelines, names = zip(*(held or [(0, "", no_windows(len(labels)), [])]), strict=True)
            table = segments_table(
                timelines, names, pd.Series(speech, rows), labels, -math.inf
            )  # silence has none left
            files.write("timeline", table)
            if len(held) < _AT_ONCE:
                break
    return [out / "timeline.parquet", out / "timeline.csv"]


def restore_csv(out: Path) -> None:
    """Write the CSV tables of the run in ``out`` again that are gone, from the Parquet tables.

    Raises:
        SerError: the disk is full.
    """
    _rewrite(out, [name for name in _tables(out) if not (out / f"{name}.csv").is_file()], "csv")


def _write_jsonl(out: Path) -> list[Path]:
    return _rewrite(out, _tables(out), "jsonl")


def _tables(out: Path) -> list[str]:
    return [name for name in TABLES if (out / f"{name}.parquet").is_file()]


def _rewrite(out: Path, names: Sequence[str], form: str) -> list[Path]:
    """Parquet tables in another format."""
    with table_files(out, (form,)) as files:
        for name in names:
            with pq.ParquetFile(out / f"{name}.parquet") as file:
                for batch in file.iter_batches(_AT_ONCE):
                    files.write(name, batch)
    return [out / f"{name}.{form}" for name in names]


def _write_audacity(out: Path, labels: Sequence[str], *, merge: bool) -> Path:
    """``audacity/ROW-NAME.txt`` for every recording that was heard."""
    folder = out / AUDACITY
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for row, speech, timeline, names in _segments(out, labels, merge=merge):
            lines = [
                f"{start:.3f}\t{end:.3f}\t{name}" if channel == "mix" else f"{start:.3f}\t{end:.3f}\t{channel} {name}"
                for channel, start, end, name in zip(
                    timeline.channel, timeline.start_s, timeline.end_s, names, strict=True
                )
            ]
            stem = re.sub(r"[^\w.-]+", "_", Path(local_path(speech)).stem, flags=re.ASCII)[:80]
            (folder / f"{row:06d}-{stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise SerError(f"cannot write {folder}: {error.strerror or error}; free some space") from error
    return folder
