"""Evaluates predictions: metrics with intervals, breakdowns, hints and verdict, as one dict for JSON.

The formulas and the bootstrap are in ``outcomes``, the targets in ``verdict``. Figures that have a target are given
twice: for the recordings with an answer, and as ``with_failed``, where the others count as wrong. A figure that is not
defined is None, never NaN (a class without recordings, or no probabilities).

The hints name problems of the evaluation itself: permuted labels, repeated rows, classes without recordings.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.segments import place_of
from pipeline.evaluation.breakdowns import breakdowns, restricted
from pipeline.evaluation.outcomes import (
    LEVEL,
    MIN_SPEAKERS,
    Floats,
    Ints,
    Outcomes,
    Scores,
    brier,
    failed_rows,
    has_labels,
    in_top,
    interval,
    log_loss,
    outcomes,
    reliability,
    resample_groups,
    resample_recordings,
    risk_coverage,
    scores,
    wilson,
)
from pipeline.evaluation.verdict import Targets, verdict

__all__ = ["FORMAT_VERSION", "Targets", "evaluate", "speaker_groups"]


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
        labels: class names in index order.
        targets: targets of the verdict; by default 80, 80 and 75 %.
        resamples: number of bootstrap resamples.
        seed: random seed of the bootstrap.

    Returns:
        A dict of plain Python values; if there are no labels, only ``format_version``, ``labels``, ``labelled``
        (False), ``n`` and ``answers``.

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
    rng = np.random.default_rng(seed)
    result["labelled"] = True
    result["n"] |= {
        "labelled": len(found),
        "unlabelled": len(predictions) - len(found),
        "read": int(found.read.sum()),
        "labelled_failed": int((~found.read).sum()),
    }
    result |= _figures(found, resamples, seed, rng)
    result["restricted"] = restricted(found)
    result["hints"] = hints(found)
    result["verdict"] = verdict(result, targets or Targets())
    result["breakdowns"], result["breakdowns_left_out"] = breakdowns(found)
    return result


def _figures(found: Outcomes, resamples: int, seed: int, rng: np.random.Generator) -> dict[str, Any]:
    n_classes = len(found.labels)
    hits = _top2_hits(found)
    shape = (n_classes, n_classes + 1, 2)
    cell = (found.truth * (n_classes + 1) + found.answer) * 2 + (0 if hits is None else hits)
    counts = np.bincount(cell, minlength=int(np.prod(shape))).reshape(shape).astype(np.int64)
    drawn = {"recordings": resample_recordings(counts, resamples, rng)}
    speakers, note = speaker_groups(found.table)
    if speakers is not None:
        drawn["speakers"] = resample_groups(speakers, cell, shape, resamples, rng)
    speaker_counts = None if speakers is None else [len(set(speakers[found.truth == i])) for i in range(n_classes)]
    overall = _overall(counts, drawn)
    overall["top2_accuracy"] = None if hits is None else _top2(counts, drawn)
    return {
        "bootstrap": {
            "method": "percentile",
            "level": LEVEL,
            "resamples": resamples,
            "seed": seed,
            "speakers": None if speakers is None else int(speakers.max()) + 1,
            "speakers_note": note,
        },
        "overall": overall | _probability_figures(found),
        "per_class": _per_class(found.labels, counts, drawn, speaker_counts),
        "confusion": _confusion(found.labels, counts.sum(axis=-1)),
    } | _curves(found)


def _top2_hits(found: Outcomes) -> Ints | None:
    """1 if the true class is among the two most probable ones, (n,); 0 also for recordings that were not read."""
    if found.probabilities is None:
        return None
    hits = np.zeros(len(found), dtype=np.int64)
    hits[found.read] = in_top(found.truth[found.read], found.probabilities[found.read], 2)
    return hits


def speaker_groups(table: pd.DataFrame) -> tuple[Ints | None, str | None]:
    """Speaker index of each row, ``(n,)``, and None; or None and the reason why there is no interval over speakers."""
    if "speaker" not in table.columns:
        return None, "no speaker column"
    named = table["speaker"].notna() & (table["speaker"].astype(str).str.strip() != "")
    codes, names = pd.factorize(table["speaker"].where(named))
    if (codes < 0).any():
        return None, f"recordings without a speaker: {int((codes < 0).sum())}"
    if len(names) < MIN_SPEAKERS:
        return None, f"too few: {len(names)} speakers, at least {MIN_SPEAKERS} are needed"
    return codes.astype(np.int64), None


def _views(array: Ints) -> dict[str, Scores]:
    """Scores of tallies ``(..., C, C + 1, 2)``: of the recordings read, and with the failed ones counted as wrong."""
    answered = array.sum(axis=-1)
    return {"read": scores(answered[..., :-1]), "with_failed": scores(answered)}


def _overall(counts: Ints, drawn: dict[str, Ints]) -> dict[str, Any]:
    point, samples = _views(counts), {over: _views(array) for over, array in drawn.items()}
    support = {"read": counts[:, :-1].sum(axis=(1, 2)), "with_failed": counts.sum(axis=(1, 2))}
    rarest = {view: int(n[n > 0].min(initial=n.sum())) for view, n in support.items()}

    def figure(name: str, view: str) -> dict[str, Any]:
        resampled = {over: getattr(s[view], name) for over, s in samples.items()}
        n = rarest[view] if name in ("uar", "macro_f1") else int(support[view].sum())
        return _figure(getattr(point[view], name), resampled, n, is_share=name == "accuracy")

    return {name: figure(name, "read") | {"with_failed": figure(name, "with_failed")} for name in OVERALL}


def _per_class(
    labels: Sequence[str], counts: Ints, drawn: dict[str, Ints], speaker_counts: Sequence[int] | None
) -> list[dict[str, Any]]:
    """One row of figures for each class.

    ``speaker_counts``: number of speakers of each class; with too few there is no interval over speakers.
    """
    point, samples = _views(counts), {over: _views(array) for over, array in drawn.items()}
    support = {"read": counts[:, :-1].sum(axis=(1, 2)), "with_failed": counts.sum(axis=(1, 2))}

    answered = {"read": counts[:, :-1].sum(axis=(0, 2)), "with_failed": counts[:, :-1].sum(axis=(0, 2))}

    def figure(name: str, view: str, i: int) -> dict[str, Any]:
        few = speaker_counts is not None and speaker_counts[i] < MIN_SPEAKERS
        resampled = {
            over: getattr(s[view], name)[:, i] for over, s in samples.items() if not (few and over == "speakers")
        }
        n = answered[view][i] if name == "precision" else support[view][i]
        return _figure(getattr(point[view], name)[i], resampled, int(n), is_share=name != "f1")

    rows = []
    for i, label in enumerate(labels):
        row: dict[str, Any] = {"label": label, "support": int(support["read"][i])}
        row["failed"] = int(support["with_failed"][i] - support["read"][i])
        for name in PER_CLASS:
            row[name] = figure(name, "read", i)
        row["recall"]["with_failed"] = figure("recall", "with_failed", i)
        rows.append(row)
    return rows


def _figure(value: Floats, samples: dict[str, Floats], n: int, *, is_share: bool) -> dict[str, Any]:
    """``{"value", "over_recordings", "over_speakers"}`` of a figure on ``n`` recordings; None if undefined."""
    number = _number(value)
    found: dict[str, Any] = {"value": number, "over_recordings": None, "over_speakers": None}
    for over, array in samples.items():
        if number is not None and is_share and over == "recordings" and n:
            bounds: tuple[float, float] | None = wilson(round(number * n), n)
        else:
            bounds = None if number is None else interval(number, array, n)
        found[f"over_{over}"] = None if bounds is None else list(bounds)
    return found


def _top2(counts: Ints, drawn: dict[str, Ints]) -> dict[str, Any]:
    def share(array: Ints) -> Floats:
        read = array[..., :-1, :]
        with np.errstate(invalid="ignore"):
            return np.asarray(read[..., 1].sum(axis=(-1, -2)) / read.sum(axis=(-1, -2, -3)))

    resampled = {over: share(array) for over, array in drawn.items()}
    return _figure(share(counts), resampled, int(counts[:, :-1].sum()), is_share=True)


def _probability_figures(found: Outcomes) -> dict[str, float | None]:
    names = ("log_loss", "brier", "ece", "aurc")
    seen = found.where(found.read)
    if seen.probabilities is None or seen.confidence is None or not len(seen):
        return dict.fromkeys(names)
    ece = reliability(seen.confidence, seen.correct).ece
    aurc = risk_coverage(seen.confidence, seen.correct).aurc
    values = (log_loss(seen.truth, seen.probabilities), brier(seen.truth, seen.probabilities), ece, aurc)
    return dict(zip(names, values, strict=True))


def _curves(found: Outcomes) -> dict[str, Any]:
    """Reliability bins and the risk-coverage curve at whole per cents of coverage."""
    seen = found.where(found.read)
    if seen.confidence is None or not len(seen) or not np.isfinite(seen.confidence).all():
        return {"reliability": None, "risk_coverage": None}
    bins = reliability(seen.confidence, seen.correct)
    curve = risk_coverage(seen.confidence, seen.correct)
    at = np.unique(np.ceil(np.linspace(0, 1, _CURVE_POINTS) * len(seen)).astype(int).clip(1) - 1)
    return {
        "reliability": [
            {
                "low": float(bins.edges[i]),
                "high": float(bins.edges[i + 1]),
                "n": int(bins.n[i]),
                "confidence": _number(bins.confidence[i]),
                "accuracy": _number(bins.accuracy[i]),
            }
            for i in range(len(bins.n))
        ],
        "risk_coverage": [
            {
                "coverage": float(curve.coverage[i]),
                "risk": float(curve.risk[i]),
                "threshold": float(curve.threshold[i]),
            }
            for i in at
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
