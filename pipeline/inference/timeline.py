"""A recording over time: the model's answer to each window of each channel, and runs of equal answers as segments.

The windows are stored as arrays, as a call of three hours has 20,000 of them. Pooling is the mean of log-probabilities,
renormalised: a window with a high confidence has more weight. Silence is marked, not classified.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.models.doubt import log_softmax as log_softmax

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]
Found = TypeVar("Found")
SILENCE, NOT_SPEECH, UNCERTAIN = "silence", "not_speech", "uncertain"
NO_EMOTION = (SILENCE, NOT_SPEECH)  # answers without probabilities
SURE_ENOUGH = 0.5
"""The ``min_confidence`` of ``auto``: a calibrated answer above it is more likely right than wrong."""
SILENCE_DBFS = -70.0
"""Windows below this RMS level are silence; the quietest whispering in studio corpora is at -61 dBFS."""


def named(
    best: str,
    confidence: float,
    level_dbfs: float,
    min_confidence: float,
    silence_dbfs: float,
    speech: bool = True,
    familiar: bool = True,
) -> str:
    """The answer to show: ``best``, or ``silence``, ``not_speech`` or ``uncertain`` instead.

    Sound unlike the training recordings is ``uncertain`` if ``min_confidence`` is above 0.
    """
    if level_dbfs < silence_dbfs:
        return SILENCE
    if not speech:
        return NOT_SPEECH
    return UNCERTAIN if confidence < min_confidence or (min_confidence > 0 and not familiar) else best


def pool(log_p: Floats) -> Floats:
    """Mean of log-probabilities ``(n, classes)``, renormalised, ``(classes,)``; a single row is returned unchanged."""
    return np.asarray(log_p[0] if len(log_p) == 1 else log_softmax(log_p.mean(axis=0, keepdims=True))[0])


def finished(
    steps: Generator[NDArray[np.float32], Floats, Found], network: Callable[[NDArray[np.float32]], Floats]
) -> Found:
    """The result of a generator that yields features ``(n, *input_shape)`` and must be sent the network's answers."""
    try:
        features = next(steps)
        while True:
            features = steps.send(network(features))
    except StopIteration as end:
        found: Found = end.value
        return found


