"""Whether recordings to be evaluated were used in training, and what the figures are without them.

Recordings are compared by content (``splits.content_hash``), so that renaming or another lossless format hides nothing.
A re-encoded, cut or resampled copy is another content and is not found. Training recordings whose content the bundle
does not know (it was trained on features, without the audio) are compared by file name. Recordings of the bundle's
``test`` part were not used; those of ``inner_val`` were, to choose the epoch.
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
from pipeline.evaluation.outcomes import Outcomes, has_labels, outcomes, scores

SHOWN = 20


@dataclass(frozen=True)
class Leaks:
    """What a manifest shares with a bundle's training.

    Attributes:
        mask: rows whose recording was used in training, (n,).
        shared_speakers: speakers of the manifest who were heard in training, sorted.
        duplicates: groups of paths in the manifest that have the same content.
        note: why nothing could be compared; None when it could.
        unread: rows without content, which cannot be read.
        by_name: training recordings that could be compared by name only.
        partly: rows of ``mask`` of which another stretch was used: a segment of them, or what they are a segment of.
    """

    mask: NDArray[np.bool_]
    shared_speakers: tuple[str, ...]
    duplicates: tuple[tuple[str, ...], ...]
    note: str | None = None
    unread: int = 0
    by_name: int = 0
    partly: int = 0


def find(
    manifest: pd.DataFrame, training: pd.DataFrame, *, contents: pd.DataFrame | None = None, threads: int = 2
) -> Leaks:
    """Compare the recordings of ``manifest`` (column ``speech``) with ``bundle.training``.

    Every recording is read, unless ``contents`` are known: what ``splits.add_hashes`` made of the manifest. What a
    table of others calls ``content_hash`` is not heeded. Unreadable recordings have no content and are never reported.
    """
    hashed = add_hashes(manifest, threads=threads) if contents is None else contents
    groups = (tuple(dict.fromkeys(group)) for group in duplicates_in(hashed))  # a path that occurs twice is no copy
    duplicates = tuple(group for group in groups if len(group) > 1)
    if HASH_COLUMN not in training.columns or training.empty:
        note = "The bundle does not list the recordings it was trained on: what it has heard cannot be told."
        return Leaks(np.zeros(len(manifest), dtype=bool), (), duplicates, note)
    read = (hashed[HASH_COLUMN] != "").to_numpy(dtype=bool)
    mask = leaked(hashed, training).to_numpy(dtype=bool) & read
    whole = {RECORDING_HASH: "", START: "", END: ""}  # as if nothing were a segment: what is left is the very same
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
    """JSON-able account for the report; ``predictions`` has the manifest's rows in its order."""
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
        unseen = predictions[~leaks.mask]
        found["unseen"] = _figures(outcomes(unseen, labels))
    return found


def _figures(found: Outcomes) -> dict[str, Any]:
    """Counted as in the verdict: what could not be read is wrong."""
    if not len(found):
        return {"n": 0, "accuracy": None, "uar": None, "weighted_f1": None}
    point = scores(found.counts)
    return {
        "n": len(found),
        "accuracy": float(point.accuracy),
        "uar": float(point.uar),
        "weighted_f1": float(point.weighted_f1),
    }


def _shared_speakers(manifest: pd.DataFrame, training: pd.DataFrame) -> tuple[str, ...]:
    manifest, used = with_speakers(manifest), with_speakers(used_in_training(training).rename(columns={"id": "speech"}))
    if "speaker" not in manifest.columns or "speaker" not in used.columns:
        return ()
    return tuple(sorted((set(voices(used["speaker"])) - {""}) & set(voices(manifest["speaker"]))))
