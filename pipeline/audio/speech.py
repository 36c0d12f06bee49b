"""Voice activity: the share of frames that may be speech, and the window of a recording with most speech.

A frame of 32 ms counts as speech if its level is near the loudest one, and it is voiced or close to a voiced frame.
Voiced means three things. Its normalised autocorrelation has a peak at a pitch of 75 to 400 Hz. Its power is spread
over more than a few bins (unlike a beep). Its spectrum changes from frame to frame (unlike a hum).
Source: Boersma 1993, "Accurate short-term analysis of the fundamental frequency".
Limits: singing and instruments are harmonic too; whispering is not.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import soxr
from numpy.typing import NDArray

_RATE_HZ, _FRAME = 8_000, 256  # 32 ms
_SIZE = 2 * _FRAME
_LOWEST_HZ, _HIGHEST_HZ = 75, 400
_DEEPEST_DB, _FAINTEST_DB = 35.0, -75.0  # lowest level of speech: below the loudest frame; relative to full scale
_HARMONIC, _IN_FEW_BINS, _STEADY = 0.5, 0.9, 0.99
_NEAR = 3  # frames: consonants are within 100 ms of a vowel
_AT_ONCE = 256  # frames that `SpeechSearch` processes together


LEAST_SHARE = 0.12
"""A lower share counts as no speech: a quarter of the lowest share in the training recordings (CREMA-D, 0.47)."""


def speech_share(samples: NDArray[np.float32], rate_hz: int) -> float:
    """Share of the frames that may be speech, 0 to 1; NaN for less than half a second, which is too short to decide.

    Args:
        samples: ``(samples,)`` mono, a few seconds.
        rate_hz: 8,000 or more.
    """
    step = rate_hz // _RATE_HZ
    sound = np.zeros(len(samples) // step, np.float32)
    for i in range(step):
        sound += samples[i : len(sound) * step : step] / np.float32(step)
    if len(sound) < _RATE_HZ // 2:
        return float("nan")
    level_db, tonal = _frames(sound[: len(sound) // _FRAME * _FRAME].reshape(-1, _FRAME))
    return float(_speech(level_db, tonal, level_db.max()).mean())


class SpeechSearch:
    """Finds the window with most speech in a recording that is added part by part; keeps five bytes of every 32 ms.

    Unlike ``speech_share``, levels are compared with the loudest voiced frame, so a slamming door hides no speech.
    """

    def __init__(self, rate_hz: int) -> None:
        self._stream = None if rate_hz == _RATE_HZ else soxr.ResampleStream(rate_hz, _RATE_HZ, 1, dtype="float32")
        self._waiting: list[NDArray[np.float32]] = []
        self._size = 0  # samples in `_waiting`
        self._before = np.empty((0, _FRAME), np.float32)  # the last frame processed
        self._found: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = []

    def add(self, samples: NDArray[np.float32]) -> None:
        """Add the next mono samples ``(n,)``, finite, at the recording's rate."""
        self._take(samples, last=False)

    def start_s(self, window_s: float, duration_s: float) -> float | None:
        """Start of the window with most speech, after all samples were added; None if the recording's middle is best.

        Of equally good windows, the middle one of the run nearest to the recording's middle is taken.

        Args:
            duration_s: of the recording; more than ``window_s``.
        """
        self._take(np.empty(0, np.float32), last=True)
        level_db, tonal = (np.concatenate(parts) for parts in zip(*self._found, strict=True))
        if not tonal.any():
            return None
        speech, frame_s = _speech(level_db, tonal, level_db[tonal].max()), _FRAME / _RATE_HZ
        before = np.concatenate([[0], np.cumsum(speech)])  # frames of speech before each border of frames

        def held(start_s: NDArray[np.float64]) -> NDArray[np.float64]:
            ends = np.interp([start_s / frame_s, (start_s + window_s) / frame_s], np.arange(len(before)), before)
            return np.asarray(ends[1] - ends[0])

        last_s = duration_s - window_s
        starts = np.append(np.arange(0.0, last_s, frame_s), last_s)
        found = held(starts)
        most = found.max() - 1e-6
        if held(np.array([last_s / 2]))[0] >= most:
            return None
        borders = np.flatnonzero(np.diff(np.concatenate([[False], found >= most, [False]])))
        middles = (starts[borders[::2]] + starts[borders[1::2] - 1]) / 2
        return float(middles[np.abs(middles - last_s / 2).argmin()])

    def _take(self, samples: NDArray[np.float32], last: bool) -> None:
        part = samples if self._stream is None else self._stream.resample_chunk(samples, last=last)
        self._waiting.append(part)
        self._size += len(part)
        if self._size < _AT_ONCE * _FRAME and not last:
            return
        sound = np.concatenate(self._waiting)
        if last and not self._found:
            sound = np.pad(sound, (0, max(_FRAME - len(sound), 0)))
        whole = len(sound) // _FRAME * _FRAME
        self._waiting, self._size = [sound[whole:]], len(sound) - whole
        if whole:
            frames = np.concatenate([self._before, sound[:whole].reshape(-1, _FRAME)])
            seen, self._before = len(self._before), frames[-1:]
            level_db, tonal = _frames(frames)
            self._found.append((level_db[seen:], tonal[seen:]))


def _frames(frames: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Frames ``(n, 256)`` -> level in dB relative to full scale ``(n,)``, whether voiced at any level ``(n,)``."""
    frames = frames - frames.mean(axis=1, keepdims=True)
    level_db = 10 * np.log10(np.maximum(np.einsum("ij,ij->i", frames, frames) / _FRAME, 1e-20))
    window, of_window = _tables()
    flat = np.diff(frames, axis=1, append=frames[:, -1:])  # without this, any low rumble is harmonic
    spectrum = np.fft.rfft(flat * window, _SIZE)
    power = spectrum.real**2 + spectrum.imag**2
    power[:, : _LOWEST_HZ * _SIZE // _RATE_HZ] = 0
    total = np.maximum(power.sum(axis=1), 1e-20)
    found = np.fft.irfft(power)[:, : len(of_window)] / of_window
    harmonicity = (found[:, _RATE_HZ // _HIGHEST_HZ :] / np.maximum(found[:, :1], 1e-20)).max(axis=1)
    few = np.partition(power, -6, axis=1)[:, -6:].sum(axis=1) / total
    shape = np.sqrt(power / total[:, np.newaxis])
    same = np.einsum("ij,ij->i", shape[1:], shape[:-1])
    changes = np.concatenate([same[:1] if len(same) else [0.0], same]) < _STEADY
    return level_db, (harmonicity >= _HARMONIC) & (few < _IN_FEW_BINS) & changes


def _speech(level_db: NDArray[np.float32], tonal: NDArray[np.bool_], loudest_db: float) -> NDArray[np.bool_]:
    """Which frames count as speech, ``(n,)``."""
    active = level_db >= max(loudest_db - _DEEPEST_DB, _FAINTEST_DB)
    near = np.convolve(active & tonal, np.ones(2 * _NEAR + 1))[_NEAR : _NEAR + len(active)] > 0
    return np.asarray(near & active)


@cache
def _tables() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The Hann window ``(frame,)``; its autocorrelation ``(lags,)``, 1 at lag 0, for lags up to the lowest pitch."""
    window = np.hanning(_FRAME)
    autocorrelation = np.fft.irfft(np.abs(np.fft.rfft(window, _SIZE)) ** 2)[: _RATE_HZ // _LOWEST_HZ]
    return window.astype(np.float32), (autocorrelation / autocorrelation[0]).astype(np.float32)
