"""Divides a manifest into training, inner validation and test parts; also content hashes and the leak check.

Rows are sorted by file stem before any random choice, so a split does not depend on folders or formats. Recordings
with the same content (decoded samples, rate, channels) go to the same part: scikit-learn's ``StratifiedShuffleSplit``
splits groups of equal content.

Evaluation protocols as folds, each with a training, an inner validation and a test part:
``holdout`` is one split of ``split_table``. ``kfold`` is stratified k-fold over recordings: each is tested once, by a
model trained on other recordings of the same speakers. ``speaker_kfold``, ``loso`` (leave one speaker out) and
``loco`` (leave one family of corpora out) test on speakers that are not in the training parts. Folds are scikit-learn's
``StratifiedKFold`` and ``StratifiedGroupKFold``, one per speaker (``loso``) or family (``loco``), or given by a table.
With several families, ``speaker_kfold`` gives each fold its share of every family's speakers.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.audio.load import AudioError, content_hash
from pipeline.data.corpora import family_of
from pipeline.data.corpora.voices import voices
from pipeline.data.manifest import ManifestError
from pipeline.data.segments import HASH_COLUMN as HASH_COLUMN
from pipeline.data.segments import (
    RECORDING_HASH,
    WHOLE,
    bounds,
    has_segments,
    ids,
    joined,
    shares_sound,
    source_at,
    stretches,
)

SPLITS = ("train", "inner_val", "test")


def by_stem(table: pd.DataFrame) -> pd.DataFrame:
    """The table sorted by file stem, then label, path, and segment; with a new index."""
    stems = [Path(str(p)).stem for p in table["speech"]]
    places = list(zip(*bounds(table), strict=True))
    order = sorted(
        range(len(table)),
        key=lambda i: (stems[i], str(table["label"].iloc[i]), str(table["speech"].iloc[i]), places[i]),
    )
    return table.iloc[order].reset_index(drop=True)


def split_table(
    table: pd.DataFrame,
    *,
    test_size: float = 0.2,
    inner_val: float = 0.2,
    by: str = "random",
    seed: int = 42,
) -> dict[str, pd.DataFrame]:
    """Split a labelled manifest into ``train``, ``inner_val`` and ``test``.

    Args:
        test_size: share of all recordings (or speakers) held out for the one final test.
        inner_val: share of the rest for choosing epochs and settings; 0 leaves that part empty.
        by: ``random`` (stratified by class) or ``speaker`` (no speaker in two parts).

    A ``split`` column with the cells train, inner_val (or val, valid, validation, dev) and test is used as given. If it
    has no inner_val rows, these are drawn from its train rows. With ``inner_val`` 0, its inner_val rows become train.

    Raises:
        ManifestError: too few recordings of a class, no speaker column, an unknown name in the split column, or, by
            ``speaker``, a speaker in two parts of a given split.
    """
    table = by_stem(table)
    if "split" in table.columns and table["split"].astype(str).str.strip().any():
        return _given_split(table, inner_val, by, seed)
    rest, test = divide(table, test_size, by, seed, "test")
    train, inner = divide(rest, inner_val, by, seed, "inner validation")
    return {"train": train, "inner_val": inner, "test": test}


def _given_split(table: pd.DataFrame, inner_val: float, by: str, seed: int) -> dict[str, pd.DataFrame]:
    aliases = {"val": "inner_val", "valid": "inner_val", "validation": "inner_val", "dev": "inner_val"}
    names = table["split"].astype(str).str.strip().str.lower().replace(aliases)
    unknown = sorted(set(names) - set(SPLITS))
    if unknown:
        raise ManifestError(f"the split column holds {unknown}; expected train, inner_val and test")
    parts = {name: table[names == name].reset_index(drop=True) for name in SPLITS}
    if parts["train"].empty:
        raise ManifestError("the split column names no train recordings; expected train, inner_val and test")
    if inner_val == 0:
        parts["train"] = by_stem(pd.concat([parts["train"], parts["inner_val"]]))
        parts["inner_val"] = parts["inner_val"].iloc[:0]
    elif parts["inner_val"].empty:
        parts["train"], parts["inner_val"] = divide(parts["train"], inner_val, by, seed, "inner validation")
    if by == "speaker":
        _refuse_shared_speakers(parts)
    return parts


def _refuse_shared_speakers(parts: Mapping[str, pd.DataFrame]) -> None:
    table = pd.concat([part.assign(split=name) for name, part in parts.items()])
    _require_speakers(table)
    for speaker, names in table.groupby("speaker")["split"].unique().items():
        if len(names) > 1:
            raise ManifestError(
                f"the given split has speaker {speaker} in the {names[0]} and the {names[1]} part; "
                "put each speaker into one part, or leave --split speaker out"
            )


def divide(table: pd.DataFrame, share: float, by: str, seed: int, what: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(the rest, the held-out ``share``) of ``table``; ``what`` names the held-out part in messages.

    Raises:
        ManifestError: a share below 0 or from 1 on, or too few recordings or speakers for it.
    """
    if not 0 <= share < 1:
        raise ManifestError(f"the share of the {what} part must be at least 0 and below 1, got {share}")
    if share == 0:
        return table, table.iloc[:0].copy()
    held = _held_speakers(table, share, seed, what) if by == "speaker" else _held_stratified(table, share, seed, what)
    return table[~held].reset_index(drop=True), table[held].reset_index(drop=True)


