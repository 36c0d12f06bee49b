"""Which recordings train and which test: stratified and speaker-disjoint splits, content hashes, the leak check.

Rows are put in order of file stem before any random choice, so that a split depends on the recordings' names and the
seed alone, not on folders or formats. Recordings with the same content (decoded samples, rate, channels) are one unit:
they fall on one side together. Stratified splitting is scikit-learn's ``StratifiedShuffleSplit`` over such units.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.audio.load import AudioError, content_hash
from pipeline.data.manifest import ManifestError
from pipeline.storage.remote import source_of

SPLITS = ("train", "inner_val", "test")
HASH_COLUMN = "content_hash"


def by_stem(table: pd.DataFrame) -> pd.DataFrame:
    """The table in order of file stem (then label, then path), with a fresh index."""
    stems = [Path(str(p)).stem for p in table["speech"]]
    order = sorted(
        range(len(table)), key=lambda i: (stems[i], str(table["label"].iloc[i]), str(table["speech"].iloc[i]))
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
    """What must stay together, a name a row: the content hash, or the row itself where there is none."""
    hashes = table[HASH_COLUMN] if HASH_COLUMN in table.columns else pd.Series("", index=table.index)
    return np.array([h if isinstance(h, str) and h else f"row {i}" for i, h in enumerate(hashes)])


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
    """The table with ``content_hash``: sha256 of the decoded recording, empty where it cannot be read.

    Args:
        known: hashes of the rows, as ``shard_folder.known_hashes`` finds them; only where empty is a recording decoded.
    """
    hashes = [""] * len(table) if known is None else list(known)
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda path, digest: digest or _hash_or_empty(path), table["speech"], hashes)
        return table.assign(**{HASH_COLUMN: list(found)})


def _hash_or_empty(path: str) -> str:
    try:
        return content_hash(source_of(path))
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
    """Refuse splits of which two hold the same recording (by content, or by path without hashes).

    Raises:
        ManifestError: names one recording and both parts.
    """
    owner: dict[str, tuple[str, str]] = {}
    for name, part in parts.items():
        hashes = part[HASH_COLUMN] if HASH_COLUMN in part.columns else [""] * len(part)
        for path, digest in zip(part["speech"], hashes, strict=True):
            key = str(digest or path)
            other, other_path = owner.setdefault(key, (name, str(path)))
            if other != name:
                raise ManifestError(
                    f"the same recording is in the {other} and the {name} part ({other_path}, {path}); "
                    "remove one of the two, or put both into one part"
                )


def used_in_training(training: pd.DataFrame) -> pd.DataFrame:
    """The ``training`` rows of a bundle that it has learnt from or was chosen by."""
    return training[training["split"] != "test"] if "split" in training.columns else training


def leaked(table: pd.DataFrame, training: pd.DataFrame) -> pd.Series:
    """True for each row that a bundle's ``training`` rows hold as well.

    Recordings are compared by content (``content_hash``); where that of either side is unknown, by file stem.
    """
    if HASH_COLUMN not in training.columns or training.empty:
        return pd.Series(False, index=table.index)
    used = used_in_training(training)
    found = table[HASH_COLUMN].isin(set(used[HASH_COLUMN]) - {""})
    if "speech" in table.columns and "id" in used.columns:
        stems = table["speech"].map(lambda path: Path(str(path)).stem)
        found |= stems.isin(used.loc[used[HASH_COLUMN] == "", "id"])
        found |= (table[HASH_COLUMN] == "") & stems.isin(used["id"])
    return found
