"""Occlusion maps against formulas: a network that is a known sum, and the shipped geometry of bands and frames."""

from __future__ import annotations

import librosa
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.features.features import FeatureConfig, FeatureError
from pipeline.inference.explain import OcclusionMap, band_borders_hz, occlusion_map
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle

Array = NDArray[np.float32]
Floats = NDArray[np.float64]
ROWS, COLUMNS = 4, 6
SHAPE = (1, 16, 30)


def linear(weights: Array, gain: float = 1.0) -> object:
    """Two classes; the log-odds of class 1 is the weighted sum over the picture."""

    def log_probabilities(pictures: Array) -> Floats:
        odds = gain * (pictures.astype(float) * weights).sum(axis=(1, 2, 3))
        return np.stack([-np.logaddexp(0, odds), -np.logaddexp(0, -odds)], axis=1)

    return log_probabilities


def explained(picture: Array, weights: Array, **options: object) -> OcclusionMap:
    found = occlusion_map(picture, linear(weights), target=1, rows=ROWS, columns=COLUMNS, **options)  # type: ignore[arg-type]
    return found


def test_of_a_linear_network_the_map_is_a_formula() -> None:
    rng = np.random.default_rng(0)
    picture = rng.normal(size=SHAPE).astype(np.float32)
    weights = (0.05 * rng.normal(size=SHAPE)).astype(np.float32)
    found = explained(picture, weights)
    share = (picture * weights)[0].astype(float).reshape(ROWS, 4, COLUMNS, 5).sum(axis=(1, 3))  # of each cell
    padded = np.pad(share, 1)
    for row, column in np.ndindex(ROWS, COLUMNS):
        patches = [padded[r : r + 2, c : c + 2].sum() for r in (row, row + 1) for c in (column, column + 1)]
        assert found.importance[row, column] == pytest.approx(np.mean(patches), abs=1e-6)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 5), (1, 4), (0, 5)])
def test_the_only_cell_that_matters_is_found(row: int, column: int) -> None:
    picture = np.ones(SHAPE, np.float32)
    weights = np.zeros(SHAPE, np.float32)
    weights[0, 4 * row : 4 * row + 4, 5 * column : 5 * column + 5] = 0.1
    found = explained(picture, weights)
    assert np.unravel_index(found.importance.argmax(), found.importance.shape) == (row, column)
    assert found.importance.max() == pytest.approx(0.1 * 20)
    away = [(r, c) for r, c in np.ndindex(ROWS, COLUMNS) if max(abs(r - row), abs(c - column)) > 1]
    assert all(found.importance[cell] == pytest.approx(0.0, abs=1e-9) for cell in away)


def test_a_cell_that_speaks_against_is_negative() -> None:
    weights = np.zeros(SHAPE, np.float32)
    weights[0, :4, :5] = -0.1
    assert explained(np.ones(SHAPE, np.float32), weights).importance[0, 0] == pytest.approx(-2.0)


def test_a_certain_network_is_explained_as_well() -> None:
    """Probabilities that round to 1 still have odds."""
    picture, weights = np.ones(SHAPE, np.float32), np.full(SHAPE, 0.5, np.float32)
    found = explained(picture, weights)
    assert np.exp(found.log_p[1]) == 1.0
    np.testing.assert_allclose(found.importance, 40.0 * 0.25 * _coverage(), rtol=1e-6)


def _coverage() -> Floats:
    """Sum of the cells in the four patches over each cell, in cells of 20 pictures' dots at weight 0.5."""
    inside = np.pad(np.ones((ROWS, COLUMNS)), 1)
    patches = inside[:-1, :-1] + inside[1:, :-1] + inside[:-1, 1:] + inside[1:, 1:]
    return (patches[:-1, :-1] + patches[1:, :-1] + patches[:-1, 1:] + patches[1:, 1:]) / 4


def test_a_picture_of_nothing_tells_nothing() -> None:
    found = explained(np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32))
    assert not found.importance.any()


@pytest.mark.parametrize(("bands", "frames", "rows", "columns"), [(64, 188, 8, 16), (7, 9, 3, 4), (5, 5, 5, 5)])
def test_every_band_and_frame_is_in_one_cell(bands: int, frames: int, rows: int, columns: int) -> None:
    shape = (1, bands, frames)
    found = occlusion_map(
        np.ones(shape, np.float32),
        linear(np.full(shape, 0.001, np.float32)),
        rows=rows,
        columns=columns,  # type: ignore[arg-type]
    )
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
    shape = config.input_shape
    found = occlusion_map(np.ones(shape, np.float32), linear(np.zeros(shape, np.float32)), target=0)  # type: ignore[arg-type]
    times = found.time_edges_s(config)
    frames_s = librosa.frames_to_time(found.frame_edges[1:-1], sr=config.sample_rate_hz, hop_length=config.hop_length)
    np.testing.assert_allclose(times[1:-1], frames_s - config.hop_length / config.sample_rate_hz / 2)
    assert (times[0], times[-1]) == (0.0, config.window_s)


@pytest.mark.parametrize("shape", [(188, 190), (2, 64, 188), (1, 64, 10), (1, 4, 188)])
def test_what_is_no_picture_or_too_small_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FeatureError):
        occlusion_map(np.zeros(shape, np.float32), linear(np.zeros(shape, np.float32)))  # type: ignore[arg-type]
