"""How much of a sound may be speech, by energy and harmonicity.

A frame of 32 ms counts when it is not far below the loudest, and is voiced or next to a voiced one: its normalised
autocorrelation (Boersma 1993, "Accurate short-term analysis of the fundamental frequency") has a peak at a pitch of 75
to 400 Hz, its power lies in more than a few bins (a beep's does not), and its spectrum changes from frame to frame
(that of a hum does not). Limits: singing and instruments are harmonic too; whispering is not.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

_RATE_HZ, _FRAME = 8_000, 256  # 32 ms
_SIZE = 2 * _FRAME
_LOWEST_HZ, _HIGHEST_HZ = 75, 400
_DEEPEST_DB, _FAINTEST_DB = 35.0, -75.0  # of a frame: below the loudest one; over full scale
_HARMONIC, _IN_FEW_BINS, _STEADY = 0.5, 0.9, 0.99
_NEAR = 3  # frames: consonants stand within 100 ms of a vowel


LEAST_SHARE = 0.12
"""Below it there is no speech: a quarter of the lowest among the training recordings (CREMA-D, 0.47)."""


def speech_share(samples: NDArray[np.float32], rate_hz: int) -> float:
    """Share of the frames that may be speech, 0 to 1; NaN of less than half a second, where it cannot be told.

    Args:
        samples: ``(samples,)`` mono; those of a few seconds.
        rate_hz: 8,000 or more.
    """
    step = rate_hz // _RATE_HZ
    sound = np.zeros(len(samples) // step, np.float32)
    for i in range(step):
        sound += samples[i : len(sound) * step : step] / np.float32(step)
    if len(sound) < _RATE_HZ // 2:
        return float("nan")
    frames = sound[: len(sound) // _FRAME * _FRAME].reshape(-1, _FRAME)
    frames = frames - frames.mean(axis=1, keepdims=True)
    level_db = 10 * np.log10(np.maximum(np.einsum("ij,ij->i", frames, frames) / _FRAME, 1e-20))
    active = level_db >= max(level_db.max() - _DEEPEST_DB, _FAINTEST_DB)
    window, of_window = _tables()
    flat = np.diff(frames, axis=1, append=frames[:, -1:])  # else any low rumble is harmonic
    spectrum = np.fft.rfft(flat * window, _SIZE)
    power = spectrum.real**2 + spectrum.imag**2
    power[:, : _LOWEST_HZ * _SIZE // _RATE_HZ] = 0
    total = np.maximum(power.sum(axis=1), 1e-20)
    found = np.fft.irfft(power)[:, : len(of_window)] / of_window
    harmonicity = (found[:, _RATE_HZ // _HIGHEST_HZ :] / np.maximum(found[:, :1], 1e-20)).max(axis=1)
    few = np.partition(power, -6, axis=1)[:, -6:].sum(axis=1) / total
    shape = np.sqrt(power / total[:, np.newaxis])
    same = np.einsum("ij,ij->i", shape[1:], shape[:-1])
    changes = np.concatenate([same[:1], same]) < _STEADY
    voiced = active & (harmonicity >= _HARMONIC) & (few < _IN_FEW_BINS) & changes
    near = np.convolve(voiced, np.ones(2 * _NEAR + 1))[_NEAR : _NEAR + len(voiced)] > 0
    return float((near & active).mean())


@cache
def _tables() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The window ``(frame,)``; its autocorrelation ``(lags,)``, 1 at lag 0, up to the lowest pitch's."""
    window = np.hanning(_FRAME)
    autocorrelation = np.fft.irfft(np.abs(np.fft.rfft(window, _SIZE)) ** 2)[: _RATE_HZ // _LOWEST_HZ]
    return window.astype(np.float32), (autocorrelation / autocorrelation[0]).astype(np.float32)
