"""Which patches of a log-mel picture speak for a class: occlusion, the network as a black box.

Method: a patch of 2 x 2 cells slides over the picture one cell at a time, past the borders too; it is replaced by 0,
the picture's mean, which is also what masks were in training (SpecAugment), and the fall of the class's log-odds is
noted. A cell's importance is the mean over the four patches that hid it. Source: Zeiler & Fergus 2014, "Visualizing and
Understanding Convolutional Networks", section 4.2; log-odds, because probabilities near 1 hardly fall.
Limits: shows what the network used, not what the speaker felt; patches that help each other are each undervalued.

What the model sees of a recording, to be drawn: the outline of its sound, and the log-mel picture of its window.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.audio.load import Clip
from pipeline.features.features import FeatureConfig, FeatureError, mel_edges_hz, mel_power

Array = NDArray[np.float32]
Floats = NDArray[np.float64]
_HIDDEN = np.float32(0.0)


@dataclass(frozen=True)
class OcclusionMap:
    """Importance of each cell of a picture for one class.

    Attributes:
        log_p: log-probabilities of the untouched picture, ``(classes,)``.
        target: index of the class that is explained.
        importance: fall of its log-odds in nats when the cell is hidden, ``(rows, columns)``; row 0 lowest bands.
        band_edges: first band of each row, and the number of bands, ``(rows + 1,)``.
        frame_edges: first frame of each column, and the number of frames, ``(columns + 1,)``.
    """

    log_p: Floats
    target: int
    importance: Floats
    band_edges: NDArray[np.intp]
    frame_edges: NDArray[np.intp]

    def frequency_edges_hz(self, config: FeatureConfig) -> Floats:
        """Where the rows begin and end, in Hz, ``(rows + 1,)``: middles between the centres of bands."""
        return np.asarray(band_borders_hz(config)[self.band_edges])

    def time_edges_s(self, config: FeatureConfig) -> Floats:
        """Where the columns begin and end, in seconds from the start of the picture, ``(columns + 1,)``."""
        step_s = config.hop_length / config.sample_rate_hz
        return np.asarray(np.clip((self.frame_edges - 0.5) * step_s, 0.0, config.window_s))


def band_borders_hz(config: FeatureConfig) -> Floats:
    """Borders between neighbouring mel bands in Hz, ``(n_mels + 1,)``: band k lies between [k] and [k + 1]."""
    corners_hz = mel_edges_hz(config)
    return np.asarray((corners_hz[:-1] + corners_hz[1:]) / 2)


def occlusion_map(
    picture: Array,
    log_probabilities: Callable[[Array], Floats],
    *,
    target: int | None = None,
    rows: int = 8,
    columns: int = 16,
) -> OcclusionMap:
    """Explain one picture.

    Args:
        picture: features, float32 ``(1, bands, frames)``.
        log_probabilities: of pictures ``(n, 1, bands, frames)``, ``(n, classes)``: ``Predictor.log_probabilities``.
        target: index of the class; the most probable one when None.
        rows: cells over the bands. The network runs ``1 + (rows + 1) * (columns + 1)`` times.
        columns: cells over the frames.

    Raises:
        FeatureError: the features are no picture, or have fewer bands or frames than cells.
    """
    asking = occlusion_steps(picture, target=target, rows=rows, columns=columns)
    try:
        asking.send(log_probabilities(next(asking)))
    except StopIteration as end:
        found: OcclusionMap = end.value
        return found
    raise AssertionError("one question is all that is asked")


def occlusion_steps(
    picture: Array, *, target: int | None = None, rows: int = 8, columns: int = 16
) -> Generator[Array, Floats, OcclusionMap]:
    """``occlusion_map`` for whoever runs the network elsewhere: yields pictures, is sent their log-probabilities.

    Yields ``(n, 1, bands, frames)``, of ``picture (1, bands, frames)`` and its variants; is sent ``(n, classes)``.

    Raises:
        FeatureError: no log-mel picture, or more cells than it has bands or frames.
    """
    if picture.ndim != 3 or len(picture) != 1:
        raise FeatureError(f"only log-mel pictures (1, bands, frames) can be explained, got shape {picture.shape}")
    bands, frames = picture.shape[1:]
    if not (1 <= rows <= bands and 1 <= columns <= frames):
        raise FeatureError(f"{rows} x {columns} cells do not fit a picture of {bands} bands x {frames} frames")
    band_edges = np.linspace(0, bands, rows + 1).round().astype(np.intp)
    frame_edges = np.linspace(0, frames, columns + 1).round().astype(np.intp)
    hidden = np.repeat(picture[np.newaxis], (rows + 1) * (columns + 1), axis=0)
    for index, (row, column) in enumerate(np.ndindex(rows + 1, columns + 1)):
        low, high = band_edges[max(row - 1, 0)], band_edges[min(row + 1, rows)]
        first, last = frame_edges[max(column - 1, 0)], frame_edges[min(column + 1, columns)]
        hidden[index, 0, low:high, first:last] = _HIDDEN
    log_p = yield np.concatenate([picture[np.newaxis], hidden])
    target = int(log_p[0].argmax()) if target is None else target
    odds = _log_odds(log_p, target)
    fall = (odds[0] - odds[1:]).reshape(rows + 1, columns + 1)
    importance = (fall[:-1, :-1] + fall[1:, :-1] + fall[:-1, 1:] + fall[1:, 1:]) / 4
    return OcclusionMap(log_p[0], target, importance, band_edges, frame_edges)


def _log_odds(log_p: Floats, target: int) -> Floats:
    """log(p / (1 - p)) of a class, ``(n,)``, from log-probabilities ``(n, classes)``, also where p rounds to 1."""
    others = np.delete(log_p, target, axis=1)
    return np.asarray(log_p[:, target] - np.logaddexp.reduce(others, axis=1))


_NO_POWER = 1e-10
OUTLINE_S = 30.0
"""As much of a long recording is drawn, around the model's window, where not all of it is."""
_POINTS, _COLUMNS, _FRAMES_A_COLUMN = 1000, 480, 4


