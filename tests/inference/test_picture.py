"""What the model sees, drawn: geometry, extremes, levels, padding."""

from __future__ import annotations

from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile

from pipeline.audio.load import load, load_middle
from pipeline.features.features import FeatureConfig
from pipeline.inference.explain import OUTLINE_S, Overview, Picture, draw, outline_part

CONFIG = FeatureConfig()
AT_ONCE_S = 7.0


def drawn(path: Path, points: int = 600) -> Picture:
    window = load_middle(path, window_s=CONFIG.window_s, sample_rate_hz=CONFIG.sample_rate_hz)
    overview = Overview(*outline_part(window.info.duration_s, window.info.duration_s / 2), CONFIG, points)
    for start_s in np.arange(overview.start_s, overview.start_s + overview.length_s, AT_ONCE_S):
        left_s = overview.start_s + overview.length_s - start_s
        overview.add(load(path, start_s=start_s, duration_s=min(AT_ONCE_S, left_s)))
    return draw(window, overview, CONFIG)


def recording(folder: Path, duration_s: float, frequency_hz: float = 1_000.0, rate_hz: int = 48_000) -> Path:
    path = folder / "tone.wav"
    time_s = np.arange(round(duration_s * rate_hz)) / rate_hz
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * frequency_hz * time_s), rate_hz)
    return path


@pytest.mark.parametrize("frequency_hz", [300.0, 1_000.0, 5_000.0])
def test_a_tone_is_loudest_in_its_band(tmp_path: Path, frequency_hz: float) -> None:
    picture = drawn(recording(tmp_path, 3.0, frequency_hz))
    band = int(picture.level_db.mean(axis=1).argmax())
    assert band == np.abs(picture.frequency_hz - frequency_hz).argmin()
    centres = librosa.mel_frequencies(CONFIG.n_mels + 2, fmin=0, fmax=CONFIG.sample_rate_hz / 2)[1:-1]
    np.testing.assert_allclose(picture.frequency_hz, centres, rtol=1e-6)


def test_levels_are_below_the_loudest(tmp_path: Path) -> None:
    picture = drawn(recording(tmp_path, 3.0))
    assert picture.level_db.max() == 0.0
    assert picture.level_db.min() >= -CONFIG.top_db
    assert picture.level_db.shape == (CONFIG.n_mels, CONFIG.n_frames)


def test_the_window_is_the_middle(tmp_path: Path) -> None:
    picture = drawn(recording(tmp_path, 5.0))
    assert picture.window_start_s == pytest.approx(1.5)
    assert picture.time_s[0] == pytest.approx(1.5)
    assert picture.time_s[-1] == pytest.approx(3.5, abs=CONFIG.hop_length / CONFIG.sample_rate_hz)
    assert (picture.outline_start_s, picture.outline_end_s) == (0.0, pytest.approx(5.0))


def test_a_short_recording_lies_between_padding(tmp_path: Path) -> None:
    picture = drawn(recording(tmp_path, 1.0))
    assert picture.window_start_s == pytest.approx(-0.5)
    silent = (picture.time_s < -0.05) | (picture.time_s > 1.05)
    assert (picture.level_db[:, silent] == -CONFIG.top_db).all()
    sounding = (picture.time_s > 0.05) & (picture.time_s < 0.95)
    assert (picture.level_db[:, sounding].max(axis=0) > -10).all()


def test_silence_is_dark(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(16_000), 16_000)
    assert (drawn(tmp_path / "silence.wav").level_db == -CONFIG.top_db).all()


def test_of_a_long_recording_the_middle_is_outlined(tmp_path: Path) -> None:
    picture = drawn(recording(tmp_path, 50.0, rate_hz=8_000))
    assert picture.outline_start_s == pytest.approx(10.0)
    assert picture.outline_end_s - picture.outline_start_s == pytest.approx(OUTLINE_S)


@pytest.mark.parametrize("points", [1, 7, 600, 10**6])
def test_outline_holds_the_extremes(tmp_path: Path, points: int) -> None:
    path = recording(tmp_path, 0.5, rate_hz=8_000)
    picture = drawn(path, points)
    samples = load(path).samples
    assert len(picture.low) == len(picture.high) == min(points, len(samples))
    assert (picture.low <= picture.high).all()
    assert picture.low.min() == pytest.approx(samples.min())
    assert picture.high.max() == pytest.approx(samples.max())


def test_the_overview_is_loud_where_and_when_the_recording_is(tmp_path: Path) -> None:
    """40 s of nothing but a second of 1 kHz at 20 s: one column after the other, in minutes of audio or seconds."""
    rate_hz = 16_000
    samples = np.zeros(40 * rate_hz)
    at = np.arange(20 * rate_hz, 21 * rate_hz)
    samples[at] = 0.5 * np.sin(2 * np.pi * 1_000 * at / rate_hz)
    soundfile.write(tmp_path / "once.wav", samples, rate_hz)
    overview = Overview(0.0, 40.0, CONFIG)
    for start_s in (0.0, 15.0, 30.0):
        overview.add(load(tmp_path / "once.wav", start_s=start_s, duration_s=15.0))
    level_db, (low, high) = overview.level_db, overview.outline
    column_s = 40.0 / level_db.shape[1]
    middle_s = (np.arange(level_db.shape[1]) + 0.5) * column_s
    loud = level_db.max(axis=0) > -20
    assert abs(loud.sum() * column_s - 1.0) < 3 * column_s
    assert 20 - column_s < middle_s[loud].min() < middle_s[loud].max() < 21 + column_s
    band = int(level_db[:, loud].mean(axis=1).argmax())
    assert band == np.abs(drawn(tmp_path / "once.wav").frequency_hz - 1_000).argmin()
    seconds = np.linspace(0, 40, len(high), endpoint=False)
    assert high[(seconds > 20) & (seconds < 20.9)].min() > 0.4 > 0.05 > high[(seconds < 19.9) | (seconds > 21.1)].max()
    assert (low <= high).all()
