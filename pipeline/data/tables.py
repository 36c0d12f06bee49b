"""CSV files that are safe to open in a spreadsheet, and whose text is read back as it was.

A text cell that begins with ``= + - @`` or a control character can run as a formula (OWASP, "CSV
Injection"); such cells get a leading ``'``, which ``read_csv`` takes off again. Numbers, also as text, are
left alone.

Tables written piece by piece as Parquet, CSV or JSON Lines, all of them whole or none at all.

CSV cells are guarded (``pipeline.data.tables``); in JSON Lines a missing value is ``null``.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pipeline.storage.errors import SerError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MISSING = ("nan", "na", "n/a", "null", "<na>")  # as tables are exported
_RISKY = re.compile(r"^'*[=+\-@\x00-\x1f\x7f]")
_GUARDED = re.compile(r"^''*[=+\-@\x00-\x1f\x7f]")


class ManifestError(SerError):
    """A folder, CSV or table that is no manifest."""


def guard(text: str) -> str:
    """The text as a spreadsheet may see it.

    >>> guard("=1+1"), guard("-3.5"), guard("angry")
    ("'=1+1", '-3.5', 'angry')
    """
    return "'" + text if _RISKY.match(text) and not _is_number(text) else text


def unguard(text: str) -> str:
    """What ``guard`` was given.

    >>> unguard("'=1+1"), unguard("'quoted'")
    ('=1+1', "'quoted'")
    """
    return text[1:] if _GUARDED.match(text) else text


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write ``table`` with guarded text columns, UTF-8, one line a row, without the index."""
    with path.open("w", encoding="utf-8", newline="") as file:
        append_csv(table, file, header=True)


def append_csv(table: pd.DataFrame, file: TextIO, *, header: bool) -> None:
    """As ``write_csv``, to the end of a file that was opened with ``newline=""``."""
    import pandas as pd

    safe = guarded(table)
    texts = [safe[name] for name in safe.columns if not pd.api.types.is_numeric_dtype(safe[name])]
    bare = any(
        "\r" in cell for column in texts for cell in column if isinstance(cell, str)
    )  # csv quotes it not by itself
    quoting: Literal[0, 2] = csv.QUOTE_NONNUMERIC if bare else csv.QUOTE_MINIMAL
    safe.to_csv(file, index=False, header=header, lineterminator="\n", quoting=quoting)


def guarded(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` with every text cell and column name as ``guard`` gives it."""
    import pandas as pd

    safe = table.rename(columns=lambda name: guard(str(name)))
    for name in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[name]):
            safe[name] = safe[name].map(lambda cell: guard(cell) if isinstance(cell, str) else cell)
    return safe


def read_csv(path: Path) -> pd.DataFrame:
    """Read what ``write_csv`` wrote: every cell as text (``01`` stays ``01``), empty cells as missing values."""
    import pandas as pd

    table = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8")
    table = table.rename(columns=unguard)
    for name in table.columns:
        table[name] = table[name].map(unguard, na_action="ignore")
    return table


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip()


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
            import pyarrow.parquet as pq

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