@dataclass(frozen=True)
class Picture:
    """Times in seconds from the start of the recording.

    Attributes:
        outline_start_s: where the outline begins; ``outline_end_s``: where it ends.
        low: lowest sample of each of n equal parts, ``(n,)``; ``high``: highest.
        window_start_s: start of the model's window; negative where it begins with padding.
        frequency_hz: centres of the mel bands, ``(bands,)``; ``time_s``: of the frames, ``(frames,)``.
        level_db: dB below the loudest cell, cut at ``top_db``, ``(bands, frames)``; row 0 the lowest band. Of digital
            silence all are at ``-top_db``.
        overview_db: the same of what is outlined, ``(bands, columns)``, in columns of equal length.
    """

    outline_start_s: float
    outline_end_s: float
    low: Array
    high: Array
    window_start_s: float
    window_s: float
    frequency_hz: NDArray[np.float64]
    time_s: NDArray[np.float64]
    level_db: Array
    overview_db: Array


def outline_part(duration_s: float, centre_s: float) -> tuple[float, float]:
    """Start and length in seconds of the part to outline: all, or ``OUTLINE_S`` around the window's middle.

    >>> outline_part(3.0, 1.5), outline_part(100.0, 50.0), outline_part(100.0, 99.0)
    ((0.0, 3.0), (35.0, 30.0), (70.0, 30.0))
    """
    length_s = min(duration_s, OUTLINE_S)
    return min(max(centre_s - length_s / 2, 0.0), duration_s - length_s), length_s


