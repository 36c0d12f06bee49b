"""The table of scores: its columns, and writing it from the finished blocks of a run, one block in memory at a time.

Columns: the manifest's, untouched (one that collides with ours becomes ``in_NAME``), then ``status`` (``ok`` or an
error code), ``error``, ``label_name`` when labels were given, ``predicted``, ``confidence``, ``p_<label>`` per class,
``duration_s``, ``scored_s``, ``entropy`` (0 certain .. 1 uniform), ``margin`` (best minus second). One row per row of
the manifest, in its order. ``predictions.parquet`` is exact; ``predictions.csv`` has its text cells guarded
(``pipeline.tables``) and is read back by ``read_predictions``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SerError
from pipeline.predictor import Prediction
from pipeline.tables import guarded, read_csv

PARQUET, CSV = "predictions.parquet", "predictions.csv"
_AFTER = ("duration_s", "scored_s", "entropy", "margin")
_WINDOWED = ("channel", "start_s", "end_s")


def our_columns(labels: Sequence[str], *, labelled: bool) -> list[str]:
    """The columns that follow the manifest's."""
    name = ["label_name"] if labelled else []
    return ["status", "error", *name, "predicted", "confidence", *(f"p_{label}" for label in labels), *_AFTER]


def to_table(predictions: Sequence[Prediction], labels: Sequence[str], min_confidence: float = 0.0) -> pa.Table:
    """Predictions as our columns, ``label_name`` excepted; missing values are null."""
    p = np.array([prediction.probabilities for prediction in predictions]).reshape(len(predictions), len(labels))

    def numbers(values: Iterable[float]) -> pa.Array:
        return pa.array(np.fromiter(values, np.float64), from_pandas=True)

    columns: dict[str, pa.Array] = {
        "status": pa.array([x.status for x in predictions], pa.string()),
        "error": pa.array([x.error for x in predictions], pa.string()),
        "predicted": pa.array([x.label(min_confidence) for x in predictions], pa.string()),
        "confidence": numbers(x.confidence for x in predictions),
    }
    columns |= {f"p_{label}": pa.array(p[:, i], from_pandas=True) for i, label in enumerate(labels)}
    columns |= {
        "duration_s": numbers(x.duration_s for x in predictions),
        "scored_s": numbers(x.scored_s for x in predictions),
        "entropy": numbers(x.entropy if x.ok else np.nan for x in predictions),
        "margin": numbers(x.margin if x.ok else np.nan for x in predictions),
    }
    return pa.table(columns)


def plain_manifest(manifest: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """The manifest with text that Parquet can hold, and colliding columns renamed to ``in_NAME``."""
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


def write_tables(manifest: pd.DataFrame, parts: Iterable[pa.Table], out: Path, labels: Sequence[str]) -> None:
    """Write ``predictions.parquet`` and ``predictions.csv``, each whole or not at all.

    Args:
        manifest: as ``plain_manifest`` gives it; a ``label`` column becomes ``label_name`` as well.
        parts: tables of ``to_table``, in order, together as long as the manifest; taken one at a time.
        out: an existing folder.
        labels: the model's, in its order.
    """
    labelled = "label" in manifest.columns
    order = [*manifest.columns, *our_columns(labels, labelled=labelled)]
    schema = pa.Schema.from_pandas(manifest, preserve_index=False)
    temporary = [out / f".{name}.{os.getpid()}.tmp" for name in (PARQUET, CSV)]
    writer: pq.ParquetWriter | None = None
    begin = 0
    try:
        with temporary[1].open("w", encoding="utf-8", newline="") as csv_file:
            for part in parts:
                rows = manifest.iloc[begin : begin + len(part)]
                table = pa.Table.from_pandas(rows, schema=schema, preserve_index=False)
                if labelled:
                    part = part.append_column("label_name", table["label"].cast(pa.string()))
                for name in part.column_names:
                    table = table.append_column(name, part[name])
                table = table.select(order).replace_schema_metadata(None)
                if writer is None:
                    writer = pq.ParquetWriter(temporary[0], table.schema, compression="zstd", compression_level=1)
                writer.write_table(table)
                guarded(table.to_pandas()).to_csv(csv_file, index=False, header=begin == 0, lineterminator="\n")
                begin += len(part)
        if writer is None or begin != len(manifest):
            raise ValueError(f"parts hold {begin} rows, the manifest {len(manifest)}")
        writer.close()
        for path, name in zip(temporary, (PARQUET, CSV), strict=True):
            path.replace(out / name)
    except OSError as error:
        raise SerError(
            f"cannot write the tables in {out}: {error.strerror or error}; free space, then give the same command again"
        ) from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def read_predictions(path: Path) -> pd.DataFrame:
    """A table of scores: the folder of a run, its ``.parquet``, or its ``.csv`` with the guards taken off.

    Raises:
        SerError: nothing of that kind is there.
    """
    if path.is_dir():
        path = path / PARQUET
    if not path.is_file():
        raise SerError(f"no scores at {path}; give the --out folder of jobs.score, or a table in it")
    return read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)


def _text(cell: object) -> str:
    return str(cell).encode("utf-8", "backslashreplace").decode("utf-8")
