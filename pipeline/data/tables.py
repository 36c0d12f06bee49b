"""Writes tables that are safe to open in a spreadsheet and read back unchanged; reads tables that people send.

Writing: a text cell that begins with ``= + - @`` or a control character can run as a formula (OWASP, "CSV Injection").
In written CSV files such cells get a leading ``'``, which the readers here remove again. Numbers, also as text, are not
changed. ``table_files`` writes in pieces, and all of its tables or none.

Reading: text that is not valid UTF-8 or UTF-16 is read in the encoding with which most of the named recordings exist;
if none exist, in the first that can decode it, usually that of Excel in western Europe (cp1252). Every quote must be
closed. In a tab-separated table whose lines all have the same number of cells, quotes are ordinary characters (Common
Voice). Excel's first line ``sep=;`` sets the separator. Empty cells beyond the header are dropped.
Sources: RFC 4180; RFC 7464 and jsonlines.org; Common Voice's release notes.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pipeline.audio.source import EXTENSIONS, what_else
from pipeline.storage.errors import SerError
from pipeline.storage.files import is_address, present_form
from pipeline.storage.journal import atomic_path

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MISSING = ("nan", "na", "n/a", "null", "<na>")  # how exported tables write a missing value
_RISKY = re.compile(r"^'*[=+\-@\x00-\x1f\x7f]")
_GUARDED = re.compile(r"^''*[=+\-@\x00-\x1f\x7f]")


class ManifestError(SerError):
    """A folder, CSV or table cannot be used as a manifest."""


def guard(text: str) -> str:
    """The text with a leading ``'`` if a spreadsheet could run it as a formula.

    >>> guard("=1+1"), guard("-3.5"), guard("angry")
    ("'=1+1", '-3.5', 'angry')
    """
    return "'" + text if _RISKY.match(text) and not _is_number(text) else text


def unguard(text: str) -> str:
    """The original text of a guarded cell.

    >>> unguard("'=1+1"), unguard("'quoted'")
    ('=1+1', "'quoted'")
    """
    return text[1:] if _GUARDED.match(text) else text


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write ``table`` as UTF-8 CSV with guarded text cells, without the index."""
    with path.open("w", encoding="utf-8", newline="") as file:
        append_csv(table, file, header=True)


def append_csv(table: pd.DataFrame, file: TextIO, *, header: bool) -> None:
    """Append rows as ``write_csv`` writes them, to a file opened with ``newline=""``."""
    import pandas as pd

    safe = guarded(table)
    texts = [safe[name] for name in safe.columns if not pd.api.types.is_numeric_dtype(safe[name])]
    bare = any("\r" in cell for column in texts for cell in column if isinstance(cell, str))  # QUOTE_MINIMAL leaves it
    quoting: Literal[0, 2] = csv.QUOTE_NONNUMERIC if bare else csv.QUOTE_MINIMAL
    safe.to_csv(file, index=False, header=header, lineterminator="\n", quoting=quoting)


