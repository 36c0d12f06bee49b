"""Evaluates predictions: metrics with intervals, breakdowns, hints and verdict, as one dict for JSON.

Figures that have a target are given twice: for the recordings with an answer, and as ``with_failed``, where the others
count as wrong. A figure that is not defined (a class without recordings, no probabilities) is None, never NaN. The
hints name problems of the evaluation itself: permuted labels, repeated rows, classes without recordings.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.segments import place_of
from pipeline.evaluation.breakdowns import breakdowns, restricted
from pipeline.evaluation.outcomes import (
    Bootstrap,
    Floats,
    Ints,
    Outcomes,
    Scores,
    bootstrap,
    brier,
    failed_rows,
    has_labels,
    in_top,
    interval,
    log_loss,
    outcomes,
    reliability,
    risk_coverage,
    scores,
    wilson,
)
from pipeline.evaluation.verdict import Targets, verdict

__all__ = ["FORMAT_VERSION", "Targets", "evaluate"]

MIN_RECORDINGS = 30
MIN_GAIN = 0.20
MIN_PERMUTED_ACCURACY = 0.50


def hints(found: Outcomes) -> list[str]:
    """One sentence for each problem that a reader should know before reading the figures."""
    support = found.counts.sum(axis=1)
    absent = [label for label, n in zip(found.labels, support, strict=True) if n == 0]
    sentences = []
    if int((support > 0).sum()) == 1:
        only = found.labels[int(support.argmax())]
        sentences.append(f"All recordings are {only}: the figures say nothing about the other classes.")
    elif absent:
        sentences.append(f"No recordings of {', '.join(absent)}: left out of the averages over classes (n/a).")
    if "speech" in found.table.columns and (repeated := int(place_of(found.table).duplicated().sum())):
        rows = "1 row names" if repeated == 1 else f"{repeated} rows name"
        sentences.append(f"{rows} a recording that an earlier row also names; each row counts.")
    permuted = permutation_hint(found)
    return [*sentences, *([permuted] if permuted else [])]


def permutation_hint(found: Outcomes) -> str | None:
    """A sentence if renaming the given labels one-to-one would correct most mistakes; else None.

    The best renaming is the assignment that maximises the diagonal (Kuhn-Munkres). It is reported if it raises the
    accuracy by at least 20 points to at least 50 %: with 30 recordings or more this does not happen by chance.
    """
    square = found.counts[:, :-1]
    total = int(square.sum())
    if total < MIN_RECORDINGS:
        return None
    most = float(square.max(axis=1).sum()) / total  # upper bound of the accuracy after any renaming
    if most - float(np.trace(square)) / total < MIN_GAIN or most < MIN_PERMUTED_ACCURACY:
        return None
    from scipy.optimize import linear_sum_assignment  # half a second of imports, for few tables

    given, meant = linear_sum_assignment(square, maximize=True)
    before, after = float(np.trace(square)) / total, float(square[given, meant].sum()) / total
    if after - before < MIN_GAIN or after < MIN_PERMUTED_ACCURACY:
        return None
    occupied = square.sum(axis=1) > 0
    pairs = ",".join(
        f"{found.labels[i]}={found.labels[j]}" for i, j in zip(given, meant, strict=True) if i != j and occupied[i]
    )
    return (
        f"The labels look permuted: accuracy is {before:.0%}, and would be {after:.0%} "
        f"with --label_map {shlex.quote(pairs)} --overwrite added to the command. "
        "Check the order of integer labels, or the names in the CSV."
    )


FORMAT_VERSION = 1
OVERALL = ("accuracy", "uar", "weighted_f1", "macro_f1")
PER_CLASS = ("recall", "precision", "f1")
_CURVE_POINTS = 101


def evaluate(
    predictions: pd.DataFrame,
    labels: Sequence[str],
    *,
    targets: Targets | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute all figures of a table of predictions.

    Args:
        predictions: columns ``status label_name predicted confidence p_<label>``, perhaps ``speaker`` and others.
        targets: targets of the verdict; by default 80, 80 and 75 %.
        resamples, seed: number of bootstrap resamples, and their random seed.

    Returns:
        Plain values; without labels only ``format_version``, ``labels``, ``labelled`` (False), ``n`` and ``answers``.

    Raises:
        LabelError: a label that is not in ``labels``.
    """
    failed = failed_rows(predictions)
    result: dict[str, Any] = {"format_version": FORMAT_VERSION, "labels": list(labels), "labelled": False}
    result["n"] = {"rows": len(predictions), "failed": int(failed.sum())}
    result["answers"] = _answers(predictions[~failed], labels)
    if not has_labels(predictions):
        return result
    found = outcomes(predictions, labels)
    result["labelled"] = True
    result["n"] |= {
        "labelled": len(found),
        "unlabelled": len(predictions) - len(found),
        "read": int(found.read.sum()),
        "labelled_failed": int((~found.read).sum()),
    }
    result |= _figures(found, resamples, seed)
    result["restricted"] = restricted(found)
    result["hints"] = hints(found)
    result["verdict"] = verdict(result, targets or Targets())
    result["breakdowns"], result["breakdowns_left_out"] = breakdowns(found)
    return result


