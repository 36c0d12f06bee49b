"""Tables as files: ours, safe to open in a spreadsheet and read back as they were; and those that people send.

A text cell that begins with ``= + - @`` or a control character can run as a formula (OWASP, "CSV Injection"); in our
CSV such cells get a leading ``'``, which every reader here takes off again. Numbers, also as text, are left alone; in
JSON Lines a missing value is ``null``. ``table_files`` writes piece by piece, all tables whole or none at all.

``read_cells`` takes CSV, tab separated, JSON Lines, or a list of paths, in whatever encoding. Text is UTF-8 or UTF-16
where it can be. Else it is read in the encoding in which the recordings that it names are there; where no file decides,
as Excel writes it in western Europe. Quotes must be closed, or the rows after an open one would vanish into its cell; a
blank may stand before one. In tables separated by tabs a quote is a sign like any other where every line has its cells
without it (Common Voice). Excel's first line ``sep=;`` is heeded, empty cells beyond the header are dropped.
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


PATH_NAMES = ("speech", "path", "file", "filename", "file_name", "audio", "audio_filepath")
_EXPECTED = "expected a CSV with the columns speech,label"
_MARKS = ((b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\0\0\xfe\xff", "utf-32"))
_ENCODINGS = (  # of text that is no UTF-8: those whose mistakes are rarest first, the last two take any bytes
    *("cp1252", "gb18030", "cp932", "big5hkscs", "cp949", "euc_jp", "cp1250", "cp1251", "cp1253", "cp1254"),
    *("cp437", "cp850", "mac_roman", "latin-1"),
)
_TRIED = 100  # paths that are looked for, in each encoding


def read_cells(
    path: Path, root: Path | None = None, tell: Callable[[str], None] | None = None
) -> tuple[pd.DataFrame, list[int]]:
    """The rows as text under the names of the first, and the line that each begins in; blank rows are left out.

    A list of paths has the one column ``speech``; values of JSON Lines that are no text are JSON.

    Args:
        root: folder that relative paths start from; by default the table's own.
        tell: is given a line on an encoding that was found out.

    Raises:
        ManifestError: no such file, no text, a quote that is not closed, a row of another width, a name used twice.
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
        why = "in which its files are there" if there else "by no file's name; save it as UTF-8 if names look wrong"
        tell(f"{path} is not UTF-8: read as {encoding}, {why}")
    return found


def _content(path: Path) -> bytes:
    if is_address(str(path)):
        raise ManifestError(f"{path} is an address, which is not fetched; download it, and give the path of the file")
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
    """(encoding, text), the likeliest first."""
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
    """How many of some paths that an encoding decides are those of files, and how many were looked for."""
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
    """Whether the first line is a path, or a playlist's, and no names of columns or cells of a row."""
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
                remedy = f"give the missing ones, or their {separator!r} where they are empty"
            raise ManifestError(f"{path}, line {line}: {len(row)} cells, the header has {len(names)}; {remedy}")
    if len(set(names)) != len(names):
        raise ManifestError(f"{path} names a column twice: {names}; rename one of them")
    body = [[unguard(cell) for cell in row] for _, row in found[1:]]
    return pd.DataFrame(body, columns=names), [line for line, _ in found[1:]]


def _width(row: list[str]) -> int:
    """Cells up to the last that holds something."""
    return max((n for n, cell in enumerate(row, 1) if cell.strip()), default=0)


def _rows(text: str, separator: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, and the line of the file that it begins in."""
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
    """The rows of a table separated by tabs whose lines all have as many cells; none of another.

    A cell that is quoted as a whole, with every quote in it written twice, loses its quotes.
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
        raise ManifestError(f"{path}: {error}; expected one JSON object a line") from error
    for number, line in enumerate([] if found else text.split("\n"), start=1):
        try:
            found += [(number, json.loads(line))] if line.strip() else []
        except ValueError as error:
            raise ManifestError(f"{path}, line {number}: {error}; expected one JSON object a line") from error
    for number, row in found:
        if not isinstance(row, dict):
            raise ManifestError(f"{path}, line {number}: {str(row)[:40]!r} is no JSON object; expected one a line")
    names = list(dict.fromkeys(str(name).strip() for _, row in found for name in row))
    body = [{str(name).strip(): _cell(value) for name, value in row.items()} for _, row in found]
    return pd.DataFrame(body, columns=names).fillna(""), [number for number, _ in found]


def _cell(value: object) -> str:
    """A value of JSON as a cell; null is an empty one, of ``{"path": ...}``, as data sets write audio, the path."""
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        value = value["path"]
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