def _held_stratified(table: pd.DataFrame, share: float, seed: int, what: str) -> np.ndarray:
    from sklearn.model_selection import StratifiedShuffleSplit  # takes seconds to import; few commands need it

    unit = units_of(table)
    first = ~pd.Series(unit).duplicated().to_numpy()
    units, labels = unit[first], table["label"].to_numpy()[first]
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=share, random_state=seed)
    try:
        _, chosen = next(splitter.split(np.zeros((len(units), 1)), labels.astype(str)))
    except ValueError as error:
        raise ManifestError(f"cannot hold out {share:.0%} for the {what} part: {error}; add recordings") from error
    return np.isin(unit, units[chosen])


def units_of(table: pd.DataFrame) -> np.ndarray:
    """A group name for each row (n,); rows of one group must go into the same part.

    Rows with the same content hash form a group; a row without hash is its own group. Overlapping segments of one
    recording are in one group, and so are copies of a segment.
    """
    hashes = table[HASH_COLUMN] if HASH_COLUMN in table.columns else pd.Series("", index=table.index)
    names = [h if isinstance(h, str) and h else f"row {i}" for i, h in enumerate(hashes)]
    if has_segments(table):
        places = zip(stretches(table), names, strict=True)
        names = joined(names, [str(place) if place[0] else name for place, name in places])
    return np.array(names)


def has_speakers(table: pd.DataFrame) -> bool:
    """Whether every row names its speaker."""
    return "speaker" in table.columns and bool(table["speaker"].fillna("").astype(str).str.strip().ne("").all())


def _require_speakers(table: pd.DataFrame) -> None:
    if not has_speakers(table):
        raise ManifestError("a split by speaker needs a speaker for every recording; add the column speaker")


def _held_speakers(table: pd.DataFrame, share: float, seed: int, what: str) -> np.ndarray:
    _require_speakers(table)
    speakers = sorted(set(table["speaker"].astype(str)))
    count = max(1, round(share * len(speakers)))
    if count >= len(speakers):
        raise ManifestError(
            f"cannot hold out {share:.0%} of {len(speakers)} speakers for the {what} part; add speakers"
        )
    chosen = np.random.default_rng(seed).permutation(speakers)[:count]
    return table["speaker"].astype(str).isin(chosen).to_numpy()


def add_hashes(table: pd.DataFrame, *, known: pd.Series | None = None, threads: int = 2) -> pd.DataFrame:
    """The table with ``content_hash``: sha256 of the decoded recording or segment, "" if it cannot be read.

    A table with segments also gets ``recording_hash``, that of the whole recording.

    ``known``: hashes of the rows, from ``features.store.known_hashes``; only rows with "" are decoded.
    """
    hashes = [""] * len(table) if known is None else list(known)
    places = list(zip(table["speech"], *bounds(table), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda place, digest: digest or _hash_or_empty(*place), places, hashes))
        table = table.assign(**{HASH_COLUMN: found})
        if not has_segments(table):
            return table
        known_whole = {path: digest for (path, *place), digest in zip(places, found, strict=True) if place == [*WHOLE]}
        others = [path for path in dict.fromkeys(table["speech"]) if path not in known_whole]
        known_whole |= zip(others, pool.map(_hash_or_empty, others), strict=True)
        return table.assign(**{RECORDING_HASH: [known_whole[path] for path in table["speech"]]})


def _hash_or_empty(path: str, *place: float) -> str:
    try:
        return content_hash(source_at(path, *(place or WHOLE)))
    except AudioError:
        return ""


def unknown_content(table: pd.DataFrame) -> str | None:
    """A warning about recordings without ``content_hash``; None if all have one."""
    unknown = table.loc[table[HASH_COLUMN] == "", "speech"]
    if unknown.empty:
        return None
    return (
        f"{len(unknown)} of {len(table)} recordings cannot be read any more, first {unknown.iloc[0]}: copies of one "
        "recording may be in different parts, and the parts may differ from those of other runs"
    )


def duplicates_in(table: pd.DataFrame) -> list[list[str]]:
    """Paths of recordings with equal content, one list per group; needs ``content_hash``."""
    known = table[table[HASH_COLUMN] != ""]
    groups = known.groupby(HASH_COLUMN)["speech"].agg(list)
    return [paths for paths in groups if len(paths) > 1]


def check_disjoint(parts: Mapping[str, pd.DataFrame]) -> None:
    """Refuse parts that share a recording or overlapping segments, compared by content, or by path without hashes.

    Raises:
        ManifestError: with one shared recording and both parts.
    """
    table = pd.concat([part.assign(_part=name) for name, part in parts.items()], ignore_index=True)
    owner: dict[str, tuple[str, str]] = {}
    rows = zip(table["speech"], table["_part"], units_of(table), *bounds(table), strict=True)
    for row, (path, part, unit, start_s, end_s) in enumerate(rows):
        key = f"{path} {start_s} {end_s}" if unit == f"row {row}" else unit
        other, other_path = owner.setdefault(key, (part, str(path)))
        if other != part:
            raise ManifestError(
                f"the same recording is in the {other} and the {part} part ({other_path}, {path}); "
                "remove one of the two, or put both into one part"
            )


