"""Temperature scaling, and familiarity: found again where known, against their definitions, kept in a bundle."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from jobs.calibrate import main
from pipeline.inference.predictor import Predictor
from pipeline.models.backends import ensure_onnx
from pipeline.models.bundle import Bundle, BundleError, file_sha256, load_bundle, set_familiarity
from pipeline.models.doubt import NAME, Familiarity, fit_temperature, scaled
from pipeline.storage.errors import SerError
from pipeline.training import results

N, CLASSES = 4000, 8


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def calibrated(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, 8) whose softmax is the very chance of the drawn truth (N,)."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((N, CLASSES))
    truth = np.array([rng.choice(CLASSES, p=p) for p in softmax(logits)])
    return logits, truth


@pytest.mark.parametrize("overconfidence", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_found_again(overconfidence: float) -> None:
    logits, truth = calibrated()
    found = fit_temperature(truth, softmax(logits * overconfidence))
    assert found.temperature == pytest.approx(overconfidence, rel=0.05)
    assert found.n == N
    assert found.after["log_loss"] <= found.before["log_loss"] + 1e-9
    assert found.after["ece"] < 0.03
    if overconfidence != 1:
        assert found.after["ece"] < found.before["ece"]


def test_scaling_is_the_softmax_of_divided_logits() -> None:
    logits, _ = calibrated(1)
    for temperature in (0.3, 1.0, 4.0):
        np.testing.assert_allclose(scaled(softmax(logits), temperature), softmax(logits / temperature), atol=1e-9)


def test_what_cannot_be_fitted_is_refused() -> None:
    for p, word in ((np.full((3, 8), 1 / 8), "too few"), (np.full((40, 8), np.nan), "missing")):
        with pytest.raises(SerError, match=word):
            fit_temperature(np.zeros(len(p), np.int64), p)


@pytest.fixture
def folder(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the tiny bundle."""
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))


def calibrate(folder: Path, predictions: Path) -> int:
    return main(["--model_weights", str(folder), "--predictions", str(predictions)])


def answers(bundle: Bundle, logits: np.ndarray, truth: np.ndarray, out: Path, temperature: float = 1.0) -> pd.DataFrame:
    """Labelled scores of ``bundle`` at ``temperature``, written into ``out`` as jobs.score leaves them."""
    out.mkdir(exist_ok=True)
    table = pd.DataFrame({"speech": [f"{i}.wav" for i in range(len(truth))], "status": "ok"})
    table["label_name"] = [bundle.labels[i] for i in truth]
    table["predicted"], table["confidence"] = table["label_name"], 0.5
    table[[f"p_{name}" for name in bundle.labels]] = softmax(logits / temperature)
    table.to_parquet(out / "predictions.parquet")
    plan = {"plan": {"temperature": temperature, "model": bundle.weights_sha256}}
    (out / "run.json").write_text(json.dumps(plan), encoding="utf-8")
    return table


