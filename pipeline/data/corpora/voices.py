"""Who is who across corpora: speakers and corpora under their names of today, and that no two share one.

Earlier versions called RAVDESS's actors ``Actor_07`` and its corpus ``RAVDESS``; committed splits, bundles and feature
folders still do. This is the one place that knows.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import PurePosixPath

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.data.corpora import by_name, recognised
from pipeline.data.labels import RAVDESS_LABELS
from pipeline.data.tables import ManifestError

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


def corpora_of(table: pd.DataFrame) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The names in column `corpus`, sorted, and the number of each row's, (n,); one without a name without it."""
    if "corpus" not in table.columns:
        return ("",), np.zeros(len(table), np.int64)
    names, number = np.unique(table["corpus"].fillna("").astype(str).to_numpy(dtype=str), return_inverse=True)
    return tuple(map(str, names)), number.astype(np.int64)


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
