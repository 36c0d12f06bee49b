"""Occlusion: which patches of a log-mel picture matter for a class, with the network as a black box.

Method: a patch of 2 x 2 cells slides over the picture one cell at a time, also past the borders. It is replaced by 0,
the picture's mean, as masks were in training (SpecAugment), and the decrease of the class's log-odds is measured. A
cell's importance is the mean over the four patches that covered it. Source: Zeiler & Fergus 2014, "Visualizing and
Understanding Convolutional Networks", section 4.2; log-odds, as probabilities near 1 hardly change.
Limits: it shows what the network used, not what the speaker felt; patches that carry the same evidence are each
undervalued.

Also the data to draw a recording: the outline of its waveform, and the log-mel picture of the model's window.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.audio.load import Clip
from pipeline.features.features import FeatureConfig, FeatureError, mel_edges_hz, mel_power
from pipeline.inference.timeline import finished

Array = NDArray[np.float32]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class OcclusionMap:
    """Importance of each cell of a picture for one class."""

    log_p: Floats  # (classes,) log-probabilities of the untouched picture
    target: int  # index of the class that is explained
    importance: Floats  # (rows, columns) decrease of its log-odds in nats if the cell is hidden; row 0: lowest bands
    band_edges: NDArray[np.intp]  # (rows + 1,) first band of each row, and the number of bands at the end
    frame_edges: NDArray[np.intp]  # (columns + 1,) first frame of each column, and the number of frames at the end

    def frequency_edges_hz(self, config: FeatureConfig) -> Floats:
        """Borders of the rows in Hz, ``(rows + 1,)``: midpoints between the centres of neighbouring bands."""
        return np.asarray(band_borders_hz(config)[self.band_edges])

    def time_edges_s(self, config: FeatureConfig) -> Floats:
        """Borders of the columns in seconds from the start of the picture, ``(columns + 1,)``."""
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
    """``occlusion_steps`` with the network as a function ``(n, 1, bands, frames)`` -> ``(n, classes)``."""
    return finished(occlusion_steps(picture, target=target, rows=rows, columns=columns), log_probabilities)


def occlusion_steps(
    picture: Array, *, target: int | None = None, rows: int = 8, columns: int = 16
) -> Generator[Array, Floats, OcclusionMap]:
    """Explain one picture: a generator, so that the caller can run the network elsewhere.

    Yields once ``(n, 1, bands, frames)``: the picture and its ``(rows + 1) * (columns + 1)`` variants with hidden
    patches; must be sent their log-probabilities ``(n, classes)``.

    Args:
        picture: features, float32 ``(1, bands, frames)``.
        target: index of the class; None: the most probable one.
        rows, columns: number of cells over the bands and over the frames.

    Raises:
        FeatureError: the features are no log-mel picture, or have fewer bands or frames than cells.
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
        hidden[index, 0, low:high, first:last] = 0
    log_p = yield np.concatenate([picture[np.newaxis], hidden])
    target = int(log_p[0].argmax()) if target is None else target
    odds = log_p[:, target] - np.logaddexp.reduce(np.delete(log_p, target, axis=1), axis=1)  # exact if p rounds to 1
    fall = (odds[0] - odds[1:]).reshape(rows + 1, columns + 1)
    importance = (fall[:-1, :-1] + fall[1:, :-1] + fall[:-1, 1:] + fall[1:, 1:]) / 4
    return OcclusionMap(log_p[0], target, importance, band_edges, frame_edges)


_NO_POWER = 1e-10
OUTLINE_S = 30.0
"""Longest part of a recording that is drawn; of longer ones the part around the model's window."""
_POINTS, _COLUMNS, _FRAMES_A_COLUMN = 1000, 480, 4


@dataclass(frozen=True)
class Picture:
    """Data to draw a recording; times are in seconds from its start.

    Levels are in dB relative to the loudest cell, at least ``-top_db``; for digital silence all are ``-top_db``.
    """

    outline_start_s: float  # the part whose waveform is outlined
    outline_end_s: float
    low: Array  # (n,) lowest sample in each of n equal pieces of that part
    high: Array  # (n,) highest sample
    window_start_s: float  # of the model's window; negative if it begins with padding
    window_s: float
    frequency_hz: NDArray[np.float64]  # (bands,) centres of the mel bands
    time_s: NDArray[np.float64]  # (frames,) centres of the frames
    level_db: Array  # (bands, frames) of the window; row 0 is the lowest band
    overview_db: Array  # (bands, columns) of the outlined part, in columns of equal length


def outline_part(duration_s: float, centre_s: float) -> tuple[float, float]:
    """Start and length in seconds of the part to draw: all, or ``OUTLINE_S`` around the window's middle.

    >>> outline_part(3.0, 1.5), outline_part(100.0, 50.0), outline_part(100.0, 99.0)
    ((0.0, 3.0), (35.0, 30.0), (70.0, 30.0))
    """
    length_s = min(duration_s, OUTLINE_S)
    return min(max(centre_s - length_s / 2, 0.0), duration_s - length_s), length_s


class Overview:
    """Outline and mel levels of a part of a recording at a resolution for drawing; clips are added one by one.

    Args:
        start_s: start of the part; ``length_s``: its length.
        points: largest number of points of the outline.
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
        """Add a clip, whose sample rate must be that of the config."""
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
        """In which of ``places`` equal parts each of ``count`` points, ``step`` samples apart, lies: ``(count,)``."""
        share = at + np.arange(count) * (step / (self._config.sample_rate_hz * self.length_s))
        return np.clip((share * places).astype(np.intp), 0, places - 1)

    @property
    def level_db(self) -> Array:
        """Levels in dB relative to the loudest cell, ``(bands, columns)``; columns without a clip are silent."""
        mean = self._power / np.maximum(self._frames, 1)[:, np.newaxis]
        return _level_db(mean.T.astype(np.float32), self._config)

    @property
    def outline(self) -> tuple[Array, Array]:
        """Lowest and highest sample of each of n equal parts, ``(n,)`` each; 0 for parts without a clip."""
        there = np.isfinite(self.low)
        return np.where(there, self.low, np.float32(0)), np.where(there, self.high, np.float32(0))


def draw(window: Clip, overview: Overview, config: FeatureConfig) -> Picture:
    """The data to draw a recording: the model's input ``window`` (``audio.load_middle``), and the part around it."""
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
    level_db: Array = 10 * np.log10(np.maximum(power, np.float32(_NO_POWER)))
    level_db = np.maximum(level_db - level_db.max(), np.float32(-config.top_db))
    if power.max() <= _NO_POWER:  # silence: every cell is as loud as the loudest and would be drawn brightest
        level_db[:] = -config.top_db
    return level_db
