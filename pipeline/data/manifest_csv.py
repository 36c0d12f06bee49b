"""The cells of a CSV file as people send it: comma, semicolon or tab separated; UTF-8, UTF-16 or cp1252.

Quotes must be closed, or the rows after an open one would vanish into its cell; a blank may stand before one. Excel's
first line ``sep=;`` is heeded, empty cells beyond the header are dropped. What ``pipeline.data.tables`` guarded for
spreadsheets is read as it was. Source: RFC 4180.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.tables import unguard
from pipeline.storage.errors import SerError

if TYPE_CHECKING:
    import pandas as pd

MISSING = ("nan", "na", "n/a", "null", "<na>")  # as tables are exported
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class ManifestError(SerError):
    """A folder, CSV or table that is no manifest."""


def read_cells(csv_path: Path) -> tuple[pd.DataFrame, list[int]]:
    """The rows as text under the names of the first, and the line that each begins in; blank rows are left out.

    Raises:
        ManifestError: no such file, no text, a quote that is not closed, a row of another width, a name used twice.
    """
    if not csv_path.is_file():
        raise ManifestError(f"no file {csv_path}; make one with: ser manifest FOLDER --out metadata.csv")
    text = _decoded(csv_path.read_bytes(), csv_path)
    header = text.lstrip("\r\n ").split("\n", 1)[0]
    if not header.strip():
        raise ManifestError(f"{csv_path} is empty; expected a CSV with the columns speech,label")
    told = re.fullmatch(r"sep=(.)\r?", header)
    separator = told[1] if told else max(",;\t", key=header.count)
    found = list(_rows(text, separator, csv_path))[1 if told else 0 :]
    if not found:
        raise ManifestError(f"{csv_path} is empty; expected a CSV with the columns speech,label")
    names = [unguard(name.strip()) for name in found[0][1]]
    widest = max((_width(row) for _, row in found[1:]), default=0)
    while names and not names[-1] and len(names) > widest:
        names.pop()
    for line, row in found:
        while len(row) > len(names) and not row[-1].strip():
            row.pop()
        if len(row) != len(names):
            remedy = f"put cells that hold {separator!r} in double quotes"
            if len(row) < len(names):
                remedy = f"give the missing ones, or their {separator!r} where they are empty"
            raise ManifestError(f"{csv_path}, line {line}: {len(row)} cells, the header has {len(names)}; {remedy}")
    if len(set(names)) != len(names):
        raise ManifestError(f"{csv_path} names a column twice: {names}; rename one of them")
    body = [[unguard(cell) for cell in row] for _, row in found[1:]]
    import pandas as pd

    return pd.DataFrame(body, columns=names), [line for line, _ in found[1:]]


def _width(row: list[str]) -> int:
    """Cells up to the last that holds something."""
    return max((n for n, cell in enumerate(row, 1) if cell.strip()), default=0)


def _rows(text: str, separator: str, csv_path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, and the line of the file that it begins in."""
    body = text.lstrip("\r\n ")
    before = text[: len(text) - len(body)].count("\n")
    dialect: dict[str, Any] = {"delimiter": separator, "strict": True, "skipinitialspace": f'{separator} "' in body}
    reader, line = csv.reader(io.StringIO(body, newline=""), **dialect), 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield before + line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(
            f"{csv_path}, line {before + line}: {error}; close every double quote, write one inside a quoted cell "
            f"twice, and keep cells below {csv.field_size_limit():,} characters"
        ) from error


def _decoded(raw: bytes, csv_path: Path) -> str:
    """UTF-16 when a byte-order mark says so, else UTF-8, else what Excel writes in western Europe."""
    encodings = ("utf-16",) if raw.startswith(_UTF16_MARKS) else ("utf-8-sig", "cp1252")
    for encoding in encodings:
        try:
            text = raw.decode(encoding)
        except UnicodeError:
            continue
        if "\0" not in text:
            return text
    raise ManifestError(
        f"{csv_path} is not a text file that can be read; expected a CSV with the columns speech,label, as UTF-8"
    )
