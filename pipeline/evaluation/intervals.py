"""Bootstrap confidence intervals over recordings and over speakers, from tallies instead of rows.

Resampling n recordings with replacement is drawing cell counts from a multinomial: the cost is that of the
cells, not of the recordings. Recordings of one speaker are not independent; resampling whole speakers (the
cluster bootstrap, Field & Welsh 2007) says how far a figure may move with other voices. Intervals are
percentile intervals (Efron 1979); those of plain shares over recordings are score intervals (Wilson 1927),
which are right for few recordings too.

Limits: a percentile interval knows only the recordings it has. Where every one is right (or wrong) all
resamples are alike; the exact binomial bound (Clopper & Pearson 1934) on the number of recordings then
stands in. Over few speakers percentile intervals are too narrow: those of 95 % held the truth in 83 to 85 of
100 simulations with 5 or 6 speakers, in 91 with 12 and in 92 with 22.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtri  # what scipy.stats computes with; that takes a second to import

from pipeline.evaluation.measures import Floats, Ints

LEVEL = 0.95
MIN_SPEAKERS = 5
_DRAWS_AT_ONCE = 4_000_000

Interval = tuple[float, float]


def resample_recordings(counts: Ints, resamples: int, rng: np.random.Generator) -> Ints:
    """Tallies ``(resamples, *counts.shape)`` of recordings drawn with replacement from ``counts``."""
    total = int(counts.sum())
    if total == 0:
        return np.zeros((resamples, *counts.shape), dtype=np.int64)
    drawn = rng.multinomial(total, counts.ravel() / total, size=resamples)
    return drawn.reshape(resamples, *counts.shape)


def resample_groups(group: Ints, cell: Ints, shape: tuple[int, ...], resamples: int, rng: np.random.Generator) -> Ints:
    """Tallies ``(resamples, *shape)`` of whole groups (speakers) drawn with replacement.

    Args:
        group: group of each recording, 0..G-1, shape (n,).
        cell: flat index into ``shape`` of each recording, shape (n,).
        shape: of one tally.
        resamples: how many tallies to draw.
        rng: source of the draws.
    """
    from scipy.sparse import csr_matrix

    n_groups = int(group.max()) + 1
    n_cells = int(np.prod(shape))
    tallies = csr_matrix((np.ones(len(cell)), (cell, group)), shape=(n_cells, n_groups))
    tallies.sum_duplicates()
    parts = []
    step = max(1, _DRAWS_AT_ONCE // n_groups)
    for start in range(0, resamples, step):
        drawn = rng.integers(0, n_groups, size=(min(step, resamples - start), n_groups))
        weights = np.stack([np.bincount(row, minlength=n_groups) for row in drawn], axis=1)
        parts.append((tallies @ weights).T)
    drawn_tallies: Ints = np.rint(np.concatenate(parts)).astype(np.int64)
    return drawn_tallies.reshape(resamples, *shape)


def percentile_interval(samples: NDArray[Any]) -> Interval | None:
    """Central ``LEVEL`` interval of resampled values ``(resamples,)``; None when none of them is defined."""
    values = samples[np.isfinite(samples)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def clopper_pearson(right: int, n: int) -> Interval:
    """Exact binomial ``LEVEL`` interval of ``right`` out of ``n``."""
    tail = (1 - LEVEL) / 2
    low = 0.0 if right == 0 else float(betaincinv(right, n - right + 1, tail))
    high = 1.0 if right == n else float(betaincinv(right + 1, n - right, 1 - tail))
    return low, high


def newcombe(right: int, n: int, right_rest: int, n_rest: int) -> Interval:
    """Hybrid score ``LEVEL`` interval of ``right/n - right_rest/n_rest``, independent samples."""
    share, rest = right / n, right_rest / n_rest
    (low, high), (low_rest, high_rest) = wilson(right, n), wilson(right_rest, n_rest)
    below = math.hypot(share - low, high_rest - rest)
    above = math.hypot(high - share, rest - low_rest)
    return share - rest - below, share - rest + above


def wilson(right: int, n: int) -> Interval:
    """Score ``LEVEL`` interval of the share ``right`` of ``n``."""
    z = float(ndtri((1 + LEVEL) / 2))
    share = right / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def interval(value: float, samples: Floats, n: int) -> Interval | None:
    """Interval of a metric in 0..1 measured on ``n`` recordings, from its resampled values ``(resamples,)``.

    A value of exactly 0 or 1 that no resample moved gets the exact binomial bound instead.
    """
    found = percentile_interval(samples)
    if found is None or n == 0:
        return None
    if value in (0.0, 1.0) and found[0] == found[1] == value:
        return clopper_pearson(round(value * n), n)
    return found
