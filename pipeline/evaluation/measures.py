"""Formulas of classification quality on arrays: what scikit-learn has too, but from counts and vectorised.

Everything that depends on counts takes a *tally*: integers of shape ``(..., C, C + 1)``, rows the true
class, columns the answer, the last column the recordings that got no answer (they could not be read).
Leading axes are resamples, so that a bootstrap of 1,000 draws is one call. Without the last column, ``(...,
C, C)``, it is a plain confusion matrix.

Sources: ECE and reliability bins, Naeini et al. (AAAI 2015) and Guo et al. (ICML 2017); Brier (1950), the
sum over classes (0 best, 2 worst); AURC, Geifman, Uziel & El-Yaniv (ICLR 2019); the rest as scikit-learn
defines it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CALIBRATION_BINS = 10


def tally(truth: Ints, answer: Ints, n_classes: int) -> Ints:
    """Counts ``(C, C + 1)`` of (true class, answer) pairs; answer ``C`` stands for "no answer"."""
    cells = truth * (n_classes + 1) + answer
    counts = np.bincount(cells, minlength=n_classes * (n_classes + 1)).astype(np.int64)
    return counts.reshape(n_classes, n_classes + 1)


@dataclass(frozen=True)
class Scores:
    """Point metrics of a tally: overall ones of its leading shape, per-class ones with a further axis C.

    A class without recordings has NaN throughout and is left out of UAR and macro F1. Precision of a class
    that was never answered is 0, as scikit-learn's ``zero_division=0``.
    """

    accuracy: Floats
    uar: Floats
    weighted_f1: Floats
    macro_f1: Floats
    recall: Floats
    precision: Floats
    f1: Floats


def scores(counts: NDArray[Any]) -> Scores:
    """All metrics of a tally ``(..., C, C + 1)`` or confusion matrix ``(..., C, C)``."""
    n_classes = counts.shape[-2]
    square = counts[..., :n_classes].astype(np.float64)
    right = np.diagonal(square, axis1=-2, axis2=-1)
    support = counts.sum(axis=-1).astype(np.float64)
    answered = square.sum(axis=-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        absent = support == 0
        recall = right / support
        precision = np.where(absent, np.nan, np.where(answered == 0, 0.0, right / answered))
        f1 = np.where(absent, np.nan, 2 * right / (support + answered))
        total = support.sum(axis=-1)
        present = (~absent).sum(axis=-1)
        return Scores(
            accuracy=right.sum(axis=-1) / total,
            uar=np.nansum(recall, axis=-1) / present,
            weighted_f1=np.nansum(f1 * support, axis=-1) / total,
            macro_f1=np.nansum(f1, axis=-1) / present,
            recall=recall,
            precision=precision,
            f1=f1,
        )


def in_top(truth: Ints, probabilities: Floats, k: int) -> NDArray[np.bool_]:
    """Whether the true class is among the ``k`` most probable, (n,): of equals the lower index first."""
    own = np.take_along_axis(probabilities, truth[:, None], axis=1)
    earlier = np.arange(probabilities.shape[1]) < truth[:, None]
    rank = ((probabilities > own) | ((probabilities == own) & earlier)).sum(axis=1)
    return np.asarray(rank < k)


def log_loss(truth: Ints, probabilities: Floats) -> float:
    """Mean ``-ln p(true class)``, in nats; probabilities clipped at float64's epsilon like scikit-learn.

    ``truth`` is ``(n,)`` class indices, ``probabilities`` ``(n, classes)``.
    """
    own = np.take_along_axis(probabilities, truth[:, None], axis=1)
    epsilon = np.finfo(np.float64).eps
    return float(-np.log(np.clip(own, epsilon, 1 - epsilon)).mean())


def brier(truth: Ints, probabilities: Floats) -> float:
    """Mean over recordings of the squared distance to the one-hot truth, summed over classes (0 to 2).

    ``truth`` is ``(n,)`` class indices, ``probabilities`` ``(n, classes)``.
    """
    own = np.take_along_axis(probabilities, truth[:, None], axis=1)[:, 0]
    return float(((probabilities**2).sum(axis=1) - 2 * own + 1).mean())


@dataclass(frozen=True)
class Reliability:
    """Confidence bins ``(low, high]`` of equal width over 0..1; means are NaN in an empty bin."""

    edges: Floats
    n: Ints
    confidence: Floats
    accuracy: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error: the bins' mean |accuracy - confidence|, weighted by their counts."""
        gap = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(gap * self.n) / self.n.sum())


def reliability(confidence: Floats, correct: NDArray[np.bool_], n_bins: int = CALIBRATION_BINS) -> Reliability:
    """Accuracy against confidence in ``n_bins`` equal bins, of ``(n,)`` recordings."""
    edges = np.linspace(0, 1, n_bins + 1)
    index = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, n_bins - 1)
    n = np.bincount(index, minlength=n_bins).astype(np.int64)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(index, weights=confidence, minlength=n_bins) / n
        accuracy = np.bincount(index, weights=correct, minlength=n_bins) / n
    return Reliability(edges, n, mean_confidence, accuracy)


@dataclass(frozen=True)
class RiskCoverage:
    """Risk (share wrong) among the most confident ``coverage`` of all; and the confidence that cuts there."""

    coverage: Floats
    risk: Floats
    threshold: Floats

    @property
    def aurc(self) -> float:
        """Area under the risk-coverage curve: the mean risk over coverages 1/n, 2/n, ... 1."""
        return float(self.risk.mean())


def risk_coverage(confidence: Floats, correct: NDArray[np.bool_]) -> RiskCoverage:
    """Risk at every coverage k/n, ``(n,)``; recordings of equal confidence share their errors, whatever their order."""
    values, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(group, weights=~correct, minlength=len(values))
    errors = np.cumsum(np.repeat(wrong / sizes, sizes))
    n = len(confidence)
    kept = np.arange(1, n + 1)
    return RiskCoverage(kept / n, errors / kept, -np.repeat(values, sizes))
