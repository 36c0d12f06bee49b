"""How much of a sound may be speech: physics, and voices that a synthesiser made."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import speech_like

from pipeline.audio.speech import LEAST_SHARE, speech_share

RATE_HZ = 48_000
T = np.arange(2 * RATE_HZ) / RATE_HZ


def noise(slope: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.standard_normal(len(T)))
    return np.fft.irfft(spectrum / np.maximum(np.fft.rfftfreq(len(T), 1 / RATE_HZ), 20) ** slope, len(T))


@pytest.mark.parametrize(
    "sound",
    [
        np.zeros(len(T)),
        np.full(len(T), 0.5),
        np.sin(2 * np.pi * 440 * T),
        np.sin(2 * np.pi * 120 * T),
        np.sin(2 * np.pi * (200 * T + 300 * T**2)),
        noise(0.0),
        noise(0.5),
        noise(1.0),
    ],
    ids=["silence", "offset", "tone", "low tone", "sweep", "white", "pink", "brown"],
)
def test_what_has_no_voice(sound: np.ndarray) -> None:
    sound = sound / max(np.abs(sound).max(), 1e-9) * 0.3
    assert speech_share(sound.astype(np.float32), RATE_HZ) < LEAST_SHARE


def test_a_voice_is_one_at_any_level_and_rate() -> None:
    voice = speech_like(duration_s=2.0, sample_rate_hz=RATE_HZ)
    share = speech_share(voice, RATE_HZ)
    assert share > 0.5
    assert speech_share(0.01 * voice, RATE_HZ) == pytest.approx(share, abs=0.05)
    assert speech_share(voice[::3].copy(), RATE_HZ // 3) == pytest.approx(share, abs=0.15)
    half = np.concatenate([voice, np.zeros_like(voice)])
    assert speech_share(half, RATE_HZ) == pytest.approx(share / 2, abs=0.1)


def test_of_less_than_half_a_second_it_cannot_be_told() -> None:
    assert np.isnan(speech_share(np.ones(20_000, np.float32), RATE_HZ))
