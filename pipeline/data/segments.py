"""Segments: table rows that select a part of a recording by ``start`` and ``end``, in many common spellings.

A segment is treated like a file cut out at these times: it has its own id, content hash and predictions.
Sources of the spellings: audformat's segmented index (``file,start,end``, pandas timedeltas, NaT for the end), NeMo's
manifests (``offset,duration``), AudioSet (``start_seconds``), DCASE (``onset,offset``), SubRip (``00:16:16,059``).
Limits: a start without an end (or the reverse) selects nothing. A time of day is read as a time in the recording, and
then mostly lies past its end.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.audio.source import AudioSource, Segment
from pipeline.data.tables import MISSING, ManifestError
from pipeline.storage.files import source_of

if TYPE_CHECKING:
    import pandas as pd

START, END = "segment_start_s", "segment_end_s"  # seconds; empty: the recording's own beginning or end
HASH_COLUMN = "content_hash"
RECORDING_HASH = "recording_hash"  # of the whole recording that a segment is of
WHOLE = (0.0, np.inf)
_MARGIN_S = 0.01  # segments that share less do not overlap
_MARKS = (  # names of start and end (lower case, no underscores, blanks, hyphens), and their unit in seconds
    *(("segmentstarts", "segmentends", 1.0), ("starts", "ends", 1.0), ("start", "end", 1.0)),
    *(("starttime", "endtime", 1.0), ("startsec", "endsec", 1.0), ("startseconds", "endseconds", 1.0)),
    *(("starttimeseconds", "endtimeseconds", 1.0), ("startms", "endms", 0.001), ("begin", "end", 1.0)),
    *(("begintime", "endtime", 1.0), ("onset", "offset", 1.0)),
)
_LENGTHS = (("offset", "duration"), ("start", "duration"), ("starts", "durations"), ("onset", "duration"))
_OURS = ("predicted", "confidence")  # columns of a predictions table, whose times select no segments
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?|\d\d?[./]\d\d?[./]\d{2,4}")
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:[.,]\d*)?)")


def with_segments(
    table: pd.DataFrame, where: Callable[[int], str], tell: Callable[[str], None] | None = None
) -> pd.DataFrame:
    """The table with the columns ``START`` and ``END`` (float64 seconds) if it has columns that select segments.

    ``tell`` is called with one line of text on which columns select segments, or why some do not.

    Raises:
        ManifestError: a cell that is not a time.
    """
    say = tell or (lambda _: None)
    names = {re.sub(r"[\s_-]", "", str(name).lower()): str(name) for name in reversed(table.columns)}
    found = next(((names[a], names[b], unit, False) for a, b, unit in _MARKS if a in names and b in names), None)
    found = found or next(((names[a], names[b], 1.0, True) for a, b in _LENGTHS if a in names and b in names), None)
    if found is None:
        if alone := [names[name] for mark in _MARKS for name in mark[:2] if name in names and name != "offset"]:
            say(f"the column {alone[0]} alone selects no segments: they need start and end; whole recordings are read")
        return table
    start, end, unit, by_length = found
    if start != START and set(_OURS) <= set(names):
        say(f"{start} and {end} belong to predictions and select no segments; remove the column predicted to use them")
        return table
    if all(_DATE.match(str(cell).strip()) for cell in table[start]):
        say(f"{start} holds dates, not times in a recording: whole recordings are read")
        return table
    starts, ends = (
        np.array([_time(cell, unit, f"{where(row)}, column {name}") for row, cell in enumerate(table[name])])
        for name in (start, end)
    )
    if by_length:
        ends = np.nan_to_num(starts) + ends
    ends = np.where(np.isposinf(ends), np.nan, ends)
    given = int((~np.isnan(starts) | ~np.isnan(ends)).sum())
    if not given:
        return table
    say(f"{start} and {end} select a segment of the recording in {given:,} of {len(table):,} rows")
    return table.assign(**{START: starts, END: ends})


def _time(cell: object, unit: float, where: str) -> float:
    """The time in a cell, in seconds; NaN if it is empty. ``unit``: factor to seconds for a plain number."""
    import pandas as pd

    if isinstance(cell, (dt.timedelta, np.timedelta64)):
        return float(pd.Timedelta(cell).total_seconds())
    text = "" if cell is None or cell is pd.NA or cell is pd.NaT or cell != cell else str(cell).strip()
    if text.lower() in (*MISSING, "", "nat", "none"):
        return np.nan
    if re.fullmatch(r"-?\d+,\d+", text):
        text = text.replace(",", ".")
    try:
        return float(text) * unit
    except ValueError:
        pass
    if match := _CLOCK.fullmatch(text):
        hours, minutes, seconds = match.groups(default="0")
        return (int(hours) * 60 + int(minutes)) * 60 + float(seconds.replace(",", "."))
    try:
        if not re.search("[A-Za-z:]", text):
            raise ValueError(text)
        return float(pd.Timedelta(text).total_seconds())
    except ValueError as error:
        raise ManifestError(
            f"{where}: {text[:40]!r} is not a time in a recording; expected seconds (3.5) or 0 days 00:00:03.5; "
            "if the column means something else, rename it"
        ) from error


def has_segments(table: pd.DataFrame) -> bool:
    """Whether the table has segment columns."""
    return START in table.columns and END in table.columns


def bounds(table: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Start and end of each row in its recording, in seconds, (n,) each; 0 and infinity for whole recordings."""
    import pandas as pd

    if not has_segments(table):
        return np.zeros(len(table)), np.full(len(table), np.inf)
    starts, ends = (pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64) for name in (START, END))
    return np.where(np.isnan(starts), 0.0, starts), np.where(np.isnan(ends), np.inf, ends)


