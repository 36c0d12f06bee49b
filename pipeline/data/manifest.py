"""Recordings as a manifest table: from a folder, a CSV, or a DataFrame.

A manifest has one row a recording: ``speech`` (path), ``label`` (a class name; absent when only scoring), and, when
known, ``speaker sex intensity statement corpus split``; every further column is kept untouched. Folders are scanned by
``pipeline.data.folder``. Reading tables is in this module, splitting them in ``pipeline.data.splits``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PureWindowsPath

import pandas as pd

from pipeline.data.cells import PATH_NAMES, read_cells
from pipeline.data.folder import scan_folder as scan_folder
from pipeline.data.label_column import Meaning, class_names
from pipeline.data.labels import LabelSet
from pipeline.data.segments import with_segments
from pipeline.data.tables import ManifestError as ManifestError
from pipeline.storage.files import is_address, present_form
from pipeline.storage.remote import is_remote

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
    """Manifest in a table file: CSV, tab separated, JSON Lines or a list of paths, see ``pipeline.data.cells``.

    Args:
        root: folder that relative paths start from; the CSV's own folder by default. Relative paths may leave the
            CSV's folder, but not an explicit ``root``.
        label_map: given text, or the name that it stands for -> wanted name, see ``labels.mapped``.
        labels: class names of a model, which integer labels index and names must be among; by default the names found.
        label_names: what integer labels index, in any order, where there is no model; by default a class is called
            by its integer.
        tell: is given a line on what integers were taken for.

    Raises:
        ManifestError: no such file, no path column, no label column though required, no rows, a path outside ``root``.
        LabelError: a label outside ``labels``, or integers that the table itself contradicts.
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
    """Manifest from a table that has a path column (``speech`` or one of its names) and perhaps labels.

    Columns such as ``start,end`` select a part of the recording (``pipeline.data.segments``).

    Arguments and errors as ``read_manifest``; ``fenced`` refuses relative paths that leave ``root``. ``lines`` of the
    file that the rows begin in are for messages, which count rows without.
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
    """Absolute path of a manifest cell; back-slashes of Windows paths and blanks around a path are understood.

    Raises:
        ManifestError: an empty cell, a ``file://`` URI of no absolute path, or (``fenced``) a relative path that
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
        return text  # an address becomes a row that says so
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
    """Whether there is such a file; a name that is too long for one is none."""
    try:
        return path.exists()
    except OSError:
        return False


def label_set(table: pd.DataFrame) -> LabelSet:
    """The classes of a labelled manifest, sorted."""
    return LabelSet.from_names(str(name) for name in table["label"])


def label_counts(table: pd.DataFrame, labels: Sequence[str]) -> dict[str, int]:
    """Recordings a class, in label order; classes without any count 0."""
    counts = table["label"].value_counts()
    return {name: int(counts.get(name, 0)) for name in labels}


def _renamed(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """A copy whose path and label columns have their canonical names, and no capitals in those that parts go by."""
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