class Overview:
    """Outline and levels of a part of a recording, small enough to be drawn; filled clip by clip.

    Args:
        start_s: where the part begins; ``length_s``: how long it is.
        points: parts of the outline at most.
    """

    def __init__(self, start_s: float, length_s: float, config: FeatureConfig, points: int = _POINTS) -> None:
        self.start_s, self.length_s = start_s, max(length_s, 1.0 / config.sample_rate_hz)
        count = max(round(self.length_s * config.sample_rate_hz), 1)
        columns = min(_COLUMNS, 1 + count // config.hop_length)
        hop = max(config.hop_length, count // (columns * _FRAMES_A_COLUMN))
        self._config = replace(config, hop_length=min(hop, config.window_samples))
        points = min(points, count)
        self.low, self.high = np.full(points, np.inf, np.float32), np.full(points, -np.inf, np.float32)
        self._power, self._frames = np.zeros((columns, config.n_mels)), np.zeros(columns)

    def add(self, clip: Clip) -> None:
        """Take in what lies in a clip, at the config's rate."""
        at = (clip.start_s - self.start_s) / self.length_s
        if not len(clip.samples):
            return
        point = self._places(at, len(clip.samples), 1, len(self.low))
        first = np.flatnonzero(np.diff(point, prepend=-1))
        here = point[first]
        self.low[here] = np.minimum(self.low[here], np.minimum.reduceat(clip.samples, first))
        self.high[here] = np.maximum(self.high[here], np.maximum.reduceat(clip.samples, first))
        power = mel_power(clip.samples, self._config)
        column = self._places(at, power.shape[1], self._config.hop_length, len(self._frames))
        np.add.at(self._power, column, power.T)
        np.add.at(self._frames, column, 1)

    def _places(self, at: float, count: int, step: int, places: int) -> NDArray[np.intp]:
        """In which of ``places`` equal parts ``count`` things lie, of which there is one every ``step`` samples."""
        share = at + np.arange(count) * (step / (self._config.sample_rate_hz * self.length_s))
        return np.clip((share * places).astype(np.intp), 0, places - 1)

    @property
    def level_db(self) -> Array:
        """Levels in dB below the loudest cell, ``(bands, columns)``; what no clip brought is silent."""
        mean = self._power / np.maximum(self._frames, 1)[:, np.newaxis]
        return _level_db(mean.T.astype(np.float32), self._config)

    @property
    def outline(self) -> tuple[Array, Array]:
        """Lowest and highest sample of each of n equal parts, ``(n,)`` each; 0 where no clip brought any."""
        there = np.isfinite(self.low)
        return np.where(there, self.low, np.float32(0)), np.where(there, self.high, np.float32(0))


def draw(window: Clip, overview: Overview, config: FeatureConfig) -> Picture:
    """The picture of a recording.

    Args:
        window: what the model hears, as ``audio.load_middle`` gives it at the config's rate and length.
        overview: what is drawn around it.
    """
    low, high = overview.outline
    level_db = _level_db(mel_power(window.samples, config), config)
    window_start_s = window.start_s - (config.window_s - window.scored_s) / 2
    frames = np.arange(level_db.shape[1]) * config.hop_length / config.sample_rate_hz
    return Picture(
        outline_start_s=overview.start_s,
        outline_end_s=overview.start_s + overview.length_s,
        low=low,
        high=high,
        window_start_s=window_start_s,
        window_s=config.window_s,
        frequency_hz=mel_edges_hz(config)[1:-1],
        time_s=window_start_s + frames,
        level_db=level_db,
        overview_db=overview.level_db,
    )


def _level_db(power: Array, config: FeatureConfig) -> Array:
    level_db: Array = np.asarray(10.0 * np.log10(np.maximum(power, np.float32(_NO_POWER))), dtype=np.float32)
    level_db = np.asarray(np.maximum(level_db - level_db.max(), np.float32(-config.top_db)), dtype=np.float32)
    if power.max() <= _NO_POWER:  # all of it is the loudest, and would be the brightest
        level_db[:] = -config.top_db
    return level_db
