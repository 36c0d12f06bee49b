"""Check that training works: both models must classify 64 real training clips without error.

    python -m benchmarks.overfit --data_dir RECORDINGS [--clips 64 --epochs 150 --seed 0]

It tests loop, models and features together, without augmentation and validation part. A run ends as soon as every
training clip is classified correctly. It says nothing about other recordings.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.data.manifest import label_set, scan_folder
from pipeline.features.extract import ShardOptions, extract_shards
from pipeline.features.features import FeatureConfig
from pipeline.features.store import load_features
from pipeline.models.networks import build_model
from pipeline.training.batches import from_arrays
from pipeline.training.config import FitConfig
from pipeline.training.loop import Record, Run, fit

KINDS = {"inception": "log_mel", "cnn_bilstm": "frame_features"}


def main() -> None:
    """Train both models and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = scan_folder(arguments.data_dir).sort_values(["label", "speech"])
    table = table.iloc[np.linspace(0, len(table) - 1, arguments.clips).round().astype(int)]
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in KINDS.items():
            features = Path(folder) / kind
            extract_shards(table, features, FeatureConfig(kind=kind), options=ShardOptions(mel_power_s=0.0))
            learn(name, features, arguments)


def learn(name: str, features: Path, arguments: argparse.Namespace) -> None:
    """Train one model until it classifies every clip correctly; print the result."""
    arrays = load_features(features)
    labels = label_set(arrays.table)
    classes = np.array([labels.index(label) for label in arrays.table["label"]], dtype=np.int64)
    data = from_arrays(arrays, classes, len(labels), np.arange(len(classes)), np.empty(0, np.int64))
    torch.manual_seed(arguments.seed)
    model = build_model(name, {}, len(labels), arrays.config.input_shape)
    right = 0.0

    def enough(_: Record, run: Run) -> None:
        nonlocal right
        right = float((run.logits(run.model, data.train_rows).argmax(dim=1).numpy() == classes).mean())
        if right == 1.0:
            raise KeyboardInterrupt

    config = FitConfig(
        epochs=arguments.epochs, batch_size=16, lr=1e-3, seed=arguments.seed, threads=os.cpu_count() or 1
    )
    start_s = time.perf_counter()
    result = fit(model, data, config, on_epoch=enough)
    seconds = time.perf_counter() - start_s
    print(
        f"{name:<11} {right:7.1%} of {len(classes)} clips after {len(result.history)} epochs, {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
