"""What a reader of a corpus is: its facts, and a function that reads its file names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath


@dataclass(frozen=True)
class Told:
    """What the name of a file tells of its recording.

    Attributes:
        code: the recording's own name, the same for all its copies.
        label: class name.
        speaker: prefixed by the corpus' family, as ``RAVDESS_07``.
        more: what stands in the name behind the code, as in ``..._angry`` or ``... (1)``.
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
        name: of the corpus, as in the column ``corpus`` of a manifest.
        title: of the corpus, for people.
        family: corpora of one family have the same speakers.
        citation, source, licence: for model cards. ``source`` is a URL.
        heard: who says what, a sentence's subject and verb, for model cards.
        example: a file name as the corpus has it.
        read: what a path tells; None when its name is of another form.
        left_out: classes that are no emotion which models here are trained for.
        broken: code -> what is wrong with that recording, which is left out.
        speakers_file: a table that may lie beside the audio or above it, and tells more of the speakers.
        sexes: reads that table: speaker -> sex.
        tried: whether the reader was tried on the corpus' own audio, or only on its published description.
    """

    name: str
    title: str
    family: str
    citation: str
    source: str
    licence: str
    heard: str
    example: str
    read: Callable[[PurePath], Told | None]
    left_out: tuple[str, ...] = ()
    broken: Mapping[str, str] = field(default_factory=dict)
    speakers_file: str = ""
    sexes: Callable[[Path], Mapping[str, str]] | None = None
    tried: bool = False


def code_pattern(code: str, flags: int = re.IGNORECASE) -> re.Pattern[str]:
    """A pattern to ``search`` a file stem with: the code alone, or set off from what copying added around it.

    What stands behind the code is the group ``more``.

    >>> [bool(code_pattern(r"a-1").search(stem)) for stem in ("a-1", "Copy of a-1", "a-1_16k", "a-1 (1)", "a-1-02")]
    [True, True, True, True, False]
    """
    return re.compile(rf"(?:^|(?<=[ _.(])){code}(?P<more>$|[ _.()].*|-(?!\d\d).*)", flags | re.DOTALL)
