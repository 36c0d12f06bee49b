"""The tables and exports of a scoring run, written from its finished blocks with little memory.

``predictions``: the manifest's columns, unchanged (a colliding name becomes ``in_NAME``), then ``status`` (``ok`` or an
error code), ``error``, ``label_name`` if labels were given, ``predicted``, ``confidence``, ``p_<label>`` per class,
``duration_s``, ``scored_s``, ``level_dbfs``, ``entropy`` (0 certain .. 1 uniform), ``margin`` (best minus second),
``familiarity`` (similarity to the training recordings, 0 to 1), ``speech_share`` (of the scored frames), ``notice``
(a remark on how the recording was read). One row per row of the manifest, in its order. Silence, recordings without
speech, and unusable ones have no confidence and no probabilities. If the manifest selects segments,
``segment_start_s`` and ``segment_end_s`` are the last columns.

``segments``, if recordings were scored in windows: ``row`` (of ``predictions``, from 0), ``speech``, ``channel``,
``start_s``, ``end_s``, ``predicted`` (also ``silence``), ``confidence``, ``p_<label>``, ``level_dbfs``, ``entropy``,
``margin``, ``familiarity``. ``channels``, if each channel was scored separately: one row per channel of a recording.

Each table is written as ``.parquet``, which is exact, and as ``.csv``. There, text that a spreadsheet
could run as a formula begins with ``'`` (``pipeline.data.tables.guard``). ``read_predictions`` reads both.

Exports are made from these tables, nothing is scored again: ``timeline`` (``segments`` with consecutive windows of the
same prediction merged), JSON Lines, and Audacity label tracks. Source: Audacity manual, "Importing and Exporting
Labels" (start, end, text, separated by tabs, in seconds).
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.segments import END, START
from pipeline.data.tables import read_csv, table_files
from pipeline.inference.predictor import Prediction, entropy, margin
from pipeline.inference.timeline import SILENCE_DBFS, Floats, Timeline, joined, nested, no_windows, unnested
from pipeline.scoring import AUDACITY
from pipeline.scoring.ledger import TABLES
from pipeline.storage.errors import SerError
from pipeline.storage.files import local_path

PARQUET = "predictions.parquet"
_AFTER = ("duration_s", "scored_s", "level_dbfs", "entropy", "margin", "familiarity", "speech_share")
_NOTICE = "notice"
_WINDOWED = ("channel", "start_s", "end_s")
_ROWS_AT_ONCE, _WINDOWS_AT_ONCE = 4096, 100_000


def our_columns(labels: Sequence[str], *, labelled: bool) -> list[str]:
    """The columns of ``predictions`` after those of the manifest."""
    name = ["label_name"] if labelled else []
    return ["status", "error", *name, "predicted", "confidence", *(f"p_{label}" for label in labels), *_AFTER, _NOTICE]


def to_table(
    predictions: Sequence[Prediction],
    labels: Sequence[str],
    min_confidence: float = 0.0,
    silence_dbfs: float = SILENCE_DBFS,
    timelines: Sequence[Timeline] | None = None,
) -> pa.Table:
    """A table with ``our_columns`` except ``label_name``, and the nested ``windows`` of ``timelines``."""
    predictions = [prediction.told(silence_dbfs) for prediction in predictions]
    p = np.array([prediction.probabilities for prediction in predictions]).reshape(len(predictions), len(labels))
    columns: dict[str, pa.Array] = {
        "status": pa.array([x.status for x in predictions], pa.string()),
        "error": pa.array([x.error for x in predictions], pa.string()),
        "predicted": pa.array([x.label(min_confidence, silence_dbfs) for x in predictions], pa.string()),
        "confidence": _numbers(x.confidence for x in predictions),
        **_probabilities(p, labels),
        "duration_s": _numbers(x.duration_s for x in predictions),
        "scored_s": _numbers(x.scored_s for x in predictions),
        "level_dbfs": _numbers(x.level_dbfs for x in predictions),
        **_doubt(p),
        "familiarity": _numbers(x.familiarity for x in predictions),
        "speech_share": _numbers(x.speech_share for x in predictions),
        _NOTICE: pa.array([x.notice or None for x in predictions], pa.string()),
    }
    if timelines is not None:
        columns["windows"] = nested(timelines)
    return pa.table(columns)


def plain_manifest(manifest: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """The manifest with columns that Parquet can hold, and colliding names changed to ``in_NAME``."""
    taken = {*our_columns(labels, labelled=True), *_WINDOWED}
    renamed: list[str] = []
    for column in map(str, manifest.columns):
        while column in taken or column in renamed:
            column = f"in_{column}"
        renamed.append(column)
    table = manifest.reset_index(drop=True).set_axis(renamed, axis=1)
    for column in table.columns:
        try:
            pa.array(table[column], from_pandas=True)
        except (pa.ArrowException, UnicodeError):  # mixed types, or text that is not Unicode
            table[column] = table[column].map(_text, na_action="ignore")
    return table


def write_tables(
    manifest: pd.DataFrame,
    parts: Iterable[pa.Table],
    out: Path,
    labels: Sequence[str],
    *,
    min_confidence: float = 0.0,
    silence_dbfs: float = SILENCE_DBFS,
    each_channel: bool = False,
) -> None:
    """Write ``predictions``, also ``segments`` if the parts hold windows, and then ``channels`` if ``each_channel``.

    Args:
        manifest: from ``plain_manifest``; a ``label`` column is kept and also written as ``label_name``.
        parts: tables of ``to_table``, in order, together one row for each row of the manifest; read one at a time.
        out: an existing folder. Each file appears in it complete or not at all, and replaces an older one.

    Raises:
        SerError: the disk is full or cannot be written.
    """
    labelled = "label" in manifest.columns
    schema = pa.Schema.from_pandas(manifest, preserve_index=False)
    begin = 0
    with table_files(out) as files:
        for part in _gathered(parts):
            rows = manifest.iloc[begin : begin + len(part)]
            table = pa.Table.from_pandas(rows, schema=schema, preserve_index=False)
            if labelled:
                part = part.append_column("label_name", table["label"].cast(pa.string()))
            for name in our_columns(labels, labelled=labelled):
                kind = pa.float64() if name in _AFTER else pa.string()
                known = name in part.column_names  # parts written by older versions lack some columns
                column = part[name] if known else pa.nulls(len(part), kind)
                table = table.append_column(name, column)
            last = [name for name in (START, END) if name in table.column_names]
            files.write("predictions", table.select([n for n in table.column_names if n not in last] + last))
            if "windows" in part.column_names:
                found = unnested(part["windows"])
                tables = {"segments": found}
                if each_channel:
                    tables["channels"] = [t.per_channel(silence_dbfs) for t in found]
                for name, timelines in tables.items():
                    named = [t.names(labels, min_confidence, silence_dbfs) for t in timelines]
                    files.write(name, segments_table(timelines, named, rows["speech"], labels, silence_dbfs))
            begin += len(part)
        if begin != len(manifest):
            raise ValueError(f"parts hold {begin} rows, the manifest {len(manifest)}")


def segments_table(
    timelines: Sequence[Timeline],
    names: Sequence[Sequence[str]],
    speech: pd.Series[str],
    labels: Sequence[str],
    silence_dbfs: float = SILENCE_DBFS,
) -> pa.Table:
    """The table ``segments`` of some recordings; ``names`` are the predictions of their windows.

    ``speech``: path of each recording; its index is the row in ``predictions``.
    """
    lengths = [len(timeline) for timeline in timelines]
    row = np.repeat(np.arange(len(timelines)), lengths)
    whole = joined(timelines)
    p = whole.told(silence_dbfs)
    return pa.table(
        {
            "row": pa.array(speech.index.to_numpy()[row], pa.int64()),
            "speech": pa.array(speech, pa.string()).take(pa.array(row)),
            "channel": pa.array(whole.channel, pa.string()),
            "start_s": whole.start_s,
            "end_s": whole.end_s,
            "predicted": pa.array([name for part in names for name in part], pa.string()),
            "confidence": pa.array(p.max(axis=1, initial=0.0), from_pandas=True),
            **_probabilities(p, labels),
            "level_dbfs": whole.level_dbfs,
            **_doubt(p),
            "familiarity": pa.array(whole.familiarity, from_pandas=True),
        }
    )


def read_segments(out: Path, labels: Sequence[str]) -> Iterator[tuple[int, str, Timeline, list[str]]]:
    """(row, speech, windows, their predictions) of each recording in ``segments.parquet``, in order.

    Raises:
        SerError: the folder has no such table.
    """
    path = out / "segments.parquet"
    if not path.is_file():
        raise SerError(f"{out} has no segments: its recordings were not scored in windows; give --window_s")
    with pq.ParquetFile(path) as file:  # all windows of a recording are in one row group
        for group in range(file.num_row_groups):
            table = file.read_row_group(group).to_pandas()
            log_p = np.log(np.maximum(table[[f"p_{label}" for label in labels]].to_numpy(), 1e-300))
            times = {name: table[name].to_numpy() for name in ("start_s", "end_s", "level_dbfs")}
            whole = Timeline(channel=table["channel"].to_numpy(dtype=object), log_p=log_p, **times)
            for row, positions in table.groupby("row", sort=False).indices.items():
                named = list(table["predicted"].iloc[positions])
                yield int(row), str(table["speech"].iloc[positions[0]]), whole.where(positions), named


def read_predictions(path: Path) -> pd.DataFrame:
    """Read a predictions table: from the folder of a run, its ``.parquet``, or its ``.csv``.

    From a CSV, the numeric columns of scoring become numbers again; the manifest's columns remain text. Each ``'`` that
    ``tables.guard`` added is removed.

    Raises:
        SerError: no such table, or a numeric column of scoring holds text that is not a number.
    """
    if path.is_dir():
        path = path / PARQUET
    if not path.is_file():
        raise SerError(f"no scores at {path}; give the --out folder of jobs.score, or a table in it")
    return _with_numbers(read_csv(path), path) if path.suffix == ".csv" else pd.read_parquet(path)


def _with_numbers(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table with the columns of scoring as numbers, among them the ``p_`` columns after ``confidence``."""
    names = list(table.columns)
    times = [START, END, *(["row", "start_s", "end_s"] if "start_s" in names else [])]
    ours = {"confidence", *_AFTER, *times} & set(names)
    begin = names.index("confidence") if "confidence" in names else 0
    for name in [*ours, *(name for name in names[begin:] if name.startswith("p_"))]:
        try:
            table[name] = table[name].astype("int64" if name == "row" else "float64")
        except ValueError as error:
            raise SerError(f"{path}, column {name}: {error}; expected numbers, as jobs.score writes them") from error
    return table


