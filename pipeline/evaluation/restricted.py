"""Figures where the data has fewer classes than the model: all answers, and answers among the classes that are there.

A corpus without calm and surprised counts every such answer as wrong, though its listeners were never asked for them.
So two figures are given: of the open answer (the most probable of all classes, what the model says in use), and of the
answer restricted to the classes that the recording's corpus has. The open one comes first. Limits: which classes a
corpus has is taken from the labelled recordings given here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.measures import Ints, scores, tally
from pipeline.evaluation.outcomes import Outcomes

FIGURES = ("accuracy", "uar", "weighted_f1")


def restricted(found: Outcomes) -> dict[str, Any] | None:
    """Open and restricted figures, of all recordings that were read and of each corpus (column ``corpus``).

    Returns:
        ``{"missing": [class, ...], "all": row, "corpora": [row, ...], "mean": row}``; a row is ``{"corpus", "n",
        "classes", "open", "restricted"}``, its figures shares of 1. ``corpora`` is empty and ``mean`` None for a single
        corpus. None where every corpus has every class and there is one corpus, or where there are no probabilities.
    """
    read = found.where(found.read)
    if read.probabilities is None or not len(read):
        return None
    names, corpus_of = _corpora(read.table)
    present = np.zeros((len(names), len(read.labels)), bool)
    present[corpus_of, read.truth] = True
    anywhere = np.asarray(present.any(axis=0))
    if len(names) == 1 and present.all():
        return None
    inside = np.where(present[corpus_of], read.probabilities, -np.inf).argmax(axis=1).astype(np.int64)
    rows = []
    for number, name in enumerate(names):
        of_it = corpus_of == number
        rows.append(_row(name, read, inside, of_it, present[number]))
    several = len(names) > 1
    return {
        "missing": [label for label, there in zip(read.labels, anywhere, strict=True) if not there],
        "all": _row("", read, inside, np.ones(len(read), bool), anywhere),
        "corpora": rows if several else [],
        "mean": {kind: _mean([row[kind] for row in rows]) for kind in ("open", "restricted")} if several else None,
    }


def _corpora(table: pd.DataFrame) -> tuple[list[str], Ints]:
    if "corpus" not in table.columns:
        return [""], np.zeros(len(table), np.int64)
    names, number = np.unique(table["corpus"].fillna("").astype(str).to_numpy(dtype=str), return_inverse=True)
    return list(map(str, names)), number.astype(np.int64)


def _row(name: str, read: Outcomes, inside: Ints, rows: np.ndarray, present: np.ndarray) -> dict[str, Any]:
    truth, n_classes = read.truth[rows], len(read.labels)
    return {
        "corpus": name,
        "n": int(rows.sum()),
        "classes": [label for label, there in zip(read.labels, present, strict=True) if there],
        "open": _figures(tally(truth, read.answer[rows], n_classes)),
        "restricted": _figures(tally(truth, inside[rows], n_classes)),
    }


def _figures(counts: Ints) -> dict[str, float]:
    point = scores(counts)
    return {name: float(getattr(point, name)) for name in FIGURES}


def _mean(rows: list[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in FIGURES}
