"""How much of a sound may be speech, by energy and harmonicity.

A frame of 32 ms counts when it is not far below the loudest, and is voiced or next to a voiced one: its normalised
autocorrelation (Boersma 1993, "Accurate short-term analysis of the fundamental frequency") has a peak at a pitch of 75
to 400 Hz, its power lies in more than a few bins (a beep's does not), and its spectrum changes from frame to frame
(that of a hum does not). Limits: singing and instruments are harmonic too; whispering is not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, rfft

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
    sound = samples[: len(samples) // step * step].reshape(-1, step).mean(axis=1)
    if len(sound) < _RATE_HZ // 2:
        return float("nan")
    frames = sound[: len(sound) // _FRAME * _FRAME].reshape(-1, _FRAME)
    frames = frames - frames.mean(axis=1, keepdims=True)
    level_db = 10 * np.log10(np.maximum((frames**2).mean(axis=1), 1e-20))
    active = level_db >= max(level_db.max() - _DEEPEST_DB, _FAINTEST_DB)
    window = np.hanning(_FRAME).astype(np.float32)
    flat = np.diff(frames, axis=1, append=frames[:, -1:])  # else any low rumble is harmonic
    power = np.abs(rfft(flat * window, _SIZE)) ** 2
    power[:, : _LOWEST_HZ * _SIZE // _RATE_HZ] = 0
    total = np.maximum(power.sum(axis=1), 1e-20)
    of_window = irfft(np.abs(rfft(window, _SIZE)) ** 2)
    lags = slice(_RATE_HZ // _HIGHEST_HZ, _RATE_HZ // _LOWEST_HZ)
    found = irfft(power, axis=1)
    harmonicity = (found[:, lags] / np.maximum(found[:, :1], 1e-20) / (of_window[lags] / of_window[0])).max(axis=1)
    few = np.partition(power, -6, axis=1)[:, -6:].sum(axis=1) / total
    shape = np.sqrt(power / total[:, np.newaxis])
    same = (shape[1:] * shape[:-1]).sum(axis=1)
    changes = np.concatenate([same[:1], same]) < _STEADY
    voiced = active & (harmonicity >= _HARMONIC) & (few < _IN_FEW_BINS) & changes
    near = np.convolve(voiced, np.ones(2 * _NEAR + 1))[_NEAR : _NEAR + len(voiced)] > 0
    return float((near & active).mean())