@dataclass(frozen=True)
class Timeline:
    """n windows in order of time, one channel after the other; C classes.

    By default all windows are speech and familiar, with unknown familiarity (NaN, see ``models.doubt``).
    """

    channel: NDArray[np.object_]  # (n,) "mix", or the channel's number as text
    start_s: Floats  # (n,)
    end_s: Floats  # (n,)
    level_dbfs: Floats  # (n,) RMS level
    log_p: Floats  # (n, C)
    speech: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))  # (n,) whether it may be speech
    familiarity: Floats = field(default_factory=lambda: np.empty(0))  # (n,)
    familiar: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))  # (n,) whether that is high enough

    def __post_init__(self) -> None:
        for name, value in (("speech", True), ("familiarity", np.nan), ("familiar", True)):
            if len(getattr(self, name)) != len(self):
                object.__setattr__(self, name, np.full(len(self), value))

    def __len__(self) -> int:
        return len(self.start_s)

    @property
    def probabilities(self) -> Floats:
        """``(n, C)``, rows summing to 1."""
        return np.exp(self.log_p)

    def names(
        self, labels: Sequence[str], min_confidence: float = 0.0, silence_dbfs: float = SILENCE_DBFS
    ) -> list[str]:
        """The answer to show for each window, see ``named``."""
        p = self.probabilities
        best = [labels[i] for i in p.argmax(axis=1)] if len(p) else []
        shown = zip(best, p.max(axis=1, initial=0.0), self.level_dbfs, self.speech, self.familiar, strict=True)
        return [
            named(label, sure, level, min_confidence, silence_dbfs, speech, familiar)
            for label, sure, level, speech, familiar in shown
        ]

    def told(self, silence_dbfs: float = SILENCE_DBFS) -> Floats:
        """Probabilities ``(n, C)`` to show: NaN for silence and for what is not speech."""
        return np.where(self._sounding(silence_dbfs)[:, np.newaxis], self.probabilities, np.nan)

    def _sounding(self, silence_dbfs: float) -> NDArray[np.bool_]:
        """Windows that are neither silent nor without speech, ``(n,)``."""
        return (self.level_dbfs >= silence_dbfs) & self.speech

    def pooled(self, silence_dbfs: float = SILENCE_DBFS) -> Floats:
        """``pool`` of the windows that are speech and not silent, ``(C,)``; of all windows if there are none."""
        sounding = self._sounding(silence_dbfs)
        return pool(self.log_p[sounding] if sounding.any() else self.log_p)

    def per_channel(self, silence_dbfs: float = SILENCE_DBFS) -> Timeline:
        """One window for each channel, which pools all windows of the channel."""
        channels = [self.where(self.channel == name) for name in dict.fromkeys(self.channel)]
        return Timeline(
            np.array([c.channel[0] for c in channels], dtype=object),
            np.array([c.start_s.min() for c in channels]),
            np.array([c.end_s.max() for c in channels]),
            np.array([c.level_dbfs.max() for c in channels]),
            np.array([c.pooled(silence_dbfs) for c in channels]).reshape(len(channels), self.log_p.shape[1]),
            *(np.array(found) for found in zip(*(c.doubt(silence_dbfs) for c in channels), strict=True)),
        )

    def doubt(self, silence_dbfs: float = SILENCE_DBFS) -> tuple[bool, float, bool]:
        """Whether any window is speech, the mean familiarity, and whether at least half of the windows are familiar."""
        sounding = self._sounding(silence_dbfs)
        rows = sounding if sounding.any() else np.ones(len(self), bool)
        return bool(self.speech.any()), float(self.familiarity[rows].mean()), bool(self.familiar[rows].mean() >= 0.5)

    def where(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Timeline:
        """The windows of an index array or a mask, ``(n,)``."""
        return Timeline(*(getattr(self, name)[rows] for name in _FIELDS))

    def later(self, seconds: float) -> Timeline:
        """The same windows, ``seconds`` later: their times in the recording of which this is a segment."""
        return replace(self, start_s=self.start_s + seconds, end_s=self.end_s + seconds)

    def merged(self, names: Sequence[str]) -> tuple[Timeline, list[str]]:
        """Merge neighbouring windows of one channel and one name; if segments overlap, the border is in the middle.

        Args:
            names: the name of each window, from ``names``.

        Returns:
            The segments (pooled log-probabilities, level of the loudest window), and their names.
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
            self.speech[first],
            np.add.reduceat(self.familiarity, first) / (last - first),
            self.familiar[first],
        )
        return segments, list(called[first])


_FIELDS = tuple(field.name for field in fields(Timeline))


def no_windows(classes: int) -> Timeline:
    """The Timeline of a recording that could not be used."""
    none = np.empty(0)
    return Timeline(np.empty(0, dtype=object), none, none, none, np.empty((0, classes)))


def joined(timelines: Sequence[Timeline]) -> Timeline:
    """Several Timelines in one, in their order."""
    return Timeline(*(np.concatenate([getattr(t, name) for t in timelines]) for name in _FIELDS))


def nested(timelines: Sequence[Timeline]) -> pa.ListArray:
    """Timelines as one Arrow column, with a list of windows for each."""
    import pyarrow as pa

    whole = joined(timelines)
    columns = {name: pa.array(getattr(whole, name)) for name in _FIELDS if name != "log_p"}
    columns["channel"] = pa.array(whole.channel, pa.string())  # its type is not inferred if there are no windows
    columns["log_p"] = pa.FixedSizeListArray.from_arrays(pa.array(whole.log_p.ravel()), whole.log_p.shape[1])
    windows = pa.StructArray.from_arrays(list(columns.values()), names=list(columns))
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *map(len, timelines)]), pa.int32()), windows)


def unnested(column: pa.ChunkedArray) -> list[Timeline]:
    """The inverse of ``nested``."""
    lists = column.combine_chunks()
    windows = lists.flatten()
    log_p = windows.field("log_p")
    columns = {name: windows.field(name).to_numpy(zero_copy_only=False) for name in _FIELDS if name != "log_p"}
    whole = Timeline(**columns, log_p=log_p.flatten().to_numpy().reshape(-1, log_p.type.list_size))
    ends = np.cumsum(lists.value_lengths().to_numpy())
    return [whole.where(np.arange(a, b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
