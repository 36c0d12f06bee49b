"""Small training data in memory and on disk: tiny pictures that a linear model can tell apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from pipeline.features.features import FeatureConfig, normalise_power
from pipeline.features.store import SHARD_VERSION
from pipeline.training.batches import TrainingData

CONFIG = FeatureConfig(sample_rate_hz=8000, window_s=0.5, n_mels=16, n_fft=256, hop_length=128)  # (1, 16, 32)
FRAMES = 3 * CONFIG.n_frames  # of a whole recording
LABELS = ("calm", "happy", "sad")


def mel_powers(n: int, n_classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Power (n, 16, 96) whose loud bands give the class away, and the classes (n,), class i % n_classes."""
    rng = np.random.default_rng(seed)
    power = rng.exponential(0.01, (n, CONFIG.n_mels, FRAMES)).astype(np.float32)
    classes = np.arange(n) % n_classes
    for row, index in enumerate(classes):
        power[row, 2 + 4 * index : 5 + 4 * index] *= 100
    return power, classes


def middle(power: np.ndarray) -> np.ndarray:
    """The stored feature of a recording's mel power: its middle window, standardised."""
    start = (power.shape[-1] - CONFIG.n_frames) // 2
    return normalise_power(power[:, start : start + CONFIG.n_frames], CONFIG)


def toy_data(n: int = 24, n_valid: int = 6, n_classes: int = 3, seed: int = 0, **changes: Any) -> TrainingData:
    """`n` training clips and `n_valid` validation clips after them."""
    power, classes = mel_powers(n + n_valid, n_classes, seed)
    values: dict[str, Any] = {
        "config": CONFIG,
        "features": np.stack([middle(p) for p in power]),
        "classes": classes,
        "n_classes": n_classes,
        "train_rows": np.arange(n),
        "valid_rows": np.arange(n, n + n_valid),
        "mel_power": power,
        "n_frames": np.full(len(power), FRAMES),
    }
    return TrainingData(**{**values, **changes})


def toy_model(n_classes: int = 3) -> nn.Module:
    """Batch norm and dropout in a few weights, so that all that a loop must take care of is there."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * 7 * 15, n_classes),
    )


def write_features(folder: Path, n: int = 60, *, copies: int = 0) -> Path:
    """A feature folder as `jobs.extract` leaves it: `n` clips of three classes, each with `copies` shifted copies."""
    folder.mkdir(parents=True)
    power, classes = mel_powers(n)
    rows: list[dict[str, Any]] = []
    for number in range(n):
        speaker = f"Actor_{number % 4 + 1:02d}"
        base = {"speech": f"/audio/{number:03d}.wav", "label": LABELS[classes[number]], "speaker": speaker}
        base |= {"corpus": "RAVDESS", "status": "ok", "error": "", "n_frames": FRAMES}
        rows.append(base | {"row_id": str(number), "parent_id": "", "power": power[number]})
        for copy in range(1, copies + 1):
            shifted = np.roll(power[number], copy, axis=0)
            rows.append(base | {"row_id": f"{number}+{copy}", "parent_id": str(number), "power": shifted})
    powers = np.stack([row.pop("power") for row in rows])
    features = np.stack([middle(p) for p in powers])
    table = pa.Table.from_pylist(rows)
    table = table.append_column("log_mel", pa.FixedShapeTensorArray.from_numpy_ndarray(features))
    table = table.append_column("mel_power", pa.FixedShapeTensorArray.from_numpy_ndarray(powers))
    pq.write_table(table, folder / "part-00000.parquet")
    manifest = {
        "plan": "toy",
        "version": SHARD_VERSION,
        "features": CONFIG.to_dict(),
        "fingerprint": CONFIG.fingerprint(),
        "mel_power_frames": FRAMES,
        "rows": len(rows),
        "failed": 0,
        "parts": ["part-00000.parquet"],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder
