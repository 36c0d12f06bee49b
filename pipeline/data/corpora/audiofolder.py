"""Hugging Face audiofolder: ``metadata.csv`` or ``metadata.jsonl`` in the recordings' folder or one above it.

One row per recording: ``file_name``, relative to the metadata's folder, and a column ``label`` (or ``emotion``).
Tables without these two columns are ignored. Source: the documentation of Hugging Face Datasets, "Create an audio
dataset".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.corpora.record import Corpus
from pipeline.data.tables import ManifestError, read_cells

AUDIOFOLDER = Corpus(
    name="audiofolder",
    title="a Hugging Face audiofolder",
    family="",
    citation="",
    source="https://huggingface.co/docs/datasets/audio_dataset",
    licence="as its owner says",
    summary="",
    example="metadata.csv with file_name,label",
    read=lambda _: None,
)
_NAMES = {
    "label": ("label", "emotion"),
    "speaker": ("speaker", "speaker_id"),
    "sex": ("sex", "gender"),
    "corpus": ("corpus",),
}
_PLACES = {"train", "test", "validation", "valid", "val", "dev", "data", "audio"}  # folder names that are no corpus


@dataclass(frozen=True)
class Listed:
    """Metadata of a folder: recording -> its cells, and the number of listed recordings that do not exist."""

    rows: Mapping[Path, dict[str, str]]
    missing: int = 0


def listed(root: Path, recordings: Iterable[Path]) -> Listed:
    """The metadata at or below ``root`` (absolute) for ``recordings``; each row has ``label`` and ``corpus``.

    The default corpus is the name of the metadata's folder; if that is a split's name, of the folder above it.

    Raises:
        ManifestError: metadata that cannot be read, or that give one recording two labels.
    """
    there = set(recordings)
    rows: dict[Path, dict[str, str]] = {}
    missing = 0
    for path in _metadata(root, there):
        corpus = next((p.name for p in (path.parent, *path.parent.parents) if p.name.lower() not in _PLACES), "")
        for cells in _cells(path):
            named = Path(os.path.normpath(path.parent / cells.pop("file_name")))
            row = {"corpus": corpus} | {column: cell for column, cell in cells.items() if cell or column == "label"}
            if named not in there:
                missing += 1
            elif rows.setdefault(named, row)["label"] != row["label"]:
                raise ManifestError(
                    f"{path} labels {named.name} {row['label']!r}, another line or table {rows[named]['label']!r}; "
                    "keep only one of them"
                )
    return Listed(rows, missing)


def _metadata(root: Path, recordings: Iterable[Path]) -> list[Path]:
    folders = {root}
    for recording in recordings:
        for folder in recording.parents:
            if folder in folders:
                break
            folders.add(folder)
    return [p for f in sorted(folders) for p in (f / "metadata.csv", f / "metadata.jsonl") if p.is_file()]


def _cells(path: Path) -> Iterator[dict[str, str]]:
    """The rows with canonical column names; none if the table has no columns ``file_name`` and ``label``."""
    rows = _json_lines(path) if path.suffix == ".jsonl" else _csv_lines(path)
    for number, given in enumerate(rows):
        cells = {str(name).strip(): "" if cell is None else str(cell).strip() for name, cell in given.items()}
        for canonical, names in _NAMES.items():
            name = next((name for name in cells if name.lower() in names), None)
            if name is not None:
                cells[canonical] = cells.pop(name)
        if {"file_name", "label"} <= set(cells):
            yield cells
        elif number == 0:
            return
        else:
            raise ManifestError(f"{path}: {str(given)[:60]} has no file_name or no label; give every row both")


def _csv_lines(path: Path) -> Iterator[Mapping[str, object]]:
    table, _ = read_cells(path)
    for cells in table.itertuples(index=False, name=None):
        yield dict(zip(table.columns, cells, strict=True))


def _json_lines(path: Path) -> Iterator[Mapping[str, object]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 text; expected one JSON object per line") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ManifestError(f"{path}, line {number}: {error}; expected one JSON object per line") from error
        if not isinstance(row, dict):
            raise ManifestError(f"{path}, line {number}: {line[:40]!r} is not a JSON object; expected one per line")
        yield row
