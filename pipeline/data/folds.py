"""Evaluation protocols as folds: each a training, an inner validation and a test part of one manifest.

``holdout`` is the one stratified split of ``splits.split_table``; ``kfold`` is stratified k-fold over recordings (every
recording is tested once, by a model that has heard the same speakers); ``speaker_kfold``, ``loso`` (leave one speaker
out) and ``loco`` (leave one family of corpora out) test on speakers that the model has never heard. Recordings with
the same content are one unit. Folds are scikit-learn's ``StratifiedKFold`` and ``StratifiedGroupKFold``, one a speaker
(``loso``) or a family (``loco``), or given by a table; in ``speaker_kfold`` of several families each fold gets its
share of every family's speakers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.data.corpora import by_name
from pipeline.data.corpora.voices import voices
from pipeline.data.manifest import ManifestError
from pipeline.data.splits import HASH_COLUMN, by_stem, check_disjoint, divide, has_speakers, split_table, units_of

UNSEEN_SPEAKERS = ("speaker_kfold", "loso", "loco")
PROTOCOLS = ("holdout", "kfold", *UNSEEN_SPEAKERS)
TAKE = ("speaker", "label", "statement", "intensity")  # what two repetitions of one performance share


@dataclass(frozen=True)
class Fold:
    """One model to train, and what it is tested on."""

    name: str
    splits: dict[str, pd.DataFrame]  # train, inner_val, test


def folds_of(
    table: pd.DataFrame,
    protocol: str,
    *,
    folds: int = 5,
    test_size: float = 0.2,
    inner_val: float = 0.2,
    seed: int = 42,
    assigned: pd.Series | None = None,
) -> list[Fold]:
    """The folds of a labelled manifest.

    Args:
        folds: how many, for ``kfold`` and ``speaker_kfold``.
        test_size: share held out, for ``holdout``.
        inner_val: share of each fold's training recordings (or speakers) that chooses the epoch; 0: none.
        assigned: fold of each row of ``table`` (see ``assignment``), instead of a random choice; rows without one are
            left out.

    Raises:
        ManifestError: an unknown protocol, too few recordings or speakers, or a speaker or recording in two folds that
            must not be.
    """
    if protocol not in PROTOCOLS:
        raise ManifestError(f"unknown protocol {protocol!r}; choose of {', '.join(PROTOCOLS)}")
    unseen = protocol in UNSEEN_SPEAKERS
    if unseen and not has_speakers(table):
        raise ManifestError(f"--protocol {protocol} needs a speaker for every recording; add the column speaker")
    by = "speaker" if unseen else "random"
    if protocol == "holdout":
        splits = split_table(table, test_size=test_size, inner_val=inner_val, by=by, seed=seed)
        check_disjoint(splits)
        return [Fold("1", splits)]
    if assigned is not None and protocol not in ("loso", "loco"):
        table = by_stem(table.assign(_fold=assigned).dropna(subset=["_fold"]))
        fold_of = table.pop("_fold").astype(str).to_numpy()
    else:
        table = by_stem(table)
        fold_of = _drawn(table, protocol, folds, seed)
    if unseen:
        _refuse_split_speakers(table, fold_of)
    names = sorted(set(fold_of), key=lambda name: (len(name), name))
    if len(names) < 2:
        raise ManifestError(f"--protocol {protocol} needs at least 2 folds, the recordings make {len(names)}")
    return [_fold(table, fold_of == name, name, inner_val, by, seed) for name in names]


def _fold(table: pd.DataFrame, tested: np.ndarray, name: str, inner_val: float, by: str, seed: int) -> Fold:
    train, inner = divide(table[~tested].reset_index(drop=True), inner_val, by, seed, "inner validation")
    splits = {"train": train, "inner_val": inner, "test": table[tested].reset_index(drop=True)}
    check_disjoint(splits)
    return Fold(name, splits)


def _drawn(table: pd.DataFrame, protocol: str, folds: int, seed: int) -> np.ndarray:
    """Name of the fold that each row is tested in."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # takes seconds to import

    if protocol == "loso":
        return table["speaker"].astype(str).to_numpy()
    families = families_of(table)
    if protocol == "loco":
        return families.to_numpy()
    if protocol == "speaker_kfold" and families.nunique() > 1:
        return _dealt(table["speaker"].astype(str), families, folds, seed)
    unit = units_of(table)
    first = ~pd.Series(unit).duplicated().to_numpy()
    units, labels = unit[first], table["label"].astype(str).to_numpy()[first]
    groups = table["speaker"].astype(str).to_numpy()[first] if protocol == "speaker_kfold" else None
    rarest = len(set(groups)) if groups is not None else int(pd.Series(labels).value_counts().min())
    if not 2 <= folds <= rarest:
        what = "speakers" if groups is not None else "recordings of the rarest class"
        raise ManifestError(f"--folds {folds} with {rarest} {what}; expected 2 to {rarest}")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = kind(n_splits=folds, shuffle=True, random_state=seed)
    fold_of_unit: dict[str, str] = {}
    for number, (_, tested) in enumerate(splitter.split(np.zeros((len(units), 1)), labels, groups), start=1):
        fold_of_unit |= dict.fromkeys(units[tested], str(number))
    return np.array([fold_of_unit[name] for name in unit])


