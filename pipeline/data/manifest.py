"""The manifest, a table of recordings, from a folder, a CSV, or a DataFrame.

A manifest has one row per recording: ``speech`` (path), ``label`` (a class name; may be absent for scoring), and if
known ``speaker sex intensity statement corpus split``. All other columns are kept unchanged. Folders are scanned by
``pipeline.data.folder``, table files are read by ``tables``, recordings are divided by ``splits``.

A label is a class name, an alias of one, or an integer. With a model, integers are indices of its classes; with
``--label_names``, of those names; otherwise the integer itself becomes the class name. If file names of a known corpus,
or a second column with class names, contradict the integers, their order must be different: the table is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import pandas as pd

from pipeline.data.corpora import recognised
from pipeline.data.folder import scan_folder as scan_folder
from pipeline.data.labels import LabelError, LabelSet, as_integer, canonical_name, describe, mapped, normalise_name
from pipeline.data.segments import with_segments
from pipeline.data.tables import MISSING, PATH_NAMES, read_cells
from pipeline.data.tables import ManifestError as ManifestError
from pipeline.storage.files import is_address, is_remote, present_form

WORDS = ("emotion", "emotion_name", "emotion_label", "label_name", "label_text", "class", "class_name", "category")
_SHOWN = 12


@dataclass(frozen=True)
class Meaning:
    """How labels are translated to class names; the fields are arguments of ``read_manifest``."""

    label_map: Mapping[str, str] = field(default_factory=dict)
    labels: Sequence[str] | None = None
    label_names: Sequence[str] | None = None

    @property
    def by_index(self) -> Sequence[str] | None:
        """The names that integers are indices of; None if there are none."""
        return self.labels if self.labels is not None else self.label_names

    def name(self, wanted: str) -> str:
        """The class of a label that is a name; LabelError refuses an unknown one."""
        if self.labels is not None:
            known = LabelSet(tuple(self.labels))
            return known.names[known.index(wanted)]
        name = canonical_name(wanted)
        if self.label_names is not None and name not in {*self.label_names, *self.label_map.values()}:
            raise LabelError(
                f"unknown label {wanted!r}; --label_names are {describe(self.label_names)}; "
                f"translate other names with --label_map {normalise_name(wanted)}=wanted"
            )
        return name

    def of_integer(self, number: int) -> str:
        """The class of a label that is an integer; LabelError refuses one without a class."""
        names = self.by_index
        if (names is None and number >= 0) or (self.labels and str(number) in self.labels):
            return str(number)
        if self.labels and all(str(as_integer(name)) == name for name in self.labels):
            raise LabelError(f"label {number} is not one of the classes, which are {', '.join(self.labels)}")
        if names is not None and 0 <= number < len(names):
            return names[number]
        expected = f"outside 0..{len(names) - 1}; the classes are {describe(names)}" if names else "below 0"
        raise LabelError(f"label {number} is {expected}; translate other numbers with --label_map {number}=wanted,...")


def class_names(
    table: pd.DataFrame,
    meaning: Meaning,
    *,
    required: bool,
    where: Callable[[int], str],
    tell: Callable[[str], None] | None = None,
) -> list[str | None]:
    """The class of each row of a table with ``label`` and ``speech``; None where a label is missing.

    Args:
        required: whether a missing label is an error.
        where: row number -> its name in messages.

    Raises:
        LabelError: a label that is not a class, names mixed with integers that have no names, or integers that
            contradict the table's class-name column or file names.
    """
    texts = _texts(table["label"], meaning)
    names: list[str | None] = []
    integers: dict[int, int] = {}  # row -> the integer that its label is
    named = -1
    for row, text in enumerate(texts):
        wanted = mapped(text, meaning.label_map, meaning.by_index or ()) if text else text
        number = None if wanted in (meaning.labels or ()) else as_integer(wanted)
        try:
            if not text:
                if required:
                    raise LabelError("the label is empty; label every recording, or leave the row out")
                names.append(None)
            elif number is None:
                names.append(meaning.name(wanted))
                named = row
            else:
                names.append(meaning.of_integer(number))
                integers[row] = number
        except LabelError as error:
            by_map = "" if wanted == text else f", {text!r} by --label_map"
            raise LabelError(f"{where(row)}{by_map}: {error}") from None
    if integers:
        first = next(iter(integers))
        if meaning.by_index is None and named >= 0:
            raise LabelError(
                f"{where(first)}: the label {texts[first]} is an integer, but {where(named)} has {texts[named]!r}; "
                f"say which class each integer is, with --label_map {integers[first]}=wanted,..."
            )
        _compare(table, integers, names, meaning, where, tell)
    return names


def _texts(cells: pd.Series, meaning: Meaning) -> list[str]:
    """The labels as text; "" for cells that mean "missing" (``MISSING``), unless a class has that name."""
    named = {*(meaning.by_index or ()), *meaning.label_map}
    texts = ["" if cell is None or cell is pd.NA or cell != cell else str(cell).strip() for cell in cells]
    return ["" if t.lower() in MISSING and not named & {t, normalise_name(t)} else t for t in texts]


def _compare(
    table: pd.DataFrame,
    integers: Mapping[int, int],
    names: Sequence[str | None],
    meaning: Meaning,
    where: Callable[[int], str],
    tell: Callable[[str], None] | None,
) -> None:
    """Check integer labels against class names elsewhere in their rows; report the meaning of the integers."""
    told = _told(table, integers, meaning.label_map)
    say: dict[int, set[str]] = {number: set() for number in sorted(set(integers.values()))}
    for row, (name, _) in told.items():
        say[integers[row]].add(name)
    whole = all(len(words) == 1 for words in say.values()) and len(set().union(*say.values())) == len(say)
    pairs = [f"{number}={next(iter(words))}" for number, words in say.items()] if whole else []
    if meaning.by_index is not None:
        for row, (name, by) in told.items():
            if name in meaning.by_index and name != names[row]:
                advice = ",".join(pairs) or f"{integers[row]}=wanted,..."
                raise LabelError(
                    f"{where(row)}: label {integers[row]} means {names[row]} ({describe(meaning.by_index)}), "
                    f"but {by} says {name}; define the integers with --label_map {advice}"
                )
    if tell is None:
        return
    if meaning.by_index is not None:
        whose = "the model's classes" if meaning.labels is not None else "--label_names"
        tell(f"integer labels are indices of {whose}: {describe(meaning.by_index)}")
        return
    called = list(map(str, say))
    shown = ", ".join(called[:_SHOWN]) + (f" and {len(called) - _SHOWN} more" if len(called) > _SHOWN else "")
    hint = f"--label_map {','.join(pairs)} (from the table)" if pairs else "--label_names NAME,NAME,..."
    tell(f"labels are integers: the classes are named {shown}; to name them, give {hint}")


def _told(table: pd.DataFrame, rows: Mapping[int, int], label_map: Mapping[str, str]) -> dict[int, tuple[str, str]]:
    """Row -> (class, its source) from a column of class names, else from a file name of a known corpus."""
    words = [column for column in table.columns if str(column).strip().lower() in WORDS]
    told: dict[int, tuple[str, str]] = {}
    for row in rows:
        for column in words:
            text = str(table[column].iloc[row]).strip()
            if text and text.lower() not in MISSING and as_integer(text) is None:
                told[row] = canonical_name(text, label_map), f"its column {column}"
                break
        else:
            name = str(table["speech"].iloc[row]).replace("\\", "/").rpartition("/")[2]
            if (found := recognised(PurePosixPath(name))) is not None:
                told[row] = canonical_name(found[1].label, label_map), f"the file name {name}"
    return told


LABEL_NAMES = ("label", "emotion")


def read_manifest(
    csv_path: Path,
    *,
    root: Path | None = None,
    label_map: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    require_labels: bool = True,
    tell: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """The manifest from a table file: CSV, tab-separated, JSON Lines or a list of paths, see ``pipeline.data.tables``.

    Args:
        root: folder that relative paths start from; the CSV's own folder by default. Relative paths may leave the
            CSV's folder, but not an explicit ``root``.
        label_map: label as given, or its standard name -> wanted name, see ``labels.mapped``.
        labels: class names of a model; integer labels are their indices, and every name must be one of them. By
            default the classes are the names found.
        label_names: without a model, the names that integer labels are indices of, in any order; by default the
            integer itself becomes the class name.
        tell: called with lines of text on the encoding, the segments and the meaning of integer labels.

    Raises:
        ManifestError: no such file, no path column, no label column though required, no rows, a path outside ``root``.
        LabelError: a label outside ``labels``, or integers that other cells of the table contradict.
    """
    table, lines = read_cells(csv_path, root, tell)
    if root is not None and not root.is_dir():
        raise ManifestError(f"no folder {root}; --root is the folder that relative paths in the CSV start from")
    return from_dataframe(
        table,
        root=root or csv_path.parent,
        fenced=root is not None,
        label_map=label_map,
        labels=labels,
        label_names=label_names,
        require_labels=require_labels,
        tell=tell,
        source=str(csv_path),
        lines=lines,
    )


def from_dataframe(
    table: pd.DataFrame,
    *,
    root: Path | None = None,
    fenced: bool = False,
    label_map: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    require_labels: bool = True,
    tell: Callable[[str], None] | None = None,
    source: str = "the table",
    lines: Sequence[int] | None = None,
) -> pd.DataFrame:
    """The manifest from a table with a path column (``speech`` or another of ``PATH_NAMES``) and optional labels.

    Columns such as ``start,end`` select a part of the recording (``pipeline.data.segments``).

    Arguments and errors as for ``read_manifest``. ``fenced`` refuses relative paths that leave ``root``. ``lines``: the
    line of the file where each row begins, for messages; without it, messages give row numbers.
    """

    def where(row: int) -> str:
        return f"{source}, row {row + 1}" if lines is None else f"{source}, line {lines[row]}"

    if table.empty:
        raise ManifestError(f"{source} has no rows; expected one row a recording")
    table = _renamed(table, source)
    if "label" not in table.columns and require_labels:
        raise ManifestError(
            f"{source} has no label column; add one named label (or emotion); found {list(table.columns)}"
        )
    table["speech"] = [
        resolve_path(cell, root or Path.cwd(), fenced, where(row)) for row, cell in enumerate(table["speech"])
    ]
    table = with_segments(table, where, tell)
    if "label" in table.columns:
        meaning = Meaning(label_map or {}, labels, label_names)
        table["label"] = class_names(table, meaning, required=require_labels, where=where, tell=tell)
    return table


def resolve_path(cell: object, root: Path, fenced: bool = False, where: str = "the table") -> str:
    """The absolute path in a manifest cell; accepts Windows backslashes and blanks around a path. URLs are unchanged.

    Raises:
        ManifestError: an empty cell, a ``file://`` URI without an absolute path, or (``fenced``) a relative path that
            leaves ``root``.
    """
    text = "" if cell is None or cell is pd.NA or cell != cell else str(cell)
    if not text.strip():
        raise ManifestError(f"{where}: the path is empty; give every row the path of its recording")
    if text != text.strip() and not _exists(root / text):
        text = text.strip()
    if text.startswith("file://") and not text.startswith(("file:///", "file://localhost/")):
        raise ManifestError(f"{where}: {text!r} is not absolute; write file:///folder/name.wav, or the path alone")
    if text.startswith("file://") or is_remote(text) or is_address(text):
        return text  # a URL that is not fetched becomes a row with status and error
    path = Path(text)
    if "\\" in text and not _exists(root / path):
        path = Path(PureWindowsPath(text).as_posix())
    if path.is_absolute():
        return present_form(str(path))
    full = present_form(os.path.normpath(root.absolute() / path))
    if fenced and not Path(os.path.realpath(full)).is_relative_to(os.path.realpath(root)):
        raise ManifestError(
            f"{where}: {text!r} leaves --root {root}; move the recording below it, or give an absolute path"
        )
    return full


def _exists(path: Path) -> bool:
    """Whether the file exists; False for a name too long for the file system."""
    try:
        return path.exists()
    except OSError:
        return False


def label_set(table: pd.DataFrame) -> LabelSet:
    """The classes of a labelled manifest, sorted."""
    return LabelSet.from_names(str(name) for name in table["label"])


def label_counts(table: pd.DataFrame, labels: Sequence[str]) -> dict[str, int]:
    """Number of recordings per class, in the order of ``labels``; 0 for classes without any."""
    counts = table["label"].value_counts()
    return {name: int(counts.get(name, 0)) for name in labels}


def _renamed(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """A copy with the canonical names ``speech``, ``label``, ``speaker`` and ``split`` for these columns."""
    table = table.reset_index(drop=True).copy()
    lower = [str(column).strip().lower() for column in table.columns]
    known = {"speech": PATH_NAMES, "label": LABEL_NAMES, "speaker": ("speaker",), "split": ("split",)}
    for canonical, names in known.items():
        name = next((name for name in names if name in lower), None)
        if name is None:
            continue
        if lower.count(name) > 1:
            raise ManifestError(f"{source} names a column twice: {list(table.columns)}; rename one {name}")
        table = table.rename(columns={table.columns[lower.index(name)]: canonical})
    if "speech" not in table.columns:
        raise ManifestError(
            f"{source} has no path column; name it speech (or {', '.join(PATH_NAMES[1:])}); found {list(table.columns)}"
        )
    return table
