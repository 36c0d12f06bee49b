"""How like the training a recording is: the distance against its definition, and what the file keeps."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.models.bundle import Bundle, BundleError, file_sha256, load_bundle, set_familiarity
from pipeline.models.doubt import NAME, Familiarity
from pipeline.storage.errors import SerError


def training(n: int = 600, d: int = 160, k: int = 5) -> np.ndarray:
    """Points near a k-dimensional flat, positive as what a ReLU gives."""
    rng = np.random.default_rng(0)
    return (3 + rng.standard_normal((n, k)) @ rng.standard_normal((k, d)) * 0.5).astype(np.float32)


def test_the_distance_is_that_from_the_principal_components() -> None:
    rng = np.random.default_rng(1)
    points = (training() + 0.1 * rng.standard_normal((600, 160))).astype(np.float32)
    found = Familiarity.fit(points)
    unit = points.astype(float) / np.linalg.norm(points.astype(float), axis=1, keepdims=True)
    off = unit - unit.mean(axis=0)
    _, _, directions = np.linalg.svd(off, full_matrices=False)  # the oracle: numpy's singular vectors
    rest = off - off @ directions[:64].T @ directions[:64]
    distance = np.linalg.norm(rest, axis=1)
    np.testing.assert_allclose(found.of(points), np.minimum(1, np.median(distance) / distance), rtol=1e-6)
    assert 0 < found.least_of_speech < found.least < 1


def test_what_is_unlike_the_training_is_less_familiar_and_loudness_does_not_matter() -> None:
    points = training()
    found = Familiarity.fit(points + np.random.default_rng(2).normal(0, 0.05, points.shape).astype(np.float32))
    strange = np.abs(np.random.default_rng(3).standard_normal((50, 160))).astype(np.float32)
    assert found.of(strange).max() < found.of(points).min()
    np.testing.assert_allclose(found.of(7 * strange), found.of(strange), rtol=1e-6)
    assert np.isfinite(found.of(np.zeros((1, 160), np.float32))).all()


def test_a_bundle_keeps_it(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = load_bundle(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    found = Familiarity.fit(training())
    set_familiarity(bundle, found)
    again = load_bundle(bundle.folder)
    assert again.familiarity is not None
    strange = np.random.default_rng(4).standard_normal((20, 160)).astype(np.float32)
    np.testing.assert_allclose(again.familiarity.of(strange), found.of(strange), atol=1e-3)
    (bundle.folder / NAME).write_bytes(b"damaged")
    with pytest.raises(BundleError, match="config"):
        load_bundle(bundle.folder)
    assert file_sha256(bundle.weights_path) == bundle.weights_sha256


def test_too_few_recordings() -> None:
    with pytest.raises(SerError, match="3 recordings are too few"):
        Familiarity.fit(np.ones((3, 8), np.float32))
