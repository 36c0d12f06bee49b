"""Scans a folder of labelled recordings into a manifest table.

A recording's label comes from the metadata of an audiofolder; else from its file name, if that is of a known corpus;
else from a folder above it whose name is an emotion. Other names (splits, speakers, levels) are never used as labels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from pipeline.audio.load import EXTENSIONS
from pipeline.audio.source import USUAL_ENDINGS
from pipeline.data.corpora import CORPORA, Corpus, Told, family_of, recognised
from pipeline.data.corpora.audiofolder import AUDIOFOLDER, Listed, listed
from pipeline.data.corpora.readers import SONG, SPEECH
from pipeline.data.corpora.voices import check_corpora
from pipeline.data.labels import OTHER_CLASSES, as_integer, canonical_name, emotion_of, is_named
from pipeline.data.tables import MISSING, ManifestError
from pipeline.storage.files import FolderScan, local_path, path_text, printable, scan

_COLUMNS = ("speech", "label", "speaker", "sex", "intensity", "statement", "repetition", "corpus")
_SHOWN = 5


@dataclass(frozen=True)
class _Recording:
    path: Path
    label: str
    corpus: Corpus | None = None  # recognised by the file name
    told: Told | None = None  # facts from the file name
    listed: Mapping[str, str] | None = None  # its cells in an audiofolder's metadata

    def row(self, sexes: Mapping[str, str]) -> dict[str, str]:
        """The recording's cells in a manifest."""
        cells = {"speech": path_text(self.path), "label": self.label}
        if self.corpus and self.told:
            cells |= {name: getattr(self.told, name) for name in _COLUMNS[2:-1]} | {"corpus": self.corpus.name}
            cells["sex"] = self.told.sex or sexes.get(self.told.speaker, "")
        if self.listed is not None:
            family = family_of(self.listed["corpus"])
            given = {name: cell for name, cell in self.listed.items() if name not in ("label", "speech")}
            if speaker := given.get("speaker"):
                given["speaker"] = speaker if speaker.startswith(f"{family}_") else f"{family}_{speaker}"
            cells |= {name: cell for name, cell in given.items() if not (self.told and name in ("corpus", "speaker"))}
        return cells


@dataclass
class _Sorted:
    """The recordings of a folder, divided into those for the manifest and those left out."""

    kept: list[_Recording] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)  # reason -> recordings

    def leave_out(self, reason: str, recordings: Collection[_Recording]) -> None:
        """Move recordings from ``kept`` to ``left_out``."""
        out = {recording.path for recording in recordings}
        self.left_out.setdefault(reason, []).extend(r.path for r in self.kept if r.path in out)
        self.kept = [recording for recording in self.kept if recording.path not in out]


