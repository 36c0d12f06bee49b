"""Made-up tables of scores for tests: the columns that scoring writes, from a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.data.labels import RAVDESS_LABELS

LABELS = RAVDESS_LABELS


def made_predictions(
    n: int = 120,
    labels: Sequence[str] = LABELS,
    *,
    accuracy: float = 0.8,
    failed: int = 0,
    speakers: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """``n`` rows; each class and speaker about equally often, the last ``failed`` rows unreadable."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(n) % len(labels))
    meant = np.where(rng.random(n) < accuracy, truth, rng.integers(0, len(labels), n))
    logits = rng.normal(size=(n, len(labels)))
    logits[np.arange(n), meant] = logits.max(axis=1) + rng.gamma(1.5, 1.5, n)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    names = np.array(labels, dtype=object)
    speaker = rng.permutation(np.arange(n) % max(speakers, 1)) + 1
    table = pd.DataFrame(
        {
            "speech": [f"/audio/{i:05d}.wav" for i in range(n)],
            "label": names[truth],
            "speaker": [f"Actor_{s:02d}" for s in speaker],
            "sex": np.where(speaker % 2 == 0, "female", "male"),
            "status": "ok",
            "error": None,
            "label_name": names[truth],
            "predicted": names[p.argmax(axis=1)],
            "confidence": p.max(axis=1),
        }
    )
    for i, label in enumerate(labels):
        table[f"p_{label}"] = p[:, i]
    table["duration_s"] = rng.uniform(1, 5, n)
    if failed:
        table = with_failed(table, range(n - failed, n))
    return table if speakers else table.drop(columns="speaker")


def with_failed(table: pd.DataFrame, rows: Sequence[int] | range) -> pd.DataFrame:
    """The table with these rows as scoring writes recordings that it cannot read."""
    table = table.copy()
    table.loc[list(rows), "status"] = "truncated"
    table.loc[list(rows), "error"] = "ends after 0.3 of 3.7 s"
    table.loc[list(rows), "predicted"] = None
    numbers = [name for name in table.columns if name.startswith("p_") or name in ("confidence", "duration_s")]
    table.loc[list(rows), numbers] = np.nan
    return table
