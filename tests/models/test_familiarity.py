"""How like the training a recording is: the distance against its definition, and what the file keeps."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from pipeline.models.bundle import Bundle, BundleError, file_sha256, load_bundle, set_familiarity
from pipeline.models.doubt import NAME, Familiarity
from pipeline.storage.errors import SerError
from pipeline.training import results


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


@pytest.mark.parametrize(
    ("n_train", "n_held_out", "fitted"), [(600, 0, 0), (600, 20, 0), (600, 60, 600), (2100, 0, 2100)]
)
def test_a_network_that_knows_its_recordings_by_heart_does_not_call_others_no_speech(
    n_train: int, n_held_out: int, fitted: int, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    rng = np.random.default_rng(5)
    noise = np.full(n_train + n_held_out, 0.02)
    noise[n_train:] = 0.2  # ten times as far from the subspace as what it was trained on
    points = (training(len(noise)) + rng.standard_normal((len(noise), 160)) * noise[:, None]).astype(np.float32)
    ids = [str(row) for row in range(len(points))]
    arrays = SimpleNamespace(table=pd.DataFrame({"row_id": ids}), features=points)
    monkeypatch.setattr(results, "load_features", lambda *_: arrays)
    monkeypatch.setattr(results, "open_network", lambda _: None)
    monkeypatch.setattr(results, "embed", lambda _, features: features)
    assert results.learn_familiarity(bundle, [tmp_path], ids[:n_train], ids[n_train:]) == fitted
    found = load_bundle(bundle.folder).familiarity
    if n_held_out and fitted:
        assert found is not None
        assert (found.of(points[n_train:]) > found.least_of_speech).all()
        assert found.of(points[n_train:]).max() < 0.65 * found.of(points[:n_train]).min()  # the training alone would
