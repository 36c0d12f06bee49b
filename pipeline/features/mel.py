"""Mel filters: triangles of unit area (Slaney norm), evenly spaced on Slaney's mel scale, as librosa has them.

Malcolm Slaney, "Auditory Toolbox", 1998: linear below 1 kHz (200/3 Hz a mel), logarithmic above.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_LINEAR_HZ_PER_MEL = 200.0 / 3.0
_BREAK_HZ = 1000.0
_LOG_STEP = np.log(6.4) / 27.0


def edges_hz(n_mels: int, top_hz: float) -> NDArray[np.float64]:
    """Corners of the filters in Hz, ascending, ``(n_mels + 2,)``: band k rises from k to k + 1, falls to k + 2."""
    return _mel_to_hz(np.linspace(0.0, _hz_to_mel(top_hz), n_mels + 2))


@lru_cache(maxsize=8)
def filters(n_mels: int, top_hz: float, n_fft: int, sample_rate_hz: int) -> Array:
    """Filters of a power spectrum, ``(n_mels, 1 + n_fft // 2)``; a row of zeros where no frequency lies in the band."""
    corners_hz = edges_hz(n_mels, top_hz)
    bins_hz = np.fft.rfftfreq(n_fft, 1.0 / sample_rate_hz)
    ramps = corners_hz[:, np.newaxis] - bins_hz[np.newaxis]
    widths = np.diff(corners_hz)[:, np.newaxis]
    rising, falling = -ramps[:-2] / widths[:-1], ramps[2:] / widths[1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    area = 2.0 / (corners_hz[2:] - corners_hz[:-2])
    return (triangles * area[:, np.newaxis]).astype(np.float32)


@lru_cache(maxsize=8)
def groups(n_mels: int, top_hz: float, n_fft: int, sample_rate_hz: int) -> tuple[tuple[slice, slice, Array], ...]:
    """``filters`` cut into three groups of neighbours, each with the bins it touches: a quarter of the work.

    Returns:
        For each group its bands, its bins, and its filters ``(bands, bins)``.
    """
    every = filters(n_mels, top_hz, n_fft, sample_rate_hz)
    bands = []
    for first, last in itertools.pairwise((0, n_mels // 2, 3 * n_mels // 4, n_mels)):
        touched = np.flatnonzero(every[first:last].any(axis=0))
        bins = slice(touched[0], touched[-1] + 1) if touched.size else slice(0, 0)
        bands.append((slice(first, last), bins, np.ascontiguousarray(every[first:last, bins])))
    return tuple(bands)


def _hz_to_mel(frequency_hz: float) -> float:
    if frequency_hz < _BREAK_HZ:
        return frequency_hz / _LINEAR_HZ_PER_MEL
    return float(_BREAK_HZ / _LINEAR_HZ_PER_MEL + np.log(frequency_hz / _BREAK_HZ) / _LOG_STEP)


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    break_mel = _BREAK_HZ / _LINEAR_HZ_PER_MEL
    linear = mel * _LINEAR_HZ_PER_MEL
    logarithmic = _BREAK_HZ * np.exp(_LOG_STEP * (mel - break_mel))
    return np.asarray(np.where(mel < break_mel, linear, logarithmic))
