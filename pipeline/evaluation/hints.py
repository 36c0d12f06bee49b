"""What looks wrong with the evaluation itself: permuted labels, repeated rows, classes without recordings."""

from __future__ import annotations

import shlex

import numpy as np

from pipeline.evaluation.outcomes import Outcomes

MIN_RECORDINGS = 30
MIN_GAIN = 0.20
MIN_PERMUTED_ACCURACY = 0.50


def hints(found: Outcomes) -> list[str]:
    """One sentence for each thing that a reader should know before the figures."""
    support = found.counts.sum(axis=1)
    absent = [label for label, n in zip(found.labels, support, strict=True) if n == 0]
    sentences = []
    if int((support > 0).sum()) == 1:
        only = found.labels[int(support.argmax())]
        sentences.append(f"All recordings are {only}: the figures say nothing of the other classes.")
    elif absent:
        sentences.append(f"No recordings of {', '.join(absent)}: not in the averages over classes (n/a).")
    if "speech" in found.table.columns and (repeated := int(found.table["speech"].duplicated().sum())):
        rows = "1 row names" if repeated == 1 else f"{repeated} rows name"
        sentences.append(f"{rows} a recording that an earlier row names already; each row counts.")
    permuted = permutation_hint(found)
    return [*sentences, *([permuted] if permuted else [])]


def permutation_hint(found: Outcomes) -> str | None:
    """A sentence when renaming the given labels one-to-one would explain most mistakes; else None.

    The best renaming is the assignment that maximises the diagonal (Kuhn-Munkres). It is reported when it
    lifts accuracy by at least 20 points to at least 50 %: chance does not do that on 30 recordings or more.
    """
    square = found.counts[:, :-1]
    total = int(square.sum())
    if total < MIN_RECORDINGS:
        return None
    most = float(square.max(axis=1).sum()) / total  # of no renaming is more right
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
        "Check the order behind integer labels, or the names in the CSV."
    )
