"""A recording over time: what the model says of each window of each channel, and neighbours that agree as one segment.

Held as arrays, because a call of three hours has 20,000 windows. Pooling is the mean of log-probabilities,
renormalised: a window that is sure weighs more than one that is not. Silence is marked, not classified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]
SILENCE, UNCERTAIN = "silence", "uncertain"
SILENCE_DBFS = -70.0
"""Windows below this RMS level are silence; the quietest whispering in studio corpora lies at -61 dBFS."""


def named(best: str, confidence: float, level_dbfs: float, min_confidence: float, silence_dbfs: float) -> str:
    """The answer to show: ``best``, or ``silence`` or ``uncertain`` in its place."""
    if level_dbfs < silence_dbfs:
        return SILENCE
    return UNCERTAIN if confidence < min_confidence else best


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities of logits (or of unnormalised log-probabilities) ``(n, classes)``."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def pool(log_p: Floats) -> Floats:
    """Mean of log-probabilities ``(n, classes)``, renormalised, ``(classes,)``; a single row stays as it is."""
    return np.asarray(log_p[0] if len(log_p) == 1 else log_softmax(log_p.mean(axis=0, keepdims=True))[0])


@dataclass(frozen=True)
class Timeline:
    """Windows in order, all of one channel before those of the next: n windows, C classes.

    Attributes:
        channel: ``mix``, or the channel's number as text, ``(n,)``.
        start_s: where each window starts, ``(n,)``; ``end_s``: where it ends.
        level_dbfs: its RMS level, ``(n,)``.
        log_p: its log-probabilities, ``(n, C)``.
    """

    channel: NDArray[np.object_]
    start_s: Floats
    end_s: Floats
    level_dbfs: Floats
    log_p: Floats

    def __len__(self) -> int:
        return len(self.start_s)

    @property
    def probabilities(self) -> Floats:
        """``(n, C)``, rows summing to 1."""
        return np.exp(self.log_p)

    def names(
        self, labels: Sequence[str], min_confidence: float = 0.0, silence_dbfs: float = SILENCE_DBFS
    ) -> list[str]:
        """What to call each window, see ``named``."""
        p = self.probabilities
        best = [labels[i] for i in p.argmax(axis=1)] if len(p) else []
        shown = zip(best, p.max(axis=1, initial=0.0), self.level_dbfs, strict=True)
        return [named(label, sure, level, min_confidence, silence_dbfs) for label, sure, level in shown]

    def told(self, silence_dbfs: float = SILENCE_DBFS) -> Floats:
        """``(n, C)`` probabilities as they are told: silence has none (NaN)."""
        return np.where((self.level_dbfs < silence_dbfs)[:, np.newaxis], np.nan, self.probabilities)

    def pooled(self, silence_dbfs: float = SILENCE_DBFS) -> Floats:
        """Log-probabilities ``(C,)`` of all windows together: those that are not silent, or all when all are."""
        heard = self.level_dbfs >= silence_dbfs
        return pool(self.log_p[heard] if heard.any() else self.log_p)

    def per_channel(self, silence_dbfs: float = SILENCE_DBFS) -> Timeline:
        """All windows of a channel as one, for each channel."""
        channels = [self.where(self.channel == name) for name in dict.fromkeys(self.channel)]
        return Timeline(
            np.array([c.channel[0] for c in channels], dtype=object),
            np.array([c.start_s.min() for c in channels]),
            np.array([c.end_s.max() for c in channels]),
            np.array([c.level_dbfs.max() for c in channels]),
            np.array([c.pooled(silence_dbfs) for c in channels]).reshape(len(channels), self.log_p.shape[1]),
        )

    def where(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Timeline:
        """The windows of an index or a mask."""
        return Timeline(
            self.channel[rows], self.start_s[rows], self.end_s[rows], self.level_dbfs[rows], self.log_p[rows]
        )

    def later(self, seconds: float) -> Timeline:
        """The same windows, that much later: of a recording of which this is a segment."""
        return replace(self, start_s=self.start_s + seconds, end_s=self.end_s + seconds)

    def merged(self, names: Sequence[str]) -> tuple[Timeline, list[str]]:
        """Neighbours of one channel and one name as one segment; where segments overlap, the border is in the middle.

        Args:
            names: what each window is called, as ``names`` gives it.

        Returns:
            The segments (pooled log-probabilities, level of the loudest window), and what they are called.
        """
        if not len(self):
            return self, []
        called = np.array(names, dtype=object)
        changed = (called[1:] != called[:-1]) | (self.channel[1:] != self.channel[:-1])
        first = np.concatenate([[0], np.flatnonzero(changed) + 1])
        last = np.concatenate([first[1:], [len(self)]])
        start_s, end_s = self.start_s[first], self.end_s[last - 1]
        overlap = (self.channel[first[1:]] == self.channel[first[:-1]]) & (end_s[:-1] > start_s[1:])
        border = (end_s[:-1] + start_s[1:]) / 2
        segments = Timeline(
            self.channel[first],
            np.concatenate([start_s[:1], np.where(overlap, border, start_s[1:])]),
            np.concatenate([np.where(overlap, border, end_s[:-1]), end_s[-1:]]),
            np.maximum.reduceat(self.level_dbfs, first),
            np.array([pool(self.log_p[a:b]) for a, b in zip(first, last, strict=True)]),
        )
        return segments, list(called[first])


def no_windows(classes: int) -> Timeline:
    """The Timeline of a recording that could not be used."""
    none = np.empty(0)
    return Timeline(np.empty(0, dtype=object), none, none, none, np.empty((0, classes)))


def joined(timelines: Sequence[Timeline]) -> Timeline:
    """One Timeline of several, in their order."""
    return Timeline(
        np.concatenate([t.channel for t in timelines]),
        np.concatenate([t.start_s for t in timelines]),
        np.concatenate([t.end_s for t in timelines]),
        np.concatenate([t.level_dbfs for t in timelines]),
        np.concatenate([t.log_p for t in timelines]),
    )


def nested(timelines: Sequence[Timeline]) -> pa.ListArray:
    """Timelines as one Arrow column, a list of windows for each."""
    import pyarrow as pa

    whole = joined(timelines)
    fields = {
        "channel": pa.array(whole.channel, pa.string()),
        "start_s": pa.array(whole.start_s),
        "end_s": pa.array(whole.end_s),
        "level_dbfs": pa.array(whole.level_dbfs),
        "log_p": pa.FixedSizeListArray.from_arrays(pa.array(whole.log_p.ravel()), whole.log_p.shape[1]),
    }
    windows = pa.StructArray.from_arrays(list(fields.values()), names=list(fields))
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *map(len, timelines)]), pa.int32()), windows)


def unnested(column: pa.ChunkedArray) -> list[Timeline]:
    """What ``nested`` was given."""
    lists = column.combine_chunks()
    fields = lists.flatten()
    log_p = fields.field("log_p")
    times = {name: fields.field(name).to_numpy() for name in ("start_s", "end_s", "level_dbfs")}
    whole = Timeline(
        channel=fields.field("channel").to_numpy(zero_copy_only=False),
        log_p=log_p.flatten().to_numpy().reshape(-1, log_p.type.list_size),
        **times,
    )
    ends = np.cumsum(lists.value_lengths().to_numpy())
    return [whole.where(np.arange(a, b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
