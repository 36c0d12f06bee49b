"""Leak check: finds recordings of an evaluation that were used in training, and gives the figures without them.

Recordings are compared by content (``splits.content_hash``): a renamed or losslessly converted copy is found, a
re-encoded, cut or resampled one is not. Training recordings without a content hash are compared by file name.
Recordings of the bundle's ``test`` part do not count as used; those of ``inner_val`` do, as they chose the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.data.corpora.voices import voices, with_speakers
from pipeline.data.segments import END, RECORDING_HASH, START
from pipeline.data.splits import HASH_COLUMN, add_hashes, duplicates_in, leaked, used_in_training
from pipeline.evaluation.outcomes import Outcomes, has_labels, outcomes, shares

SHOWN = 20


@dataclass(frozen=True)
class Leaks:
    """The overlap of a manifest with a bundle's training."""

    mask: NDArray[np.bool_]  # (n,) rows whose recording was used in training
    shared_speakers: tuple[str, ...]  # speakers of the manifest who were also in training, sorted
    duplicates: tuple[tuple[str, ...], ...]  # groups of paths in the manifest with the same content
    note: str | None = None  # why nothing could be compared
    unread: int = 0  # rows that cannot be read and so have no content hash
    by_name: int = 0  # training recordings that could be compared only by name
    partly: int = 0  # rows of mask that share only a part with training, as one is a segment of the other


def find(
    manifest: pd.DataFrame, training: pd.DataFrame, *, contents: pd.DataFrame | None = None, threads: int = 2
) -> Leaks:
    """Compare the recordings of ``manifest`` (column ``speech``) with ``bundle.training``.

    Every recording is read to compute its hash, unless ``contents`` (the manifest after ``splits.add_hashes``) is
    given. A column ``content_hash`` of the manifest itself is ignored. Unreadable recordings are never reported.
    """
    hashed = add_hashes(manifest, threads=threads) if contents is None else contents
    groups = (tuple(dict.fromkeys(group)) for group in duplicates_in(hashed))  # a path that occurs twice is no copy
    duplicates = tuple(group for group in groups if len(group) > 1)
    if HASH_COLUMN not in training.columns or training.empty:
        note = "The bundle has no list of its training recordings, so that no leak can be found."
        return Leaks(np.zeros(len(manifest), dtype=bool), (), duplicates, note)
    read = (hashed[HASH_COLUMN] != "").to_numpy(dtype=bool)
    mask = leaked(hashed, training).to_numpy(dtype=bool) & read
    whole = {RECORDING_HASH: "", START: "", END: ""}  # ignore segments: only identical recordings match
    same = leaked(hashed.assign(**whole), training.assign(**whole)).to_numpy(dtype=bool)
    return Leaks(
        mask=mask,
        partly=int((mask & ~same).sum()),
        shared_speakers=_shared_speakers(manifest, training),
        duplicates=duplicates,
        unread=int((~read).sum()),
        by_name=int((used_in_training(training)[HASH_COLUMN] == "").sum()),
    )


def describe(leaks: Leaks, predictions: pd.DataFrame, labels: Sequence[str]) -> dict[str, Any]:
    """The result as plain values for the report; ``predictions`` has the manifest's rows in the same order."""
    found: dict[str, Any] = {
        "note": leaks.note,
        "checked": len(predictions) - leaks.unread if leaks.note is None else 0,
        "by_name": leaks.by_name,
        "leaked": int(leaks.mask.sum()),
        "partly": leaks.partly,
        "recordings": predictions.loc[leaks.mask, "speech"].head(SHOWN).astype(str).tolist(),
        "duplicates": [list(group) for group in leaks.duplicates[:SHOWN]],
        "duplicate_groups": len(leaks.duplicates),
        "shared_speakers": list(leaks.shared_speakers[:SHOWN]),
        "more_shared_speakers": max(0, len(leaks.shared_speakers) - SHOWN),
        "all": None,
        "unseen": None,
    }
    if found["leaked"] and has_labels(predictions):
        found["all"] = _figures(outcomes(predictions, labels))
        found["unseen"] = _figures(outcomes(predictions[~leaks.mask], labels))
    return found


def _figures(found: Outcomes) -> dict[str, Any]:
    """Figures as in the verdict: recordings that got no emotion as answer count as wrong."""
    if not len(found):
        return {"n": 0, "accuracy": None, "uar": None, "weighted_f1": None}
    return {"n": len(found), **shares(found.counts)}


def _shared_speakers(manifest: pd.DataFrame, training: pd.DataFrame) -> tuple[str, ...]:
    manifest, used = with_speakers(manifest), with_speakers(used_in_training(training).rename(columns={"id": "speech"}))
    if "speaker" not in manifest.columns or "speaker" not in used.columns:
        return ()
    return tuple(sorted((set(voices(used["speaker"])) - {""}) & set(voices(manifest["speaker"]))))