def _figures(found: Outcomes, resamples: int, seed: int) -> dict[str, Any]:
    n_classes = len(found.labels)
    hits = _top2_hits(found)
    cell = (found.truth * (n_classes + 1) + found.answer) * 2 + (0 if hits is None else hits)
    resampled = bootstrap(found, cell, (n_classes, n_classes + 1, 2), resamples, seed)
    views = _views(resampled)
    return {
        "bootstrap": {"method": "percentile", **resampled.about},
        "overall": _overall(views)
        | {"top2_accuracy": None if hits is None else _top2(resampled)}
        | _probability_figures(found),
        "per_class": _per_class(found.labels, views, resampled.enough_speakers),
        "confusion": _confusion(found.labels, resampled.counts.sum(axis=-1)),
    } | _curves(found)


def _top2_hits(found: Outcomes) -> Ints | None:
    """1 if the true class is among the two most probable ones, (n,); 0 also for recordings that were not read."""
    if found.probabilities is None:
        return None
    hits = np.zeros(len(found), dtype=np.int64)
    hits[found.read] = in_top(found.truth[found.read], found.probabilities[found.read], 2)
    return hits


@dataclass(frozen=True)
class _View:
    """The recordings of one kind: their tally (C, C or C + 1), its metrics, and those of its resamples."""

    counts: Ints
    point: Scores
    samples: dict[str, Scores]


def _views(resampled: Bootstrap) -> dict[str, _View]:
    """``read``: the recordings with an answer; ``with_failed``: all, those without an answer count as wrong."""

    def view(columns: slice) -> _View:
        counts, *drawn = (a.sum(axis=-1)[..., columns] for a in (resampled.counts, *resampled.drawn.values()))
        return _View(counts, scores(counts), dict(zip(resampled.drawn, map(scores, drawn), strict=True)))

    return {"read": view(slice(-1)), "with_failed": view(slice(None))}


def _overall(views: dict[str, _View]) -> dict[str, Any]:
    def figure(name: str, view: _View) -> dict[str, Any]:
        support = view.counts.sum(axis=1)
        total = int(support.sum())
        n = int(support[support > 0].min(initial=total)) if name in ("uar", "macro_f1") else total  # the rarest class
        samples = {over: getattr(metrics, name) for over, metrics in view.samples.items()}
        return _figure(getattr(view.point, name), samples, n, is_share=name == "accuracy")

    return {name: figure(name, views["read"]) | {"with_failed": figure(name, views["with_failed"])} for name in OVERALL}


def _per_class(labels: Sequence[str], views: dict[str, _View], enough_speakers: Sequence[bool]) -> list[dict[str, Any]]:
    """One row of figures for each class."""

    def figure(name: str, view: _View, i: int) -> dict[str, Any]:
        samples = {
            over: getattr(metrics, name)[:, i]
            for over, metrics in view.samples.items()
            if over == "over_recordings" or enough_speakers[i]
        }
        n = view.counts.sum(axis=0 if name == "precision" else 1)[i]
        return _figure(getattr(view.point, name)[i], samples, int(n), is_share=name != "f1")

    support, everything = (views[name].counts.sum(axis=1) for name in ("read", "with_failed"))
    rows = []
    for i, label in enumerate(labels):
        row: dict[str, Any] = {"label": label, "support": int(support[i]), "failed": int((everything - support)[i])}
        row |= {name: figure(name, views["read"], i) for name in PER_CLASS}
        row["recall"]["with_failed"] = figure("recall", views["with_failed"], i)
        rows.append(row)
    return rows


