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
from serve.service import PredictRequest
from serve.worker import Worker


@pytest.mark.usefixtures("in_this_process", "undrawn")
@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("cnn_bilstm", FeatureConfig(kind="frame_features"), {}),
        ("inception", FeatureConfig(window_s=3.0, hop_length=768, f_max_hz=8_000.0), {"width": 0.25}),
    ],
)
def test_every_command_and_the_service_give_the_network_s_answer(
    name: str,
    config: FeatureConfig,
    options: dict[str, float],
    tmp_path: Path,
    write_audio: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = untrained(tmp_path / "second", name, options, features=config, seed=1)
    files = []
    for i in range(4):
        voice = {"f0_hz": 100.0 + 90 * i, "syllables_hz": 2.0 + 2 * i, "seed": i, "duration_s": config.window_s}
        files.append(write_audio(f"in/{i}.wav", sample_rate_hz=48_000, subtype="FLOAT", **voice))
    features = np.stack([extract(soundfile.read(path, dtype="float32")[0], config) for path in files])
    with torch.inference_mode():
        expected = bundle.build_model()(torch.from_numpy(features)).double().softmax(dim=1).numpy()
    assert np.ptp(expected, axis=0).max() > 0.01, "the recordings sound alike: this test cannot fail"

    found = {}
    model = ["--model_weights", str(bundle.folder)]
    for backend in ("onnx", "torch"):
        assert infer.main([*model, "--json", "--backend", backend, "--file", *map(str, files)]) == 0
        answers = json.loads(capsys.readouterr().out)
        found[backend] = [list(answer["probabilities"].values()) for answer in answers]

    words = [*model, "--num_cpus", "0", "--no_report", "--input", str(tmp_path / "in"), "--out"]
    columns = [f"p_{label}" for label in bundle.labels]
    assert score.main([*words, str(tmp_path / "score")]) == 0
    found["score"] = pd.read_parquet(tmp_path / "score" / "predictions.parquet")[columns]
    assert score.main([*words, str(tmp_path / "windows"), "--window_s", f"{config.window_s:g}"]) == 0
    found["windows"] = pd.read_parquet(tmp_path / "windows" / "segments.parquet")[columns]

    worker = Worker(Predictor.from_bundle(bundle.folder, threads=1))
    worker.warm_up()
    heard = [run(worker.predict(path.read_bytes(), PredictRequest())) for path in files]
    found["service"] = [answer.prediction.probabilities for answer in heard]
    for way, probabilities in found.items():
        np.testing.assert_allclose(probabilities, expected, atol=1e-4, err_msg=way)
