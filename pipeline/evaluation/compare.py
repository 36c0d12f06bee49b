"""Compares two sets of answers to the same recordings: differences with bootstrap intervals, and McNemar's test.

The bootstrap draws recordings (or speakers) with both answers together, so that a recording's difficulty cancels out.
McNemar's exact test (1947) asks whether the recordings that only one of the two gets right are split evenly between
them. Recordings that got no emotion as answer count as wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.segments import place_of
from pipeline.evaluation.outcomes import (
    LEVEL,
    Bootstrap,
    Floats,
    Outcomes,
    bootstrap,
    has_labels,
    outcomes,
    percentile_interval,
    scores,
)
from pipeline.storage.errors import SerError

FORMAT_VERSION = 1
OVERALL = {"accuracy": "accuracy", "UAR": "uar", "weighted F1": "weighted_f1", "macro F1": "macro_f1"}


def compare(
    first: pd.DataFrame,
    second: pd.DataFrame,
    labels: Sequence[str],
    *,
    names: tuple[str, str] = ("A", "B"),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Differences ``second - first`` between two labelled score tables of the same recordings, in any order.

    Args:
        labels: class names in index order, of both.
        names: how to call the two in messages and reports.
        resamples, seed: number of bootstrap resamples, and their random seed.

    Raises:
        SerError: no labels, or the tables have different recordings or labels.
    """
    one, two = _paired(first, second, labels, names)
    n_classes = len(labels)
    shape = (n_classes, n_classes + 1, n_classes + 1)
    cell = (one.truth * (n_classes + 1) + one.answer) * (n_classes + 1) + two.answer
    resampled = bootstrap(one, cell, shape, resamples, seed)
    return {
        "format_version": FORMAT_VERSION,
        "names": list(names),
        "labels": list(labels),
        "n": len(one),
        "bootstrap": resampled.about,
        "figures": _figures(resampled, labels),
        "mcnemar": mcnemar(one, two),
    }


def mcnemar(one: Outcomes, two: Outcomes) -> dict[str, Any]:
    """Exact two-sided McNemar test on paired outcomes."""
    only_first = int((one.correct & ~two.correct).sum())
    only_second = int((~one.correct & two.correct).sum())
    discordant = only_first + only_second
    from scipy.stats import binomtest  # more than a second of imports, for comparisons only

    return {
        "both_right": int((one.correct & two.correct).sum()),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "both_wrong": int((~one.correct & ~two.correct).sum()),
        "p_value": float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0,
    }


def disagreements(first: pd.DataFrame, second: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """The recordings that the two answer differently: speech, label_name, first, second."""
    one, two = _paired(first, second, labels, ("A", "B"))
    words = np.array([*labels, "(not read)"], dtype=object)
    differ = one.answer != two.answer
    return pd.DataFrame(
        {
            "speech": one.table.loc[differ, "speech"].to_numpy(),
            "label_name": words[one.truth[differ]],
            "first": words[one.answer[differ]],
            "second": words[two.answer[differ]],
        }
    )


def comparison_summary(found: Mapping[str, Any]) -> str:
    """The comparison as plain text of at most 80 columns."""
    first, second = found["names"]
    over = "over_speakers" if found["bootstrap"]["speakers"] else "over_recordings"
    lines = [
        f"A  {first[:75]}",
        f"B  {second[:75]}",
        f"{found['n']} recordings; B - A in points; {LEVEL:.0%} interval {over.replace('_', ' ')}",
        "",
        f"{'':<22} {'A':>8} {'B':>8} {'B - A':>8}  interval",
    ]
    for row in found["figures"]:
        name = row["metric"] if row["label"] is None else f"recall {row['label'][:14]}"
        if row["difference"] is None:
            lines.append(f"{name:<22} {'n/a':>8} {'n/a':>8} {'n/a':>8}")
            continue
        low, high = row[over] or row["over_recordings"]
        lines.append(
            f"{name:<22} {row['first'] * 100:8.1f} {row['second'] * 100:8.1f} {row['difference'] * 100:+8.1f}"
            f"  [{low * 100:+.1f}, {high * 100:+.1f}]"
        )
    if over == "over_speakers" and any(row["over_recordings"] and not row[over] for row in found["figures"]):
        lines.append("Classes of few speakers: interval over recordings.")
    test = found["mcnemar"]
    lines += [
        "",
        f"right: both {test['both_right']}, only A {test['only_first_right']}, only B {test['only_second_right']}, "
        f"neither {test['both_wrong']}",
        f"McNemar's exact test: p = {test['p_value']:.3g}",
    ]
    return "\n".join(lines)


def _paired(
    first: pd.DataFrame, second: pd.DataFrame, labels: Sequence[str], names: tuple[str, str]
) -> tuple[Outcomes, Outcomes]:
    """Both tables as outcomes, with rows matched by path; the k-th row of a path matches the k-th row of it."""
    for name, table in zip(names, (first, second), strict=True):
        if not has_labels(table):
            raise SerError(f"{name} has no labels, so it cannot be compared; score a CSV with a label column")
    one, two = outcomes(first, labels), outcomes(second, labels)
    places = [place_of(o.table) for o in (one, two)]
    keys = [pd.MultiIndex.from_arrays([place, place.groupby(place).cumcount()]) for place in places]
    order = keys[1].get_indexer(keys[0])
    if len(one) != len(two) or (order < 0).any():
        missing = int((order < 0).sum())
        raise SerError(
            f"{names[0]} has {len(one)} labelled recordings, {names[1]} {len(two)}, and {missing} of the first are not "
            "in the second; score the same CSV with both"
        )
    two = two.where(order)
    if (one.truth != two.truth).any():
        row = int((one.truth != two.truth).argmax())
        raise SerError(
            f"{one.table['speech'].iloc[row]} is {labels[one.truth[row]]} in {names[0]} and "
            f"{labels[two.truth[row]]} in {names[1]}; score the same CSV with both"
        )
    return one, two


def _figures(found: Bootstrap, labels: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each metric, then one for the recall of each class."""
    point = (scores(found.counts.sum(axis=2)), scores(found.counts.sum(axis=1)))
    samples = {over: (scores(array.sum(axis=3)), scores(array.sum(axis=2))) for over, array in found.drawn.items()}
    rows = []
    for metric, field in OVERALL.items():
        drawn = {over: getattr(b, field) - getattr(a, field) for over, (a, b) in samples.items()}
        rows.append(_row(metric, None, getattr(point[0], field), getattr(point[1], field), drawn))
    for i, label in enumerate(labels):
        drawn = {
            over: b.recall[:, i] - a.recall[:, i]
            for over, (a, b) in samples.items()
            if over == "over_recordings" or found.enough_speakers[i]
        }
        rows.append(_row("recall", label, point[0].recall[i], point[1].recall[i], drawn))
    return rows


def _row(metric: str, label: str | None, first: Floats, second: Floats, drawn: Mapping[str, Floats]) -> dict[str, Any]:
    row: dict[str, Any] = {"metric": metric, "label": label, "first": None, "second": None, "difference": None}
    row |= {"over_recordings": None, "over_speakers": None}
    if np.isfinite(first):
        row |= {"first": float(first), "second": float(second), "difference": float(second - first)}
        bounds = {over: percentile_interval(array) for over, array in drawn.items()}
        row |= {over: list(found) for over, found in bounds.items() if found is not None}
    return row
