"""The record of a known corpus: facts about it, and a function that reads its file names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath


@dataclass(frozen=True)
class Told:
    """Facts about a recording, read from its file name."""

    code: str  # the name that the corpus gives the recording, the same for all its copies
    label: str  # class name
    speaker: str  # with the corpus' family in front, for example `RAVDESS_07`
    sex: str = ""
    intensity: str = ""
    statement: str = ""
    repetition: str = ""
    more: str = ""  # the rest of the file name after the code, for example `_angry` or ` (1)`


@dataclass(frozen=True)
class Corpus:
    """A known corpus; `ser manifest` leaves out its `left_out` classes and `broken` recordings."""

    name: str  # as in the column `corpus` of a manifest
    title: str  # the name shown to people
    family: str  # corpora of one family share their speakers
    citation: str  # this, source and licence: for model cards
    source: str  # a URL
    licence: str
    summary: str  # who says what, a clause for model cards
    example: str  # a typical file name
    read: Callable[[PurePath], Told | None]  # None if the name is not of this corpus
    left_out: tuple[str, ...] = ()  # classes that no model of this project has
    broken: Mapping[str, str] = field(default_factory=dict)  # code -> defect of that recording
    speakers_file: str = ""  # a table of the speakers, in the audio's folder or any folder above it
    sexes: Callable[[Path], Mapping[str, str]] | None = None  # reads that table: speaker -> sex
    tried: bool = False  # whether the reader was tested on the corpus' real files, not only on its description


def code_pattern(code: str, flags: int = re.IGNORECASE) -> re.Pattern[str]:
    """A pattern to ``search`` a file stem for a code, which may have additions from copying before or after it.

    The text after the code is the group ``more``.

    >>> [bool(code_pattern(r"a-1").search(stem)) for stem in ("a-1", "Copy of a-1", "a-1_16k", "a-1 (1)", "a-1-02")]
    [True, True, True, True, False]
    """
    return re.compile(rf"(?:^|(?<=[ _.(])){code}(?P<more>$|[ _.()].*|-(?!\d\d).*)", flags | re.DOTALL)