def source_at(speech: str, start_s: float, end_s: float) -> AudioSource:
    """The source of a row for ``pipeline.audio``: ``files.source_of``, or a segment of it; times as from ``bounds``."""
    return source_of(speech) if (start_s, end_s) == WHOLE else Segment(source_of(speech), start_s, end_s)


def place_of(table: pd.DataFrame) -> pd.Series:
    """(path, start, end) of each row (n,), as a key to compare rows."""
    import pandas as pd

    return pd.Series(list(zip(table["speech"], *bounds(table), strict=True)), index=table.index, dtype=object)


def ids(table: pd.DataFrame) -> pd.Series:
    """The id of each row (n,): its file's stem, followed by the times of a segment."""
    import pandas as pd

    stems = [Path(str(path)).stem for path in table["speech"]]
    suffixes = [
        "" if (start, end) == WHOLE else f" ({_short(start)}-{_short(end) if end < np.inf else ''} s)"
        for start, end in zip(*bounds(table), strict=True)
    ]
    names = [stem + suffix for stem, suffix in zip(stems, suffixes, strict=True)]
    return pd.Series(names, index=table.index, dtype=object)


def _short(seconds: float) -> str:
    return f"{round(float(seconds), 3):.12g}"


def shares_sound(table: pd.DataFrame, other: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether each row of the table overlaps any row of the other in the same recording, (n,).

    Recordings are compared by ``recordings_of``; rows of unknown recordings overlap nothing.
    """
    import pandas as pd

    found = np.zeros(len(table), dtype=bool)
    ours, theirs = pd.Series(recordings_of(table)), pd.Series(recordings_of(other))
    (starts, ends), (first, last) = bounds(table), bounds(other)
    there = theirs.groupby(theirs).indices
    for name, rows in ours.groupby(ours).indices.items():
        if name and name in there:
            at = there[name]
            shared = np.minimum(ends[rows, None], last[at]) - np.maximum(starts[rows, None], first[at])
            found[rows] = (shared > _MARGIN_S).any(axis=1)
    return found


def recordings_of(table: pd.DataFrame) -> list[str]:
    """The content hash of each row's whole recording (n,); "" if it is not known."""
    import pandas as pd

    hashes = table.get(HASH_COLUMN, pd.Series("", index=table.index)).fillna("").astype(str)
    whole = table.get(RECORDING_HASH, pd.Series("", index=table.index)).fillna("").astype(str)
    return list(whole.where(whole != "", hashes))


def stretches(table: pd.DataFrame) -> list[tuple[str, int]]:
    """(recording, number) of each row (n,); equal for rows of a recording that overlap directly or through others."""
    import pandas as pd

    starts, ends = bounds(table)
    names = recordings_of(table)
    found: list[tuple[str, int]] = [("", 0)] * len(table)
    for name, positions in pd.Series(names).groupby(names).indices.items():
        rows = np.asarray(positions)
        number, reached = 0, -np.inf
        for row in rows[np.lexsort((ends[rows], starts[rows]))]:
            if starts[row] >= reached - _MARGIN_S:
                number += 1
            reached = max(reached, ends[row])
            found[row] = str(name), number
    return found


def joined(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """A group name per row (n,), shared by rows that are linked by equal entries in ``names`` or ``others``."""
    leader: dict[tuple[int, str], tuple[int, str]] = {}

    def lead(name: tuple[int, str]) -> tuple[int, str]:
        while (above := leader.setdefault(name, name)) != name:
            name = above
        return name

    for name, other in zip(names, others, strict=True):
        leader[lead((1, other))] = lead((0, name))
    return [lead((0, name))[1] for name in names]
