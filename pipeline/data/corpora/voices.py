"""Current names of speakers and corpora, and checks that two corpora do not use one speaker name.

Earlier versions called RAVDESS's actors ``Actor_07`` and its corpus ``RAVDESS``; committed splits, bundles and feature
folders still do. Only this module and ``corpora._EARLIER`` know the old names.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import PurePosixPath

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.data.corpora import by_name, family_of, recognised
from pipeline.data.labels import RAVDESS_LABELS
from pipeline.data.tables import ManifestError

_ACTOR = re.compile(r"Actor_(0[1-9]|1\d|2[0-4])")


def voice(speaker: str) -> str:
    """The current name of a speaker.

    >>> voice("Actor_07"), voice("RAVDESS_07"), voice("Actor_99")
    ('RAVDESS_07', 'RAVDESS_07', 'Actor_99')
    """
    match = _ACTOR.fullmatch(speaker)
    return f"RAVDESS_{match[1]}" if match else speaker


def voices(cells: pd.Series) -> pd.Series:
    """``voice`` of each cell (n,); missing cells become ""."""
    return cells.fillna("").astype(str).map(voice)


def renewed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with current names in ``corpus`` and ``speaker``, in rows whose corpus was renamed."""
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
    """Whether each cell (n,) is neither missing nor blank."""
    return cells.notna() & (cells.astype(str).str.strip() != "")


def with_speakers(table: pd.DataFrame) -> pd.DataFrame:
    """The table with speakers from the file names, if it has none and every file name is of a known corpus."""
    if "speech" not in table.columns or ("speaker" in table.columns and given(table["speaker"]).any()):
        return table
    speakers = []
    for path in table["speech"]:
        if (found := recognised(_pure(path))) is None:
            return table
        speakers.append(found[1].speaker)
    return table.assign(speaker=speakers)


def with_corpora(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column ``corpus``, recognised from each recording's name (column ``id``); "" if unknown."""
    found = [recognised(_pure(f"{stem}.wav")) for stem in table["id"]]
    return table.assign(corpus=[known[0].name if known else "" for known in found])


def corpora_of(table: pd.DataFrame) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The sorted names in column ``corpus``, and each row's index into them (n,); one name "" without that column."""
    if "corpus" not in table.columns:
        return ("",), np.zeros(len(table), np.int64)
    names, number = np.unique(table["corpus"].fillna("").astype(str).to_numpy(dtype=str), return_inverse=True)
    return tuple(map(str, names)), number.astype(np.int64)


def _pure(path: object) -> PurePosixPath:
    return PurePosixPath(str(path).replace("\\", "/"))


def check_corpora(table: pd.DataFrame, classes: Collection[str] = ()) -> None:
    """Check a table of several corpora; ``classes`` are accepted in addition to the known emotions.

    Raises:
        ManifestError: a speaker name in two families; or a corpus without any class that is known or that another
            corpus has too.
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
                "translate them with --label_map given=wanted, or leave the corpus out"
            )


def _refuse_shared_names(corpora: pd.Series, speakers: pd.Series) -> None:
    pairs = pd.DataFrame({"speaker": voices(speakers), "family": corpora.map(family_of)}).drop_duplicates()
    shared = pairs[pairs["speaker"].duplicated(keep=False)].sort_values(["speaker", "family"])
    if len(shared):
        name = shared["speaker"].iloc[0]
        both = shared.loc[shared["speaker"] == name, "family"].tolist()
        raise ManifestError(
            f"speaker {name} is in {both[0]} and in {both[1]} and would count as one person; put the corpus "
            f"before the name: {both[0]}_{name} and {both[1]}_{name}"
        )
