"""Occlusion maps against formulas, and what the model sees, drawn: geometry, extremes, levels, padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from pipeline.audio.load import load, load_middle
from pipeline.features.features import FeatureConfig, FeatureError
from pipeline.inference.explain import OUTLINE_S, Overview, Picture, band_borders_hz, draw, occlusion_map, outline_part
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle

Array = NDArray[np.float32]
Floats = NDArray[np.float64]
ROWS, COLUMNS = 4, 6
SHAPE = (1, 16, 30)


def linear(weights: Array) -> Callable[[Array], Floats]:
    """Two classes; the log-odds of class 1 is the weighted sum over the picture."""

    def log_probabilities(pictures: Array) -> Floats:
        odds = (pictures.astype(float) * weights).sum(axis=(1, 2, 3))
        return np.stack([-np.logaddexp(0, odds), -np.logaddexp(0, -odds)], axis=1)

    return log_probabilities


def mean_of_patches(share: Floats) -> Floats:
    """Of the four patches over each cell, the mean of what their cells hold together."""
    padded = np.pad(share, 1)
    patches = padded[:-1, :-1] + padded[1:, :-1] + padded[:-1, 1:] + padded[1:, 1:]
    return (patches[:-1, :-1] + patches[1:, :-1] + patches[:-1, 1:] + patches[1:, 1:]) / 4


def test_of_a_linear_network_the_map_is_a_formula() -> None:
    rng = np.random.default_rng(0)
    picture = rng.normal(size=SHAPE).astype(np.float32)
    weights = (0.05 * rng.normal(size=SHAPE)).astype(np.float32)
    found = occlusion_map(picture, linear(weights), target=1, rows=ROWS, columns=COLUMNS)
    share = (picture * weights)[0].astype(float).reshape(ROWS, 4, COLUMNS, 5).sum(axis=(1, 3))  # of each cell
    np.testing.assert_allclose(found.importance, mean_of_patches(share), atol=1e-6)


def test_a_certain_network_is_explained_as_well() -> None:
    """Probabilities that round to 1 still have odds."""
    picture, network = np.ones(SHAPE, np.float32), linear(np.full(SHAPE, 0.5, np.float32))
    found = occlusion_map(picture, network, target=1, rows=ROWS, columns=COLUMNS)
    assert np.exp(found.log_p[1]) == 1.0
    np.testing.assert_allclose(found.importance, 10.0 * mean_of_patches(np.ones((ROWS, COLUMNS))), rtol=1e-6)


@pytest.mark.parametrize(("bands", "frames", "rows", "columns"), [(64, 188, 8, 16), (7, 9, 3, 4), (5, 5, 5, 5)])
def test_every_band_and_frame_is_in_one_cell(bands: int, frames: int, rows: int, columns: int) -> None:
    picture = np.ones((1, bands, frames), np.float32)
    found = occlusion_map(picture, linear(0.001 * picture), rows=rows, columns=columns)
    for edges, size, count in ((found.band_edges, bands, rows), (found.frame_edges, frames, columns)):
        assert (edges[0], edges[-1], len(edges)) == (0, size, count + 1)
        assert (np.diff(edges) >= 1).all()


def test_the_most_probable_class_is_the_default(tiny_bundle: Bundle) -> None:
    predictor = Predictor.from_bundle(tiny_bundle.folder, threads=1)
    picture = np.random.default_rng(1).normal(size=tiny_bundle.features.input_shape).astype(np.float32)
    found = occlusion_map(picture, predictor.log_probabilities, rows=2, columns=2)
    expected = predictor.log_probabilities(picture[np.newaxis])[0]
    np.testing.assert_allclose(found.log_p, expected, atol=1e-5)
    assert found.target == expected.argmax()
    assert found.importance.shape == (2, 2)


def test_axes_are_those_of_librosa() -> None:
    config = FeatureConfig()
    centres = librosa.mel_frequencies(config.n_mels + 2, fmin=0, fmax=config.sample_rate_hz / 2)[1:-1]
    borders = band_borders_hz(config)
    assert len(borders) == config.n_mels + 1
    assert (borders[:-1] < centres).all()
    assert (centres < borders[1:]).all()
    np.testing.assert_allclose(borders[1:-1], (centres[:-1] + centres[1:]) / 2, rtol=1e-6)
    nothing = np.zeros(config.input_shape, np.float32)
    found = occlusion_map(nothing, linear(nothing), target=0)
    times = found.time_edges_s(config)
    frames_s = librosa.frames_to_time(found.frame_edges[1:-1], sr=config.sample_rate_hz, hop_length=config.hop_length)
    np.testing.assert_allclose(times[1:-1], frames_s - config.hop_length / config.sample_rate_hz / 2)
    assert (times[0], times[-1]) == (0.0, config.window_s)


@pytest.mark.parametrize("shape", [(188, 190), (2, 64, 188), (1, 64, 10), (1, 4, 188)])
def test_what_is_no_picture_or_too_small_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FeatureError):
        occlusion_map(np.zeros(shape, np.float32), linear(np.zeros(shape, np.float32)))


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
def test_a_tone_is_loudest_in_its_band_of_the_middle_window(tmp_path: Path, frequency_hz: float) -> None:
    picture = drawn(recording(tmp_path, 5.0, frequency_hz))
    band = int(picture.level_db.mean(axis=1).argmax())
    assert band == np.abs(picture.frequency_hz - frequency_hz).argmin()
    centres = librosa.mel_frequencies(CONFIG.n_mels + 2, fmin=0, fmax=CONFIG.sample_rate_hz / 2)[1:-1]
    np.testing.assert_allclose(picture.frequency_hz, centres, rtol=1e-6)
    assert picture.level_db.shape == (CONFIG.n_mels, CONFIG.n_frames)
    assert picture.level_db.max() == 0.0
    assert picture.level_db.min() >= -CONFIG.top_db
    assert picture.window_start_s == picture.time_s[0] == pytest.approx(1.5)
    assert picture.time_s[-1] == pytest.approx(3.5, abs=CONFIG.hop_length / CONFIG.sample_rate_hz)
    assert (picture.outline_start_s, picture.outline_end_s) == (0.0, pytest.approx(5.0))


def test_a_short_recording_lies_between_padding_and_of_a_long_one_the_middle_is_outlined(tmp_path: Path) -> None:
    short = drawn(recording(tmp_path, 1.0))
    assert short.window_start_s == pytest.approx(-0.5)
    silent = (short.time_s < -0.05) | (short.time_s > 1.05)
    assert (short.level_db[:, silent] == -CONFIG.top_db).all()
    sounding = (short.time_s > 0.05) & (short.time_s < 0.95)
    assert (short.level_db[:, sounding].max(axis=0) > -10).all()
    long = drawn(recording(tmp_path, 50.0, rate_hz=8_000))
    assert long.outline_start_s == pytest.approx(10.0)
    assert long.outline_end_s - long.outline_start_s == pytest.approx(OUTLINE_S)
    soundfile.write(tmp_path / "silence.wav", np.zeros(16_000), 16_000)
    assert (drawn(tmp_path / "silence.wav").level_db == -CONFIG.top_db).all()


def test_outline_holds_the_extremes(tmp_path: Path) -> None:
    path = recording(tmp_path, 0.5, rate_hz=8_000)
    samples = load(path).samples
    for points in (1, 7, 600, 10**6):
        picture = drawn(path, points)
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