def used_in_training(training: pd.DataFrame) -> pd.DataFrame:
    """The ``training`` rows of a bundle that were used to train it or to choose its epoch and settings."""
    return training[training["split"] != "test"] if "split" in training.columns else training


def leaked(table: pd.DataFrame, training: pd.DataFrame) -> pd.Series:
    """True for each row whose recording, or an overlapping part of it, a bundle was trained or chosen on.

    Recordings are compared by content (``content_hash``), or by file stem if the hash of either side is unknown.
    """
    if HASH_COLUMN not in training.columns or training.empty:
        return pd.Series(False, index=table.index)
    used = used_in_training(training)
    found = table[HASH_COLUMN].isin(set(used[HASH_COLUMN]) - {""})
    if has_segments(table) or has_segments(used):
        found |= shares_sound(table, used)
    if "speech" in table.columns and "id" in used.columns:
        for names in (ids(table), table["speech"].map(lambda path: Path(str(path)).stem)):
            found |= names.isin(used.loc[used[HASH_COLUMN] == "", "id"])
            found |= (table[HASH_COLUMN] == "") & names.isin(used["id"])
    return found


UNSEEN_SPEAKERS = ("speaker_kfold", "loso", "loco")
PROTOCOLS = ("holdout", "kfold", *UNSEEN_SPEAKERS)
TAKE = ("speaker", "label", "statement", "intensity")  # equal in all repetitions of one performance


@dataclass(frozen=True)
class Fold:
    """The data of one model: its training parts and its test part."""

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
        folds: for ``kfold`` and ``speaker_kfold``; ``test_size``: for ``holdout``.
        inner_val: share of each fold's training recordings (or speakers) used to choose the epoch; 0: none.
        assigned: fold of each row of ``table`` (see ``assignment``), instead of a random choice; rows without one are
            left out. Ignored by ``holdout``, ``loso`` and ``loco``.

    Raises:
        ManifestError: an unknown protocol, too few recordings or speakers, a recording in two folds, or a speaker in
            two folds of a protocol that tests on unseen speakers.
    """
    if protocol not in PROTOCOLS:
        raise ManifestError(f"unknown protocol {protocol!r}; expected one of {', '.join(PROTOCOLS)}")
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
        raise ManifestError(f"--protocol {protocol} needs at least 2 folds, the recordings give {len(names)}")
    return [_fold(table, fold_of == name, name, inner_val, by, seed) for name in names]


def _fold(table: pd.DataFrame, tested: np.ndarray, name: str, inner_val: float, by: str, seed: int) -> Fold:
    train, inner = divide(table[~tested].reset_index(drop=True), inner_val, by, seed, "inner validation")
    splits = {"train": train, "inner_val": inner, "test": table[tested].reset_index(drop=True)}
    check_disjoint(splits)
    return Fold(name, splits)


def _drawn(table: pd.DataFrame, protocol: str, folds: int, seed: int) -> np.ndarray:
    """Name of the fold in which each row is tested, (n,)."""
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
    """The family of each row's corpus (n,); "" without a corpus. Corpora of one family share their speakers."""
    if "corpus" not in table.columns:
        return pd.Series("", index=table.index)
    return table["corpus"].fillna("").astype(str).map(family_of)


def _dealt(speakers: pd.Series, families: pd.Series, folds: int, seed: int) -> np.ndarray:
    """Name of the fold of each row (n,): each family's speakers are shuffled, then assigned to the folds in turn."""
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
    """The value of ``column`` for each row of ``table``, from a CSV; NaN for rows that the CSV does not list.

    The CSV has ``column`` and one or more of ``content_hash``, ``id`` (file stem) and ``speaker``. The first of these
    that matches any row is used (hashes do not match where the audio no longer exists).

    Raises:
        ManifestError: no such file or column, a key with two different values, or a CSV that lists none of the rows.
    """
    try:
        given = pd.read_csv(csv, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ManifestError(f"cannot read {csv}: {error}") from error
    keys = {HASH_COLUMN: table.get(HASH_COLUMN), "id": ids(table)}
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
    """Number of test recordings whose speaker, and whose take (``TAKE``), is in the fold's training parts.

    A number is None if columns for it are missing.
    """
    test = fold.splits["test"]
    used = pd.concat([fold.splits["train"], fold.splits["inner_val"]])
    return {"speakers": _shared(test, used, ("speaker",)), "takes": _shared(test, used, TAKE)}


def _shared(test: pd.DataFrame, used: pd.DataFrame, columns: tuple[str, ...]) -> int | None:
    if not set(columns) <= set(test.columns) or not (has_speakers(test) and has_speakers(used)):
        return None
    known = set(used[list(columns)].astype(str).itertuples(index=False, name=None))
    return sum(row in known for row in test[list(columns)].astype(str).itertuples(index=False, name=None))