def _figure(value: Floats, samples: dict[str, Floats], n: int, *, is_share: bool) -> dict[str, Any]:
    """``{"value", "over_recordings", "over_speakers"}`` of a figure on ``n`` recordings; None if undefined."""
    number = _number(value)
    found: dict[str, Any] = {"value": number, "over_recordings": None, "over_speakers": None}
    for over, array in samples.items():
        if number is None:
            continue
        if is_share and over == "over_recordings" and n:
            found[over] = list(wilson(round(number * n), n))
        elif (bounds := interval(number, array, n)) is not None:
            found[over] = list(bounds)
    return found


def _top2(resampled: Bootstrap) -> dict[str, Any]:
    def share(array: Ints) -> Floats:
        read = array[..., :-1, :]
        with np.errstate(invalid="ignore"):
            return np.asarray(read[..., 1].sum(axis=(-1, -2)) / read.sum(axis=(-1, -2, -3)))

    samples = {over: share(array) for over, array in resampled.drawn.items()}
    return _figure(share(resampled.counts), samples, int(resampled.counts[:, :-1].sum()), is_share=True)


def _probability_figures(found: Outcomes) -> dict[str, float | None]:
    seen = found.where(found.read)
    if seen.probabilities is None or seen.confidence is None or not len(seen):
        return dict.fromkeys(("log_loss", "brier", "ece", "aurc"))
    return {
        "log_loss": log_loss(seen.truth, seen.probabilities),
        "brier": brier(seen.truth, seen.probabilities),
        "ece": reliability(seen.confidence, seen.correct).ece,
        "aurc": risk_coverage(seen.confidence, seen.correct).aurc,
    }


def _curves(found: Outcomes) -> dict[str, Any]:
    """Reliability bins and the risk-coverage curve at whole per cents of coverage."""
    seen = found.where(found.read)
    if seen.confidence is None or not len(seen) or not np.isfinite(seen.confidence).all():
        return {"reliability": None, "risk_coverage": None}
    bins = reliability(seen.confidence, seen.correct)
    curve = risk_coverage(seen.confidence, seen.correct)
    at = np.unique(np.ceil(np.linspace(0, 1, _CURVE_POINTS) * len(seen)).astype(int).clip(1) - 1)
    columns = zip(bins.edges, bins.edges[1:], bins.n, bins.confidence, bins.accuracy, strict=False)
    points = zip(curve.coverage[at], curve.risk[at], curve.threshold[at], strict=True)
    return {
        "reliability": [
            {"low": float(low), "high": float(high), "n": int(n), "confidence": _number(c), "accuracy": _number(a)}
            for low, high, n, c, a in columns
        ],
        "risk_coverage": [
            {"coverage": float(coverage), "risk": float(risk), "threshold": float(threshold)}
            for coverage, risk, threshold in points
        ],
    }


def _confusion(labels: Sequence[str], counts: Ints) -> dict[str, Any]:
    square = counts[:, :-1]
    with np.errstate(invalid="ignore"):
        shares = square / square.sum(axis=1, keepdims=True)
    return {
        "labels": list(labels),
        "counts": square.tolist(),
        "failed": counts[:, -1].tolist(),
        "row_normalised": [[_number(cell) for cell in row] for row in shares],
    }


def _answers(read: pd.DataFrame, labels: Sequence[str]) -> list[dict[str, Any]]:
    """How often each class (or ``uncertain``, ``silence`` ...) was answered, with the mean confidence."""
    if "predicted" not in read.columns:
        return []
    named = read["predicted"].fillna("")
    others = sorted(set(named.astype(str).unique()) - set(labels) - {""})
    groups = read.groupby(named)
    sizes = groups.size()
    means = groups["confidence"].mean() if "confidence" in read.columns else pd.Series(dtype=float)
    return [
        {"label": name, "n": int(sizes.get(name, 0)), "confidence": _number(means.get(name, np.nan))}
        for name in [*labels, *others]
    ]


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
