"""Models that are not the shipped one through every command that hears recordings, and the service.

The second model, ``cnn_bilstm`` on frame features; and the Inception on another contract: 3 s, bands up to 8 kHz.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from bundles import untrained
from serving import run

from jobs import infer, score
from pipeline.features.features import FeatureConfig, extract
from pipeline.inference.predictor import Predictor
from pipeline.models.bundle import Bundle
from serve.service import PredictRequest
from serve.worker import Worker

WriteAudio = Callable[..., Path]
OTHERS: dict[str, tuple[FeatureConfig, dict[str, float]]] = {
    "cnn_bilstm": (FeatureConfig(kind="frame_features"), {}),
    "inception": (FeatureConfig(window_s=3.0, hop_length=768, f_max_hz=8_000.0), {"width": 0.25}),
}


@pytest.fixture(scope="module", params=OTHERS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    config, options = OTHERS[request.param]
    return untrained(tmp_path_factory.mktemp("bundles") / "second", request.param, options, features=config, seed=1)


@pytest.fixture
def files(bundle: Bundle, write_audio: WriteAudio) -> list[Path]:
    voices = [{"f0_hz": 100.0 + 90 * i, "syllables_hz": 2.0 + 2 * i, "seed": i} for i in range(4)]
    wanted = {"duration_s": bundle.features.window_s, "sample_rate_hz": 48_000, "subtype": "FLOAT"}
    return [write_audio(f"in/{i}.wav", **wanted, **voice) for i, voice in enumerate(voices)]


def by_hand(bundle: Bundle, files: list[Path]) -> np.ndarray:
    """The network's probabilities of the files' samples."""
    features = np.stack([extract(soundfile.read(path, dtype="float32")[0], bundle.features) for path in files])
    with torch.inference_mode():
        found: np.ndarray = bundle.build_model()(torch.from_numpy(features)).double().softmax(dim=1).numpy()
    return found


@pytest.mark.usefixtures("in_this_process", "undrawn")
def test_every_command_and_the_service_give_the_network_s_answer(
    bundle: Bundle,
    files: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = by_hand(bundle, files)
    assert np.ptp(expected, axis=0).max() > 0.01, "the recordings sound alike: this test cannot fail"
    columns = [f"p_{label}" for label in bundle.labels]
    model = ["--model_weights", str(bundle.folder)]

    for backend in ("onnx", "torch"):
        assert infer.main([*model, "--json", "--backend", backend, "--file", *map(str, files)]) == 0
        answers = json.loads(capsys.readouterr().out)
        np.testing.assert_allclose([list(a["probabilities"].values()) for a in answers], expected, atol=1e-4)

    words = [*model, "--num_cpus", "0"]
    assert score.main([*words, "--input", str(tmp_path / "in"), "--out", str(tmp_path / "score"), "--no_report"]) == 0
    table = pd.read_parquet(tmp_path / "score" / "predictions.parquet")
    np.testing.assert_allclose(table[columns], expected, atol=1e-4)

    windows = ["--window_s", f"{bundle.features.window_s:g}", "--out", str(tmp_path / "windows"), "--no_report"]
    assert score.main([*words, "--input", str(tmp_path / "in"), *windows]) == 0
    segments = pd.read_parquet(tmp_path / "windows" / "segments.parquet")
    np.testing.assert_allclose(segments[columns], expected, atol=1e-4)

    worker = Worker(Predictor.from_bundle(bundle.folder, threads=1))
    worker.warm_up()
    heard = [run(worker.predict(path.read_bytes(), PredictRequest())).prediction.probabilities for path in files]
    np.testing.assert_allclose(heard, expected, atol=1e-4)
