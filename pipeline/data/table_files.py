"""Tables written piece by piece as Parquet, CSV or JSON Lines, all of them whole or none at all.

CSV cells are guarded (``pipeline.data.tables``); in JSON Lines a missing value is ``null``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.tables import append_csv
from pipeline.storage.errors import SerError


class TableFiles:
    """Open tables, by name; see ``table_files``."""

    def __init__(self, out: Path, formats: Sequence[str], files: ExitStack) -> None:
        self._out, self._formats, self._files = out, formats, files
        self._sinks: dict[str, Any] = {}

    def write(self, name: str, table: pa.Table) -> None:
        """Append rows to the table called ``name``."""
        table = table.replace_schema_metadata(None)
        for form in self._formats:
            path = f"{name}.{form}"
            first = path not in self._sinks
            if first:
                self._sinks[path] = self._open(path, table.schema)
            sink = self._sinks[path]
            if form == "parquet":
                sink.write_table(table, row_group_size=max(len(table), 1))
            elif form == "csv":
                append_csv(table.to_pandas(), sink, header=first)
            else:
                sink.writelines(
                    json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in table.to_pylist()
                )

    def publish(self) -> list[Path]:
        """Give the files their names, after everything was written."""
        self._files.close()
        for path in self._sinks:
            with self._temporary(path).open("r+b") as file:  # Windows syncs only what may be written
                os.fsync(file.fileno())
            self._temporary(path).replace(self._out / path)
        return [self._out / path for path in self._sinks]

    def discard(self) -> None:
        """Remove what was not published."""
        for path in self._sinks:
            self._temporary(path).unlink(missing_ok=True)

    def _open(self, path: str, schema: pa.Schema) -> Any:
        temporary = self._temporary(path)
        if path.endswith(".parquet"):
            return self._files.enter_context(
                pq.ParquetWriter(temporary, schema, compression="zstd", compression_level=1)
            )
        return self._files.enter_context(temporary.open("w", encoding="utf-8", newline=""))

    def _temporary(self, path: str) -> Path:
        return self._out / f".{path}.{os.getpid()}.tmp"


@contextmanager
def table_files(out: Path, formats: Sequence[str] = ("parquet", "csv")) -> Iterator[TableFiles]:
    """Tables in the folder ``out``, which appear at the end of the ``with`` block, unless it raises.

    Raises:
        SerError: the disk is full or cannot be written.
    """
    with ExitStack() as stack:
        files = TableFiles(out, formats, stack)
        try:
            yield files
            files.publish()
        except OSError as error:
            raise SerError(
                f"cannot write the tables in {out}: {error.strerror or error}; "
                "free some space, then give the same command again"
            ) from error
        finally:
            files.discard()
