"""CSV files that are safe to open in a spreadsheet, and whose text is read back as it was.

A text cell that begins with ``= + - @`` or a control character can run as a formula (OWASP, "CSV
Injection"); such cells get a leading ``'``, which ``read_csv`` takes off again. Numbers, also as text, are
left alone.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    import pandas as pd

_RISKY = re.compile(r"^'*[=+\-@\x00-\x1f\x7f]")
_GUARDED = re.compile(r"^''*[=+\-@\x00-\x1f\x7f]")


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