def families_of(table: pd.DataFrame) -> pd.Series:
    """The family of each row's corpus (n,), whose corpora share their speakers; empty where no corpus is given."""
    if "corpus" not in table.columns:
        return pd.Series("", index=table.index)
    names = table["corpus"].fillna("").astype(str)
    return names.map(lambda name: corpus.family if (corpus := by_name(name)) and corpus.family else name)


def _dealt(speakers: pd.Series, families: pd.Series, folds: int, seed: int) -> np.ndarray:
    """Name of the fold of each row (n,): every family's speakers, shuffled, are dealt out to the folds in turn."""
    number: dict[str, str] = {}
    dealt = 0
    for family in sorted(set(families)):
        own = sorted(set(speakers[families == family]))
        if not 2 <= folds <= len(own):
            raise ManifestError(
                f"--folds {folds} with {len(own)} speakers of {family or 'no corpus'}; expected 2 to {len(own)}"
            )
        for speaker in np.random.default_rng(seed).permutation(own):
            number[str(speaker)] = str(dealt % folds + 1)
            dealt += 1
    return speakers.map(number).to_numpy()


def _refuse_split_speakers(table: pd.DataFrame, fold_of: np.ndarray) -> None:
    for speaker, group in pd.Series(fold_of).groupby(table["speaker"].astype(str).to_numpy()):
        if group.nunique() > 1:
            raise ManifestError(f"speaker {speaker} is in the folds {', '.join(sorted(set(group)))}; expected one")


def assignment(table: pd.DataFrame, csv: Path, column: str) -> pd.Series:
    """The cell of ``column`` that a committed CSV gives to each row of ``table``, NaN for rows it does not name.

    The CSV has ``column`` and one of ``content_hash``, ``id`` (file stem) or ``speaker``; the first of them that names
    any of the rows decides (contents are unknown where the audio is gone).

    Raises:
        ManifestError: no such file or column, a key given twice with different cells, or no row that it names.
    """
    try:
        given = pd.read_csv(csv, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ManifestError(f"cannot read {csv}: {error}") from error
    keys = {HASH_COLUMN: table.get(HASH_COLUMN), "id": table["speech"].map(lambda p: Path(str(p)).stem)}
    if "speaker" in table.columns:
        keys["speaker"] = voices(table["speaker"])
    if "speaker" in given.columns:
        given["speaker"] = voices(given["speaker"])
    shared = [name for name in keys if name in given.columns and keys[name] is not None]
    if column not in given.columns or not shared:
        raise ManifestError(f"{csv} has the columns {list(given.columns)}; expected {column} and content_hash or id")
    for key in shared:
        pairs = given.loc[given[key] != "", [key, column]].drop_duplicates()
        if pairs[key].duplicated().any():
            raise ManifestError(
                f"{csv} gives {pairs.loc[pairs[key].duplicated(), key].iloc[0]} two different {column}s"
            )
        found = pd.Series(keys[key], index=table.index).map(dict(zip(pairs[key], pairs[column], strict=True)))
        if found.notna().any():
            return found
    raise ManifestError(f"none of the {len(table)} recordings is named in {csv} (by {', '.join(shared)})")


def sharing(fold: Fold) -> dict[str, int | None]:
    """How many test recordings have their speaker, and their very take (``TAKE``), in the fold's training parts."""
    test = fold.splits["test"]
    heard = pd.concat([fold.splits["train"], fold.splits["inner_val"]])
    return {"speakers": _shared(test, heard, ("speaker",)), "takes": _shared(test, heard, TAKE)}


def _shared(test: pd.DataFrame, heard: pd.DataFrame, columns: tuple[str, ...]) -> int | None:
    if not set(columns) <= set(test.columns) or not (has_speakers(test) and has_speakers(heard)):
        return None
    known = set(heard[list(columns)].astype(str).itertuples(index=False, name=None))
    return sum(row in known for row in test[list(columns)].astype(str).itertuples(index=False, name=None))
