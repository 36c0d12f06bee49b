"""The record of a known corpus: facts about it, and a function that reads its file names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath


@dataclass(frozen=True)
class Told:
    """Facts about a recording, read from its file name.

    Attributes:
        code: the name that the corpus gives the recording, the same for all its copies.
        label: class name.
        speaker: with the corpus' family in front, for example ``RAVDESS_07``.
        more: the rest of the file name after the code, for example ``_angry`` or `` (1)``.
    """

    code: str
    label: str
    speaker: str
    sex: str = ""
    intensity: str = ""
    statement: str = ""
    repetition: str = ""
    more: str = ""


@dataclass(frozen=True)
class Corpus:
    """A known corpus.

    Attributes:
        name: as in the column ``corpus`` of a manifest.
        title: the name shown to people.
        family: corpora of one family share their speakers.
        citation, source, licence: for model cards. ``source`` is a URL.
        summary: who says what, a clause for model cards ("ten actors speak ten German sentences").
        example: a typical file name of the corpus.
        read: path -> facts from the file name; None if the name is not of this corpus.
        left_out: classes of the corpus that no model of this project has; ``ser manifest`` leaves them out by default.
        broken: code -> defect of that recording, which is left out.
        speakers_file: name of a table of the speakers, in the audio's folder or any folder above it.
        sexes: reads that table: speaker -> sex.
        tried: True if the reader was tested on the corpus' real files, False if only on its description.
    """

    name: str
    title: str
    family: str
    citation: str
    source: str
    licence: str
    summary: str
    example: str
    read: Callable[[PurePath], Told | None]
    left_out: tuple[str, ...] = ()
    broken: Mapping[str, str] = field(default_factory=dict)
    speakers_file: str = ""
    sexes: Callable[[Path], Mapping[str, str]] | None = None
    tried: bool = False


def code_pattern(code: str, flags: int = re.IGNORECASE) -> re.Pattern[str]:
    """A pattern to ``search`` a file stem for a code, which may have additions from copying before or after it.

    The text after the code is the group ``more``.

    >>> [bool(code_pattern(r"a-1").search(stem)) for stem in ("a-1", "Copy of a-1", "a-1_16k", "a-1 (1)", "a-1-02")]
    [True, True, True, True, False]
    """
    return re.compile(rf"(?:^|(?<=[ _.(])){code}(?P<more>$|[ _.()].*|-(?!\d\d).*)", flags | re.DOTALL)
