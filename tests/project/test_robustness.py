"""The changes of ``benchmarks.robustness`` do what their names say."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from benchmarks.robustness import changes, encoded, gain, noisy, shifted, telephone, through_rate

RATE_HZ = 48_000
T = np.arange(RATE_HZ) / RATE_HZ


def tone(hz: float, peak: float = 0.25) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * hz * T)).astype(np.float32)


def rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))


def test_gain_and_shift() -> None:
    assert rms(gain(tone(440), 6)) / rms(tone(440)) == pytest.approx(10 ** (6 / 20))
    later = shifted(tone(440), RATE_HZ, 0.010)
    assert len(later) == RATE_HZ
    assert not later[:480].any()
    np.testing.assert_array_equal(later[480:], tone(440)[:-480])


def test_noise_has_the_ratio_it_says() -> None:
    added = noisy(tone(440), 30, seed=0) - tone(440)
    assert 20 * np.log10(rms(tone(440)) / rms(added)) == pytest.approx(30, abs=0.2)


@pytest.mark.parametrize(("hz", "kept"), [(1_000, True), (12_000, False)])
def test_a_narrow_rate_keeps_only_what_is_below_half_of_it(hz: float, kept: bool) -> None:
    assert (rms(through_rate(tone(hz), RATE_HZ, 16_000)) > 0.9 * rms(tone(hz))) == kept


@pytest.mark.parametrize(("hz", "kept"), [(100, False), (1_000, True), (8_000, False)])
def test_the_telephone_band(hz: float, kept: bool) -> None:
    assert (rms(telephone(tone(hz), RATE_HZ)) > 0.7 * rms(tone(hz))) == kept


def test_every_change_makes_a_file_of_the_same_length() -> None:
    for name, make in changes(seed=0).items():
        samples, rate_hz = soundfile.read(io.BytesIO(make(tone(440), RATE_HZ)))
        assert rate_hz == RATE_HZ, name
        assert len(samples) == pytest.approx(RATE_HZ, abs=3_000), name  # MP3 pads to whole frames


def test_mp3_is_about_128_kbit_a_second() -> None:
    minute = np.tile(noisy(tone(440), 10, seed=1), 20)
    assert len(encoded(minute, RATE_HZ, "MP3")) * 8 / 20 == pytest.approx(128_000, rel=0.15)