def _text(cell: object) -> str:
    return str(cell).encode("utf-8", "backslashreplace").decode("utf-8")


def _numbers(values: Iterable[float]) -> pa.Array:
    return pa.array(np.fromiter(values, np.float64), from_pandas=True)


def _probabilities(p: Floats, labels: Sequence[str]) -> dict[str, pa.Array]:
    return {f"p_{label}": pa.array(p[:, i], from_pandas=True) for i, label in enumerate(labels)}


def _doubt(p: Floats) -> dict[str, pa.Array]:
    return {"entropy": pa.array(entropy(p), from_pandas=True), "margin": pa.array(margin(p), from_pandas=True)}


def _gathered(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Parts joined to tables of about 4,000 rows or 100,000 windows; columns missing in a part become null."""
    held: list[pa.Table] = []
    rows = windows = 0
    for part in parts:
        held.append(part)
        rows += len(part)
        if "windows" in part.column_names:
            windows += pc.sum(pc.list_value_length(part["windows"])).as_py()
        if rows >= _ROWS_AT_ONCE or windows >= _WINDOWS_AT_ONCE:
            yield pa.concat_tables(held, promote_options="default")
            held, rows, windows = [], 0, 0
    if held:
        yield pa.concat_tables(held, promote_options="default")


_AT_ONCE = 1000


def write_exports(out: Path, labels: Sequence[str], formats: Sequence[str] = (), *, merge: bool = False) -> list[Path]:
    """Write the exports of the run in ``out``; returns the files and folders written.

    Args:
        formats: ``jsonl``: every table as JSON Lines; ``audacity``: a label track for each recording.
        merge: write ``timeline``; the label tracks then contain merged segments instead of single windows.

    Raises:
        SerError: an export needs segments and the run has none, or the disk is full.
    """
    written: list[Path] = []
    if merge:
        written += _write_timeline(out, labels)
    if "jsonl" in formats:
        written += _rewrite(out, _tables(out), "jsonl")
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
            )  # -inf: silent windows have lost their probabilities already
            files.write("timeline", table)
            if len(held) < _AT_ONCE:
                break
    return [out / "timeline.parquet", out / "timeline.csv"]


def restore_csv(out: Path) -> None:
    """Write missing CSV tables of the run in ``out`` again, from its Parquet tables. Raises SerError (a full disk)."""
    _rewrite(out, [name for name in _tables(out) if not (out / f"{name}.csv").is_file()], "csv")


def _tables(out: Path) -> list[str]:
    return [name for name in TABLES if (out / f"{name}.parquet").is_file()]


def _rewrite(out: Path, names: Sequence[str], form: str) -> list[Path]:
    """Write the named Parquet tables in another format; returns their paths."""
    with table_files(out, (form,)) as files:
        for name in names:
            with pq.ParquetFile(out / f"{name}.parquet") as file:
                for batch in file.iter_batches(_AT_ONCE):
                    files.write(name, batch)
    return [out / f"{name}.{form}" for name in names]


def _write_audacity(out: Path, labels: Sequence[str], *, merge: bool) -> Path:
    """Write ``audacity/ROW-NAME.txt`` for every recording with segments; returns the folder."""
    folder = out / AUDACITY
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for row, speech, timeline, names in _segments(out, labels, merge=merge):
            windows = zip(timeline.channel, timeline.start_s, timeline.end_s, names, strict=True)
            lines = [
                f"{start:.3f}\t{end:.3f}\t{'' if channel == 'mix' else f'{channel} '}{name}"
                for channel, start, end, name in windows
            ]
            stem = re.sub(r"[^\w.-]+", "_", Path(local_path(speech)).stem, flags=re.ASCII)[:80]
            (folder / f"{row:06d}-{stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise SerError(f"cannot write {folder}: {error.strerror or error}; free some space") from error
    return folder
