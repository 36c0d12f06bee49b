"""Reading of a CSV of labels that the user adds to the recordings: file name and emotion."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import PurePosixPath

import pandas as pd

FILE_COLUMNS = ("speech", "path", "file", "filename", "file_name", "audio")
LABEL_COLUMNS = ("label", "emotion", "label_name")
# the aliases of pipeline.data.labels, which the page does not import
_SPELLINGS = {
    "angry": "anger ang mad",
    "calm": "calmness relaxed",
    "disgust": "disgusted dis",
    "fearful": "fear fea afraid scared anxiety",
    "happy": "happiness hap joy joyful",
    "neutral": "neu neutrality",
    "sad": "sadness",
    "surprised": "surprise sur ps pleasant_surprise pleasant_surprised",
}
ALIASES = {alias: name for name, aliases in _SPELLINGS.items() for alias in aliases.split()}


class LabelsError(Exception):
    """A table of labels that cannot be used; ``str()`` is one sentence for the user."""


def read_labels(data: bytes, name: str, classes: Sequence[str]) -> dict[str, str]:
    """File name, case-folded and without folders -> class.

    A label is the name of a class, an alias of it ("fear", "happiness"), or its number from 0 ("3", "3.0").

    Raises:
        LabelsError: the data is not a table, a column is missing, or a label is unknown.
    """
    try:
        table = pd.read_csv(io.BytesIO(data), dtype=str, sep=None, engine="python", encoding="utf-8-sig")
    except (csv.Error, ValueError) as error:  # pandas' errors, and UnicodeDecodeError, are ValueErrors
        raise LabelsError(f"{name} is not a CSV table in UTF-8.") from error
    columns = {str(column).strip().casefold(): column for column in table.columns}
    file_column = next((columns[c] for c in FILE_COLUMNS if c in columns), None)
    label_column = next((columns[c] for c in LABEL_COLUMNS if c in columns), None)
    if file_column is None or label_column is None:
        raise LabelsError(
            f"{name} needs a column “file” and a column “label”; it has {', '.join(map(str, table.columns))}."
        )
    rows = table[[file_column, label_column]].dropna()
    return {_bare(file): _class(label, classes, name) for file, label in rows.itertuples(index=False)}


def _bare(path: str) -> str:
    return PurePosixPath(path.strip().replace("\\", "/")).name.casefold()


def _class(text: str, classes: Sequence[str], name: str) -> str:
    number = None if text.strip() in classes else _whole(text)
    if number is None:
        same = [name for name in classes if _canonical(name) == _canonical(text)]
    else:
        same = [name for index, name in enumerate(classes) if index == number]
    if len(same) == 1:
        return same[0]
    raise LabelsError(f"{name} has the unknown label “{text}”; the classes are {', '.join(classes)}.")


def _whole(text: str) -> int | None:
    """The whole number in a cell, else None; spreadsheets and pandas write 3 as 3.0 where other cells are empty."""
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _canonical(text: str) -> str:
    name = "_".join(text.casefold().replace("-", " ").replace("_", " ").split())
    return ALIASES.get(name, name)
