"""Temperature scaling: found again where it is known, answers unchanged, written into a bundle that still opens."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jobs.calibrate import main
from pipeline.inference.predictor import Predictor
from pipeline.models.backends import ensure_onnx
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.models.doubt import fit_temperature, scaled
from pipeline.storage.errors import SerError

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


def test_scaling_is_the_softmax_of_divided_logits_and_changes_no_answer() -> None:
    logits, _ = calibrated(1)
    before = softmax(logits)
    for temperature in (0.3, 1.0, 4.0):
        after = scaled(before, temperature)
        np.testing.assert_allclose(after, softmax(logits / temperature), atol=1e-9)
        assert (after.argmax(axis=1) == before.argmax(axis=1)).all()


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(SerError, match="3 recordings are too few"):
        fit_temperature(np.zeros(3, np.int64), np.full((3, 8), 1 / 8))
    broken = np.full((40, 8), np.nan)
    with pytest.raises(SerError, match="negative or missing"):
        fit_temperature(np.zeros(40, np.int64), broken)


def test_the_job_writes_a_bundle_that_answers_by_the_new_temperature(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.folder, folder)
    ensure_onnx(load_bundle(folder))
    logits, truth = calibrated()
    names = list(tiny_bundle.labels)
    table = pd.DataFrame({"speech": [f"{i}.wav" for i in range(N)], "status": "ok"})
    table["label_name"] = [names[i] for i in truth]
    table["predicted"], table["confidence"] = table["label_name"], 0.5
    table[[f"p_{name}" for name in names]] = softmax(2 * logits)
    table.to_parquet(tmp_path / "predictions.parquet")
    features = np.random.default_rng(0).standard_normal((3, *tiny_bundle.features.input_shape)).astype(np.float32)
    before = Predictor.from_bundle(folder, backend="onnx").probabilities(features)
    assert main(["--model_weights", str(folder), "--predictions", str(tmp_path)]) == 0
    assert "temperature 1.9" in capsys.readouterr().err
    bundle = load_bundle(folder)
    assert bundle.metrics["calibration"]["temperature"] == bundle.temperature == pytest.approx(2, rel=0.05)
    assert bundle.metrics["calibration"]["model_sha256"] == bundle.weights_sha256
    after = Predictor.from_bundle(folder, backend="onnx").probabilities(features)
    np.testing.assert_allclose(after, scaled(before, bundle.temperature), atol=1e-5)


def test_the_job_refuses_answers_without_labels(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pd.DataFrame({"speech": ["a.wav"], "status": ["ok"]}).to_parquet(tmp_path / "predictions.parquet")
    assert main(["--model_weights", str(tiny_bundle.folder), "--predictions", str(tmp_path)]) == 2
    assert "label_name" in capsys.readouterr().err


def answers(bundle: Bundle, logits: np.ndarray, truth: np.ndarray, out: Path, temperature: float) -> pd.DataFrame:
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


def test_answers_that_are_scaled_already_are_taken_back_first(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Scores of a calibrated bundle lead to its temperature again, not to 1."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.folder, folder)
    logits, truth = calibrated()
    table = answers(tiny_bundle, 2 * logits, truth, tmp_path / "scores", 1.6)
    assert main(["--model_weights", str(folder), "--predictions", str(tmp_path / "scores")]) == 0
    assert load_bundle(folder).temperature == pytest.approx(2, rel=0.05)
    own = tmp_path / "own"
    own.mkdir()
    table.drop(columns="status").to_csv(own / "answers.csv", index=False)  # of others: all answered, at temperature 1
    assert main(["--model_weights", str(folder), "--predictions", str(own / "answers.csv")]) == 0
    assert load_bundle(folder).temperature == pytest.approx(2 / 1.6, rel=0.05)


def test_what_a_model_was_trained_on_does_not_set_its_temperature(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is sure of those, and right: with them, a temperature would make it sure of everything."""
    folder, out = tmp_path / "bundle", tmp_path / "scores"
    shutil.copytree(tiny_bundle.folder, folder)
    logits, truth = calibrated()
    logits[: N // 2] = 30 * np.eye(CLASSES)[truth[: N // 2]]
    answers(tiny_bundle, 2 * logits, truth, out, 1.0)
    heard = pd.DataFrame({"id": [str(i) for i in range(N)], "content_hash": "", "split": "train"})
    heard.loc[N // 2 :, "split"] = "test"  # kept from it, so they count; so do those that only chose its epoch
    heard.loc[3 * N // 4 :, "split"] = "inner_val"
    heard.to_csv(folder / "training.csv", index=False)
    assert main(["--model_weights", str(folder), "--predictions", str(out)]) == 0
    assert f"{N // 2} of {N}" in capsys.readouterr().err
    assert load_bundle(folder).temperature == pytest.approx(2, rel=0.05)
    assert load_bundle(folder).metrics["calibration"]["n"] == N // 2
    heard.assign(split="train").to_csv(folder / "training.csv", index=False)
    assert main(["--model_weights", str(folder), "--predictions", str(out)]) == 2
    assert "0 recordings" in capsys.readouterr().err
    assert load_bundle(folder).metrics["calibration"]["n"] == N // 2


def test_answers_of_another_model_are_refused(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(dataclasses.replace(tiny_bundle, weights_sha256="0" * 64), *calibrated(), tmp_path / "scores", 1.0)
    before = load_bundle(tiny_bundle.folder).temperature
    assert main(["--model_weights", str(tiny_bundle.folder), "--predictions", str(tmp_path / "scores")]) == 2
    assert "000000000000" in capsys.readouterr().err
    for damaged in ("{", "[]", '{"plan": {}}'):
        (tmp_path / "scores" / "run.json").write_text(damaged, encoding="utf-8")
        assert main(["--model_weights", str(tiny_bundle.folder), "--predictions", str(tmp_path / "scores")]) == 2
        assert "run.json" in capsys.readouterr().err
    assert load_bundle(tiny_bundle.folder).temperature == before