def scan_folder(
    folder: Path,
    *,
    corpus: str | None = None,
    songs: bool = False,
    keep_classes: bool = False,
    label_map: Mapping[str, str] | None = None,
    tell: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """The manifest of a folder of labelled recordings and its subfolders, sorted by file stem.

    If several files have the same code of a corpus (copies, also renamed ones), only one is kept.

    Args:
        corpus: name of the only corpus to keep.
        songs: keep RAVDESS's songs in addition to its speech.
        keep_classes: keep emotions that no model here is trained for, such as boredom.
        label_map: as in ``read_manifest``; folder names that are in it count as labels, too.
        tell: called with one line of text for each corpus found, and one for all that was left out.

    Raises:
        ManifestError: no such folder, no recording in it, none of ``corpus``, too many recordings without a label, a
            recording with two different labels, or one speaker name in two corpora.
    """
    if not folder.is_dir():
        raise ManifestError(f"no folder {folder}; give the folder that holds the recordings")
    root, found = Path(os.path.abspath(folder)), scan(folder, EXTENSIONS)
    paths = sorted((Path(local_path(text)) for text in found.files), key=lambda path: (path.stem, str(path)))
    if not paths:
        raise ManifestError(f"no recordings in {folder}; expected files ending in {USUAL_ENDINGS}")
    wanted = CORPORA if corpus is None else tuple(known for known in CORPORA if known.name == corpus)
    metadata = listed(root, paths) if AUDIOFOLDER in wanted else Listed({})
    sorted_out = _Sorted()
    for path in paths:
        if recording := _recording(path, root, wanted, metadata.rows.get(path), label_map):
            sorted_out.kept.append(recording)
        else:
            sorted_out.unknown.append(path)
    if corpus is not None and not sorted_out.kept:
        raise ManifestError(
            f"nothing in {folder} is of {corpus} (as {wanted[0].example}); seen: {paths[0].name}; "
            "leave --corpus out to detect the corpus"
        )
    if corpus is None:
        _refuse_unknown(sorted_out, root)
    _leave_out(sorted_out, songs or corpus is not None, keep_classes, label_map)
    sexes = _sexes(sorted_out.kept, root)
    if tell:
        for line in (*_said(sorted_out.kept, sexes), _said_left_out(sorted_out, found, corpus, metadata.missing)):
            if line:
                tell(line)
    if not sorted_out.kept:
        reasons = ", ".join(reason for reason, out in sorted_out.left_out.items() if out)
        raise ManifestError(f"no recording in {folder} has a known class: all are {reasons}")
    table = _table(sorted_out.kept, sexes)
    check_corpora(table, {*(label_map or {}).values(), *(OTHER_CLASSES if keep_classes else ())})
    return table


def _recording(
    path: Path,
    root: Path,
    corpora: Sequence[Corpus],
    row: Mapping[str, str] | None,
    label_map: Mapping[str, str] | None,
) -> _Recording | None:
    """A recording with its label and its facts; None if no label is found."""
    known, told = recognised(path, corpora) or (None, None)
    if row is not None:
        return _Recording(path, _checked(row["label"], path, label_map, "metadata"), known, told, row)
    told_by = {}
    if told is not None:
        told_by[path.name] = canonical_name(told.label, label_map)
        more = emotion_of(told.more.strip(" _.()-"), label_map)
        told_by |= {told.more: more} if more else {}
    if told is not None or len(corpora) > 1:
        names = path.relative_to(root).parts[:-1]
        told_by |= {name: label for name in names if (label := emotion_of(name, label_map)) is not None}
    if len(set(told_by.values())) > 1:
        both = " and ".join(f"{printable(name)} says {label}" for name, label in list(told_by.items())[:2])
        raise ManifestError(
            f"{path_text(path)}: {both}; rename one of them, map one to the other with "
            "--label_map given=wanted, or list the recordings in a CSV with the columns speech,label"
        )
    if not told_by:
        return None
    return _Recording(path, _checked(next(iter(told_by.values())), path, None, "--label_map"), known, told)


def _checked(text: str, path: Path, label_map: Mapping[str, str] | None, by: str) -> str:
    """The class name of a label. Refuses names that a CSV cannot keep: numbers (read as indices) and ``NA``."""
    label = canonical_name(text, label_map)
    if not label or label in MISSING or as_integer(label) is not None:
        raise ManifestError(
            f"{path_text(path)}: the label {label!r} (by {by}) cannot be a class name; "
            "translate it with --label_map given=wanted, for example 0=angry"
        )
    return label


def _refuse_unknown(found: _Sorted, root: Path) -> None:
    """Refuse unlabelled recordings that may be another class, or that are more than half of all.

    Raises:
        ManifestError: with the names seen, and how to give labels.
    """
    unknown, in_folders = found.unknown, [path for path in found.unknown if path.parent != root]
    by_folders = any(recording.told is None and recording.listed is None for recording in found.kept)
    if len(unknown) <= len(found.kept) and not (by_folders and in_folders):
        return
    first = (in_folders or unknown)[0]
    seen = list(dict.fromkeys(part for path in in_folders for part in path.relative_to(root).parts[:-1]))
    names = ", ".join(map(printable, seen[:_SHOWN]))
    names += f" and {len(seen) - _SHOWN} more" if len(seen) > _SHOWN else ""
    folders = f"the folders {names} are no known emotions" if seen else "no folder above it is named after an emotion"
    example = printable(seen[-1]) if seen else "whistling"
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    raise ManifestError(
        f"cannot tell the emotion of {printable(first.name)}{more} in {path_text(root)}: no known corpus has such "
        f"names, {folders}; use one folder per emotion (angry, calm, ...), define a folder's name with "
        f"--label_map {example}=wanted, or list the recordings in a CSV with the columns speech,label"
    )


def _leave_out(found: _Sorted, songs: bool, keep_classes: bool, label_map: Mapping[str, str] | None) -> None:
    """Leave out copies, songs beside speech, recordings known to be broken, and classes that no model here has."""
    first: dict[tuple[str, str], _Recording] = {}
    copies = []
    for one in sorted(found.kept, key=lambda recording: len(recording.path.stem)):  # keeps the shortest name
        if one.corpus and one.told and first.setdefault((one.corpus.name, one.told.code), one) is not one:
            copies.append(one)
    found.leave_out("found twice", copies)
    if not songs and any(one.corpus is SPEECH for one in found.kept):
        reason = "songs in addition to speech; ser manifest --songs keeps them"
        found.leave_out(reason, [one for one in found.kept if one.corpus is SONG])
    broken = [one for one in found.kept if one.corpus and one.told and one.told.code in one.corpus.broken]
    found.leave_out("known to be broken", broken)
    if keep_classes:
        return
    nobodys = [one for one in found.kept if one.label in (one.corpus.left_out if one.corpus else OTHER_CLASSES)]
    for label in sorted({one.label for one in nobodys if not is_named(one.label, label_map)}):
        reason = f"of {label}, a class of no model here; ser manifest --keep_classes keeps them"
        found.leave_out(reason, [one for one in nobodys if one.label == label])


def _said(kept: Sequence[_Recording], sexes: Mapping[str, str]) -> Iterator[str]:
    """One line of text for each corpus found, and one for recordings labelled by folders."""
    for known in CORPORA:
        told = [one.told for one in kept if one.corpus is known and one.told]
        if told:
            speakers = {one.speaker for one in told}
            line = f"{known.name}: {_count(told)} of {len(speakers)} speakers, by names such as {known.example}"
            if not known.tried:
                line += "; its reader is untested on the real corpus"
            if known.sexes and not speakers & set(sexes):
                line += f"; no {known.speakers_file} in their folder or above: the column sex is empty"
            yield line
    named = Counter(one.listed["corpus"] for one in kept if one.listed is not None and one.told is None)
    for name, count in named.items():
        yield f"{name}: {count:,} recordings, labelled by metadata ({AUDIOFOLDER.title}; untested on a real one)"
    if folders := [one for one in kept if one.told is None and one.listed is None]:
        yield f"{_count(folders)} of no known corpus, labelled by the folders they lie in"


def _said_left_out(found: _Sorted, scanned: FolderScan, corpus: str | None, missing: int) -> str:
    """One line of text on all that was left out; "" if nothing was."""
    unknown = "whose emotion cannot be told" if corpus is None else f"not of {corpus}"
    parts = [
        f"{len(paths):,} {reason} (first: {printable(paths[0].name)})"
        if len(paths) > 1
        else f"{printable(paths[0].name)} ({reason})"
        for reason, paths in ({unknown: found.unknown} | found.left_out).items()
        if paths
    ]
    gone = f"{missing:,} listed in metadata that do not exist" if missing else ""
    text = ", ".join(filter(None, [*parts, gone, scanned.skipped()]))
    return f"left out: {text}" if text else ""


def _count(recordings: Sequence[object]) -> str:
    return f"{len(recordings):,} recording{'s' if len(recordings) > 1 else ''}"


def _sexes(kept: Sequence[_Recording], root: Path) -> dict[str, str]:
    """Speaker -> sex, from a corpus' speakers file in its recordings' folders or above, up to ``root``."""
    found: dict[str, str] = {}
    for corpus in CORPORA:
        folders = {one.path.parent for one in kept if one.corpus is corpus}
        for folder in sorted(folders) if corpus.sexes else ():
            above = [parent for parent in (folder, *folder.parents) if parent.is_relative_to(root)]
            table = next((p for parent in above if (p := parent / corpus.speakers_file).is_file()), None)
            if table is not None and corpus.sexes is not None:
                found = {**corpus.sexes(table), **found}
    return found


def _table(kept: Sequence[_Recording], sexes: Mapping[str, str]) -> pd.DataFrame:
    """The manifest; the column ``repetition`` only if a recording has one."""
    table = pd.DataFrame([recording.row(sexes) for recording in kept]).fillna("")
    if "repetition" in table and not table["repetition"].any():
        table = table.drop(columns="repetition")
    first = [name for name in _COLUMNS if name in table.columns]
    return table[[*first, *(name for name in table.columns if name not in first)]]
