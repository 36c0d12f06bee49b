"""What the model sees of a recording, to be drawn: the outline of its sound, and the log-mel picture of its window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.audio.load import Clip
from pipeline.features.features import FeatureConfig, mel_edges_hz, mel_power

Array = NDArray[np.float32]
_NO_POWER = 1e-10
OUTLINE_S = 30.0
"""As much of a long recording is outlined, around its middle."""


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


def outline_part(duration_s: float) -> tuple[float, float]:
    """Start and length in seconds of the part to outline: all, or ``OUTLINE_S`` around the middle.

    >>> outline_part(3.0), outline_part(100.0)
    ((0.0, 3.0), (35.0, 30.0))
    """
    length_s = min(duration_s, OUTLINE_S)
    return (duration_s - length_s) / 2, length_s


def draw(window: Clip, outline: Clip, config: FeatureConfig, points: int = 600) -> Picture:
    """The picture of a recording.

    Args:
        window: what the model hears, as ``audio.load_middle`` gives it at the config's rate and length.
        outline: what is outlined, all channels mixed, at any rate.
        points: parts of the outline at most.
    """
    low, high = _extremes(outline.samples, points)
    power = mel_power(window.samples, config)
    level_db = 10.0 * np.log10(np.maximum(power, np.float32(_NO_POWER)))
    level_db = np.maximum(level_db - level_db.max(), np.float32(-config.top_db))
    if power.max() <= _NO_POWER:  # all of it is the loudest, and would be the brightest
        level_db[:] = -config.top_db
    window_start_s = window.start_s - (config.window_s - window.scored_s) / 2
    frames = np.arange(level_db.shape[1]) * config.hop_length / config.sample_rate_hz
    return Picture(
        outline_start_s=outline.start_s,
        outline_end_s=outline.start_s + outline.scored_s,
        low=low,
        high=high,
        window_start_s=window_start_s,
        window_s=config.window_s,
        frequency_hz=mel_edges_hz(config)[1:-1],
        time_s=window_start_s + frames,
        level_db=level_db,
    )


def _extremes(samples: Array, points: int) -> tuple[Array, Array]:
    """Smallest and largest sample of ``min(points, n)`` parts of samples ``(n,)``."""
    edges = np.linspace(0, len(samples), min(points, len(samples)) + 1).astype(np.intp)
    return np.minimum.reduceat(samples, edges[:-1]), np.maximum.reduceat(samples, edges[:-1])