def test_the_job_writes_a_bundle_that_answers_by_the_new_temperature(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ensure_onnx(load_bundle(folder))
    logits, truth = calibrated()
    table = answers(load_bundle(folder), 2 * logits, truth, tmp_path / "scores")
    (tmp_path / "scores" / "run.json").unlink()
    shape = load_bundle(folder).features.input_shape
    features = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    before = Predictor.from_bundle(folder, backend="onnx").probabilities(features)
    assert calibrate(folder, tmp_path / "scores") == 0
    assert "temperature 1.9" in capsys.readouterr().err
    bundle = load_bundle(folder)
    assert bundle.metrics["calibration"]["temperature"] == bundle.temperature == pytest.approx(2, rel=0.05)
    assert bundle.metrics["calibration"]["model_sha256"] == bundle.weights_sha256
    after = Predictor.from_bundle(folder, backend="onnx").probabilities(features)
    np.testing.assert_allclose(after, scaled(before, bundle.temperature), atol=1e-5)
    table.drop(columns="label_name").to_parquet(tmp_path / "scores" / "predictions.parquet")
    assert calibrate(folder, tmp_path / "scores") == 2
    assert "label_name" in capsys.readouterr().err


def test_answers_that_are_scaled_already_are_taken_back_first(folder: Path, tmp_path: Path) -> None:
    """Scores of a calibrated bundle lead to its temperature again, not to 1."""
    logits, truth = calibrated()
    table = answers(load_bundle(folder), 2 * logits, truth, tmp_path / "scores", 1.6)
    assert calibrate(folder, tmp_path / "scores") == 0
    assert load_bundle(folder).temperature == pytest.approx(2, rel=0.05)
    others = tmp_path / "answers.csv"
    table.drop(columns="status").to_csv(others, index=False)  # all answered, at temperature 1
    assert calibrate(folder, others) == 0
    assert load_bundle(folder).temperature == pytest.approx(2 / 1.6, rel=0.05)


def test_what_a_model_was_trained_on_does_not_set_its_temperature(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is sure of those, and right: with them, a temperature would make it sure of everything."""
    out = tmp_path / "scores"
    logits, truth = calibrated()
    logits[: N // 2] = 30 * np.eye(CLASSES)[truth[: N // 2]]
    answers(load_bundle(folder), 2 * logits, truth, out)
    heard = pd.DataFrame({"id": [str(i) for i in range(N)], "content_hash": "", "split": "train"})
    heard.loc[N // 2 :, "split"] = "test"  # kept from it, so they count; so do those that only chose its epoch
    heard.loc[3 * N // 4 :, "split"] = "inner_val"
    heard.to_csv(folder / "training.csv", index=False)
    assert calibrate(folder, out) == 0
    assert f"{N // 2} of {N}" in capsys.readouterr().err
    assert load_bundle(folder).temperature == pytest.approx(2, rel=0.05)
    assert load_bundle(folder).metrics["calibration"]["n"] == N // 2
    heard.assign(split="train").to_csv(folder / "training.csv", index=False)
    assert calibrate(folder, out) == 2
    assert "0 recordings" in capsys.readouterr().err
    assert load_bundle(folder).metrics["calibration"]["n"] == N // 2


def test_answers_of_another_model_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, before = tmp_path / "scores", load_bundle(folder).temperature
    answers(dataclasses.replace(load_bundle(folder), weights_sha256="0" * 64), *calibrated(), out)
    for told, word in ((None, "000000000000"), ("{", "run.json"), ("[]", "run.json"), ('{"plan": {}}', "run.json")):
        if told is not None:
            (out / "run.json").write_text(told, encoding="utf-8")
        assert calibrate(folder, out) == 2
        assert word in capsys.readouterr().err
    assert load_bundle(folder).temperature == before


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
    with pytest.raises(SerError, match="too few"):
        Familiarity.fit(np.ones((3, 8), np.float32))


def test_a_bundle_keeps_the_familiarity(folder: Path) -> None:
    bundle, found = load_bundle(folder), Familiarity.fit(training())
    set_familiarity(bundle, found)
    again = load_bundle(folder)
    assert again.familiarity is not None
    strange = np.random.default_rng(4).standard_normal((20, 160)).astype(np.float32)
    np.testing.assert_allclose(again.familiarity.of(strange), found.of(strange), atol=1e-3)
    (folder / NAME).write_bytes(b"damaged")
    with pytest.raises(BundleError, match="config"):
        load_bundle(folder)
    assert file_sha256(bundle.weights_path) == bundle.weights_sha256


@pytest.mark.parametrize(
    ("n_train", "n_held_out", "fitted"), [(600, 0, 0), (600, 20, 0), (600, 60, 600), (2100, 0, 2100)]
)
def test_a_network_that_knows_its_recordings_by_heart_does_not_call_others_no_speech(
    n_train: int, n_held_out: int, fitted: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, n = load_bundle(folder), n_train + n_held_out
    noise = np.where(np.arange(n) < n_train, 0.02, 0.2)  # the others are ten times as far from the subspace
    points = training(n) + np.random.default_rng(5).standard_normal((n, 160)) * noise[:, None]
    points, ids = points.astype(np.float32), [str(row) for row in range(n)]
    arrays = SimpleNamespace(table=pd.DataFrame({"row_id": ids}), features=points)
    monkeypatch.setattr(results, "load_features", lambda *_: arrays)
    monkeypatch.setattr(results, "open_network", lambda _: None)
    monkeypatch.setattr(results, "embed", lambda _, features: features)
    assert results.learn_familiarity(bundle, [folder], ids[:n_train], ids[n_train:]) == fitted
    found = load_bundle(bundle.folder).familiarity
    if n_held_out and fitted:
        assert found is not None
        assert (found.of(points[n_train:]) > found.least_of_speech).all()
        assert found.of(points[n_train:]).max() < 0.65 * found.of(points[:n_train]).min()  # the training alone would