def guarded(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` with ``guard`` applied to every text cell and column name."""
    import pandas as pd

    safe = table.rename(columns=lambda name: guard(str(name)))
    for name in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[name]):
            safe[name] = safe[name].map(lambda cell: guard(cell) if isinstance(cell, str) else cell)
    return safe


def read_csv(path: Path) -> pd.DataFrame:
    """Read a file of ``write_csv``: every cell as text (``01`` remains ``01``), empty cells as missing values."""
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
    """Tables open for writing, by name; see ``table_files``."""

    def __init__(self, out: Path, formats: Sequence[str], files: ExitStack, renames: ExitStack) -> None:
        self._out, self._formats, self._files, self._renames = out, formats, files, renames
        self._sinks: dict[str, Any] = {}

    def write(self, name: str, table: pa.Table) -> None:
        """Append rows to the table called ``name``."""
        table = table.replace_schema_metadata(None)
        for form in self._formats:
            path = f"{name}.{form}"
            first = path not in self._sinks
            sink = self._sinks[path] = self._open(path, table.schema) if first else self._sinks[path]
            if form == "parquet":
                sink.write_table(table, row_group_size=max(len(table), 1))
            elif form == "csv":
                append_csv(table.to_pandas(), sink, header=first)
            else:
                rows = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in table.to_pylist())
                sink.writelines(f"{row}\n" for row in rows)

    def _open(self, path: str, schema: pa.Schema) -> Any:
        beside = self._renames.enter_context(atomic_path(self._out / path, on_disk=True))
        if path.endswith(".parquet"):
            import pyarrow.parquet as pq

            return self._files.enter_context(pq.ParquetWriter(beside, schema, compression="zstd", compression_level=1))
        return self._files.enter_context(beside.open("w", encoding="utf-8", newline=""))


@contextmanager
def table_files(out: Path, formats: Sequence[str] = ("parquet", "csv")) -> Iterator[TableFiles]:
    """Tables in the folder ``out``; the files appear at the end of the ``with`` block, unless it raises.

    Raises:
        SerError: the disk is full or cannot be written.
    """
    try:
        with ExitStack() as renames, ExitStack() as files:  # all files are closed before the first is renamed
            yield TableFiles(out, formats, files, renames)
    except OSError as error:
        raise SerError(
            f"cannot write the tables in {out}: {error.strerror or error}; "
            "free some space, then give the same command again"
        ) from error


PATH_NAMES = ("speech", "path", "file", "filename", "file_name", "audio", "audio_filepath")
_EXPECTED = "expected a CSV with the columns speech,label"
_MARKS = ((b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\0\0\xfe\xff", "utf-32"))
_ENCODINGS = (  # tried if text is not UTF-8, the most plausible first; the last ones accept any bytes
    *("cp1252", "gb18030", "cp932", "big5hkscs", "cp949", "euc_jp", "cp1250", "cp1251", "cp1253", "cp1254"),
    *("cp437", "cp850", "mac_roman", "latin-1"),
)
_TRIED = 100  # paths checked for existence in each encoding


def read_cells(
    path: Path, root: Path | None = None, tell: Callable[[str], None] | None = None
) -> tuple[pd.DataFrame, list[int]]:
    """Read a table file: its rows as text, with the first row as column names, and the line where each row begins.

    Blank rows are left out. A list of paths gives one column, ``speech``. JSON values other than text become JSON text.

    ``root``: folder that relative paths start from; by default the table's own.

    Raises:
        ManifestError: no such file, not text, an open quote, a row of another length, a column name used twice.
    """
    raw = _content(path)
    first: ManifestError | None = None
    best: tuple[int, str, tuple[pd.DataFrame, list[int]]] | None = None
    for encoding, text in _decodings(raw):
        try:
            found = _parsed(text, path, root or path.parent)
        except ManifestError as error:
            first = first or error
            continue
        there, named = _there(found[0], root or path.parent)
        if best is None or there > best[0]:
            best = there, encoding, found
        if there == named and (named or encoding.startswith("utf")):
            break
    if best is None:
        raise first or ManifestError(f"{path} is not a text file that can be read; {_EXPECTED}, as UTF-8")
    there, encoding, found = best
    if tell and not encoding.startswith("utf"):
        why = "as files exist under these names" if there else "a guess; save it as UTF-8 if names look wrong"
        tell(f"{path} is not UTF-8: read as {encoding}, {why}")
    return found


def _content(path: Path) -> bytes:
    if is_address(str(path)):
        raise ManifestError(f"{path} is a URL, which is not fetched; download it, and give the path of the file")
    if not path.is_file():
        raise ManifestError(f"no file {path}; make one with: ser manifest FOLDER --out metadata.csv")
    if path.suffix.lower() in EXTENSIONS:
        raise ManifestError(f"{path} is a recording; {_EXPECTED} (ser infer --file and ser score take recordings)")
    raw = path.read_bytes()
    if raw.startswith(b"PAR1"):
        raise ManifestError(f"{path} is Parquet; {_EXPECTED}, as pandas.read_parquet(IN).to_csv(OUT) writes it")
    if raw.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")):
        raise ManifestError(f"{path} is a spreadsheet or an archive; {_EXPECTED}: save it as CSV UTF-8")
    if raw.startswith(b"version https://git-lfs"):
        raise ManifestError(f"{path} is {what_else(raw[:64])}")
    return raw


def _decodings(raw: bytes) -> Iterator[tuple[str, str]]:
    """(encoding, text) for each encoding that can decode ``raw``, the likeliest first."""
    mark = next((encoding for mark, encoding in _MARKS if raw.startswith(mark)), None)
    if mark is None and b"\0" in raw[:2000]:
        even, odd = raw[0:2000:2].count(0), raw[1:2000:2].count(0)
        mark = "utf-16-le" if odd > even else "utf-16-be"
    seen = set()
    for encoding in (mark,) if mark else ("utf-8-sig", *_ENCODINGS):
        try:
            text = raw.decode(encoding)
        except UnicodeError:
            continue
        if text not in seen and "\0" not in text:
            seen.add(text)
            yield encoding, text


def _there(table: pd.DataFrame, root: Path) -> tuple[int, int]:
    """(existing, checked): of the first paths with non-ASCII characters, how many exist, and how many were checked."""
    column = next((name for name in table.columns if name.strip().lower() in PATH_NAMES), None)
    cells = [] if column is None else [cell.strip() for cell in table[column] if not cell.isascii()][:_TRIED]
    return sum(os.path.lexists(present_form(str(root / cell.replace("\\", "/")))) for cell in cells), len(cells)


def _parsed(text: str, path: Path, root: Path) -> tuple[pd.DataFrame, list[int]]:
    import pandas as pd

    header = text.lstrip("\r\n ").split("\n", 1)[0].strip()
    if not header:
        raise ManifestError(f"{path} is empty; {_EXPECTED}")
    if header.startswith(("{", "[")):
        return _json(text, path)
    if _is_listed(header, root):
        lines = [(number, line.strip().strip('"')) for number, line in enumerate(text.split("\n"), start=1)]
        kept = [(number, line) for number, line in lines if line and not line.startswith("#EXT")]
        return pd.DataFrame({"speech": [line for _, line in kept]}), [number for number, _ in kept]
    told = re.fullmatch(r"sep=(.)", header)
    separator = told[1] if told else max(",;\t|", key=header.count)
    return _table(list(_rows(text, separator, path))[1 if told else 0 :], separator, path)


def _is_listed(header: str, root: Path) -> bool:
    """Whether the first line is a path or a playlist's header, rather than column names or a row of cells."""
    name = header.strip('"').replace("\\", "/")
    ends = PurePath(name).suffix.lower() in EXTENSIONS
    return header == "#EXTM3U" or (ends and (not set(",;\t|") & set(name) or os.path.lexists(root / name)))


def _table(found: Sequence[tuple[int, list[str]]], separator: str, path: Path) -> tuple[pd.DataFrame, list[int]]:
    import pandas as pd

    if not found:
        raise ManifestError(f"{path} is empty; {_EXPECTED}")
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
                remedy = f"add the missing cells, or a {separator!r} for each empty one"
            raise ManifestError(f"{path}, line {line}: {len(row)} cells, the header has {len(names)}; {remedy}")
    if len(set(names)) != len(names):
        raise ManifestError(f"{path} names a column twice: {names}; rename one of them")
    body = [[unguard(cell) for cell in row] for _, row in found[1:]]
    return pd.DataFrame(body, columns=names), [line for line, _ in found[1:]]


def _width(row: list[str]) -> int:
    """Number of cells up to the last one that is not blank."""
    return max((n for n, cell in enumerate(row, 1) if cell.strip()), default=0)


def _rows(text: str, separator: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line of the file where it begins, cells) of each row that is not blank."""
    if separator == "\t" and (unquoted := _unquoted(text)):
        yield from unquoted
        return
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
            f"{path}, line {before + line}: {error}; close every double quote, write one inside a quoted cell "
            f"twice, and keep cells below {csv.field_size_limit():,} characters"
        ) from error


def _unquoted(text: str) -> list[tuple[int, list[str]]]:
    """The rows of a tab-separated table, split without regard to quotes; empty if the lines differ in length.

    A cell that is quoted as a whole, with every inner quote written twice, is unquoted.
    """
    lines = [(number, line.rstrip("\r").split("\t")) for number, line in enumerate(text.split("\n"), start=1)]
    rows = [(number, row) for number, row in lines if any(cell.strip() for cell in row)]
    if len({len(row) for _, row in rows}) != 1:
        return []
    whole = re.compile(r'"((?:[^"]|"")*)"')
    return [(n, [m[1].replace('""', '"') if (m := whole.fullmatch(c)) else c for c in row]) for n, row in rows]


def _json(text: str, path: Path) -> tuple[pd.DataFrame, list[int]]:
    """JSON Lines, or one JSON array of objects."""
    import pandas as pd

    found: list[tuple[int, Any]] = []
    try:
        found = [(1, row) for row in json.loads(text)] if text.lstrip().startswith("[") else []
    except ValueError as error:
        raise ManifestError(f"{path}: {error}; expected an array of JSON objects, or one object per line") from error
    for number, line in enumerate([] if found else text.split("\n"), start=1):
        try:
            found += [(number, json.loads(line))] if line.strip() else []
        except ValueError as error:
            raise ManifestError(f"{path}, line {number}: {error}; expected one JSON object per line") from error
    for number, row in found:
        if not isinstance(row, dict):
            raise ManifestError(f"{path}, line {number}: {str(row)[:40]!r} is not a JSON object; expected one per line")
    names = list(dict.fromkeys(str(name).strip() for _, row in found for name in row))
    body = [{str(name).strip(): _cell(value) for name, value in row.items()} for _, row in found]
    return pd.DataFrame(body, columns=names).fillna(""), [number for number, _ in found]


def _cell(value: object) -> str:
    """A JSON value as a cell: "" for null, and the path of ``{"path": ...}``, as data sets store audio."""
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        value = value["path"]
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
