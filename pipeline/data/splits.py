"""Which recordings train and which test: stratified and speaker-disjoint splits, content hashes, the leak check.

Rows are put in order of file stem before any random choice, so that a split depends on the recordings' names and the
seed alone, not on folders or formats. Recordings with the same content (decoded samples, rate, channels) are one unit:
they fall on one side together. Stratified splitting is scikit-learn's ``StratifiedShuffleSplit`` over such units.

Evaluation protocols as folds: each a training, an inner validation and a test part of one manifest.

``holdout`` is the one stratified split of ``splits.split_table``; ``kfold`` is stratified k-fold over recordings (every
recording is tested once, by a model that has heard the same speakers); ``speaker_kfold``, ``loso`` (leave one speaker
out) and ``loco`` (leave one family of corpora out) test on speakers that the model has never heard. Recordings with
the same content are one unit. Folds are scikit-learn's ``StratifiedKFold`` and ``StratifiedGroupKFold``, one a speaker
(``loso``) or a family (``loco``), or given by a table; in ``speaker_kfold`` of several families each fold gets its
share of every family's speakers.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.audio.load import AudioError, content_hash
from pipeline.data.corpora import by_name
from pipeline.data.corpora.voices import voices
from pipeline.data.manifest import ManifestError
from pipeline.data.segments import (
    HASH_COLUMN as HASH_COLUMN,
)
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
    """The table in order of file stem (then label, then path, then place in it), with a fresh index."""
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
        inner_val: share of the rest on which epochs and settings are chosen; 0 leaves that part empty.
        by: ``random`` (stratified by class) or ``speaker`` (whole speakers, no voice in two parts).
        seed: random state of both choices.

    A ``split`` column whose cells are train, inner_val (or val, validation) and test is used as it stands; where it
    names no inner_val rows, they are drawn from its train rows, and with ``inner_val`` 0 those it names join them.

    Raises:
        ManifestError: too few recordings of a class, no speaker column, an unknown name in the split column, or, by
            ``speaker``, a voice in two of its parts.
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
        _refuse_shared_voices(parts)
    return parts


def _refuse_shared_voices(parts: Mapping[str, pd.DataFrame]) -> None:
    table = pd.concat([part.assign(split=name) for name, part in parts.items()])
    _require_speakers(table)
    for speaker, names in table.groupby("speaker")["split"].unique().items():
        if len(names) > 1:
            raise ManifestError(
                f"the given split has speaker {speaker} in the {names[0]} and the {names[1]} part; "
                "put a voice into one part, or leave --split speaker out"
            )


def divide(table: pd.DataFrame, share: float, by: str, seed: int, what: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(the larger part, the held-out part) of ``table``.

    Raises:
        ManifestError: a share outside 0..1, or too few recordings or speakers for it.
    """
    if not 0 <= share < 1:
        raise ManifestError(f"the share of the {what} part must be at least 0 and below 1, got {share}")
    if share == 0:
        return table, table.iloc[:0].copy()
    held = _held_speakers(table, share, seed, what) if by == "speaker" else _held_stratified(table, share, seed, what)
    return table[~held].reset_index(drop=True), table[held].reset_index(drop=True)


def _held_stratified(table: pd.DataFrame, share: float, seed: int, what: str) -> np.ndarray:
    from sklearn.model_selection import StratifiedShuffleSplit  # takes seconds to import; most commands draw no split

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
    """What must stay together, a name a row: the content hash, or the row itself where there is none.

    Segments that overlap stay together, too, and so do copies of one.
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
    """The table with ``content_hash``: sha256 of the decoded recording or segment, empty where it cannot be read.

    A table with segments gets ``recording_hash``, too: that of the whole recording.

    Args:
        known: hashes of the rows, as ``shard_folder.known_hashes`` finds them; only where empty is a recording decoded.
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
    """What to say when recordings to be split have no ``content_hash``; None when all have one."""
    unknown = table.loc[table[HASH_COLUMN] == "", "speech"]
    if unknown.empty:
        return None
    return (
        f"{len(unknown)} of {len(table)} recordings cannot be read any more, as {unknown.iloc[0]}: copies of one "
        "recording may fall into different parts, and the parts may differ from those of other runs"
    )


def duplicates_in(table: pd.DataFrame) -> list[list[str]]:
    """Paths of recordings that share their content, a list a group; needs ``content_hash``."""
    known = table[table[HASH_COLUMN] != ""]
    groups = known.groupby(HASH_COLUMN)["speech"].agg(list)
    return [paths for paths in groups if len(paths) > 1]


def check_disjoint(parts: Mapping[str, pd.DataFrame]) -> None:
    """Refuse splits of which two hold the same recording, or sound of it (by content, or by path without hashes).

    Raises:
        ManifestError: names one recording and both parts.
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
    """The ``training`` rows of a bundle that it has learnt from or was chosen by."""
    return training[training["split"] != "test"] if "split" in training.columns else training


def leaked(table: pd.DataFrame, training: pd.DataFrame) -> pd.Series:
    """True for each row that a bundle's ``training`` rows hold as well.

    Recordings are compared by content (``content_hash``); where that of either side is unknown, by file stem. A row
    that shares a part of a recording with one of ``training`` counts: a segment of it, or the whole of it.
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
    """How many test recordings have their speaker, and their very take (``TAKE``), in the fold's training parts."""
    test = fold.splits["test"]
    heard = pd.concat([fold.splits["train"], fold.splits["inner_val"]])
    return {"speakers": _shared(test, heard, ("speaker",)), "takes": _shared(test, heard, TAKE)}


def _shared(test: pd.DataFrame, heard: pd.DataFrame, columns: tuple[str, ...]) -> int | None:
    if not set(columns) <= set(test.columns) or not (has_speakers(test) and has_speakers(heard)):
        return None
    known = set(heard[list(columns)].astype(str).itertuples(index=False, name=None))
    return sum(row in known for row in test[list(columns)].astype(str).itertuples(index=False, name=None))
