"""What a reader of a corpus is: its facts, and a function that reads its file names.

Who is who across corpora: speakers and corpora under their names of today, and that no two share one.

Earlier versions called RAVDESS's actors ``Actor_07`` and its corpus ``RAVDESS``; committed splits, bundles and feature
folders still do. This is the one place that knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath

import pandas as pd

from pipeline.data.corpora import by_name, recognised
from pipeline.data.labels import RAVDESS_LABELS
from pipeline.data.tables import ManifestError


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


_ACTOR = re.compile(r"Actor_(0[1-9]|1\d|2[0-4])")


def voice(speaker: str) -> str:
    """The name of today for a speaker, to compare by.

    >>> voice("Actor_07"), voice("RAVDESS_07"), voice("Actor_99")
    ('RAVDESS_07', 'RAVDESS_07', 'Actor_99')
    """
    match = _ACTOR.fullmatch(speaker)
    return f"RAVDESS_{match[1]}" if match else speaker


def voices(cells: pd.Series) -> pd.Series:
    """``voice`` of each cell (n,); an empty one stays so, as text."""
    return cells.fillna("").astype(str).map(voice)


def renewed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the names of today in ``corpus`` and ``speaker``, where the corpus is one that was renamed."""
    if "corpus" not in table.columns:
        return table
    corpora = table["corpus"].map(lambda name: corpus.name if (corpus := by_name(str(name))) else name)
    old = (corpora != table["corpus"]) & table["corpus"].notna()
    if not old.any():
        return table
    found = table.assign(corpus=corpora)
    if "speaker" in found.columns:
        found["speaker"] = found["speaker"].mask(old, voices(found["speaker"]))
    return found


def given(cells: pd.Series) -> pd.Series:
    """Whether each cell (n,) says anything."""
    return cells.notna() & (cells.astype(str).str.strip() != "")


def with_speakers(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column ``speaker``, where it has none or an empty one and every file's name tells it."""
    if "speech" not in table.columns or ("speaker" in table.columns and given(table["speaker"]).any()):
        return table
    speakers = []
    for path in table["speech"]:
        if (found := recognised(_pure(path))) is None:
            return table
        speakers.append(found[1].speaker)
    return table.assign(speaker=speakers)


def with_corpora(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the ``corpus`` that each recording's name (column ``id``) is of, empty where it is of none."""
    found = [recognised(_pure(f"{stem}.wav")) for stem in table["id"]]
    return table.assign(corpus=[known[0].name if known else "" for known in found])


def _pure(path: object) -> PurePosixPath:
    return PurePosixPath(str(path).replace("\\", "/"))


def check_corpora(table: pd.DataFrame, classes: Collection[str] = ()) -> None:
    """Refuse what cannot be meant in a table of several corpora; ``classes`` are known beside the emotions.

    Raises:
        ManifestError: one speaker's name in two families, or a corpus none of whose classes is an emotion or another
            corpus' too.
    """
    if "corpus" not in table.columns:
        return
    named = table[given(table["corpus"])]
    corpora = named["corpus"].astype(str)
    if "speaker" in named.columns:
        _refuse_shared_names(corpora[given(named["speaker"])], named.loc[given(named["speaker"]), "speaker"])
    if "label" not in named.columns or corpora.nunique() < 2:
        return
    labels = {name: set(rows.dropna().astype(str)) - {""} for name, rows in named.groupby(corpora)["label"]}
    for name, own in labels.items():
        others = set().union(*(theirs for other, theirs in labels.items() if other != name))
        if not own & {*RAVDESS_LABELS, *classes, *others}:
            raise ManifestError(
                f"the corpus {name} has no known class: its labels are {', '.join(sorted(own)[:5])}; "
                "say what they mean with --label_map given=wanted, or leave the corpus out"
            )


def _refuse_shared_names(corpora: pd.Series, speakers: pd.Series) -> None:
    families = corpora.map(lambda name: corpus.family if (corpus := by_name(name)) and corpus.family else name)
    pairs = pd.DataFrame({"speaker": voices(speakers), "family": families}).drop_duplicates()
    shared = pairs[pairs["speaker"].duplicated(keep=False)].sort_values(["speaker", "family"])
    if len(shared):
        name = shared["speaker"].iloc[0]
        both = shared.loc[shared["speaker"] == name, "family"].tolist()
        raise ManifestError(
            f"speaker {name} is in {both[0]} and in {both[1]}, which would be taken for one voice; put the corpus "
            f"before the name, as {both[0]}_{name} and {both[1]}_{name}"
        )
