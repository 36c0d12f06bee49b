"""Data for the trainings of ``lab.gpu_lab``: features of all recordings in one small file, without audio.

``pack`` rounds mel power to 0.2 dB, and log-mel features to 0.01 of a standard deviation.
Limits: folds and parts are those of ``models/splits``; recordings that they do not name belong to no fold.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.features.features import FeatureConfig
from pipeline.training.augment import AugmentConfig, Augmenter, Column, Draws

STEP_DB = 0.2
SPLITS = Path("models/splits")


def pack(features: Path, out: Path) -> None:
    """Pack mel power and log-mel features of all recordings, with their classes and folds."""
    from pipeline.data.manifest import label_set
    from pipeline.features.store import load_features

    arrays = load_features(features)
    stems = arrays.table["speech"].map(lambda path: Path(str(path)).stem)
    labels = label_set(arrays.table)
    assert arrays.mel_power is not None, "features without mel power; extract without --mel_power_s 0"
    power = np.array(arrays.mel_power[:, :, : arrays.n_frames.max()])  # (n, n_mels, frames of the longest)
    there = np.arange(power.shape[2]) < arrays.n_frames[:, None]
    decibel = np.where(there[:, None, :], 10 * np.log10(np.maximum(power, 1e-10)), 0)
    np.savez_compressed(
        out,
        decibel=np.round(decibel / STEP_DB).astype(np.int16),
        n_frames=arrays.n_frames,
        features=np.round(np.array(arrays.features) * 100).astype(np.int16),
        classes=np.array([labels.index(label) for label in arrays.table["label"]], dtype=np.int64),
        test=_column(stems, "ravdess_split", "split") == "test",
        five=_column(stems, "ravdess_five_folds_of_80", "fold").astype(int),
        six=_column(stems, "ravdess_six_actor_folds", "fold").astype(int),
        config=json.dumps(arrays.config.to_dict()),
    )


def _column(stems: pd.Series, name: str, which: str) -> NDArray[np.str_]:
    table = pd.read_csv(SPLITS / f"{name}.csv", dtype=str).set_index("id")[which]
    return stems.map(table).fillna("0").to_numpy(str)


class Data:
    """A packed file on a device: ``stored`` has the log-mel features, ``power`` and ``n_frames`` the mel power."""

    def __init__(self, path: Path, device: torch.device) -> None:
        file = np.load(path)
        self.device, self.config = device, FeatureConfig.from_dict(json.loads(str(file["config"])))
        self.classes, self.test, self.five, self.six = (file[name] for name in ("classes", "test", "five", "six"))
        self.stored = torch.from_numpy(file["features"]).to(device).float() / 100
        self.n_frames = torch.from_numpy(file["n_frames"]).to(device)
        decibel = torch.from_numpy(file["decibel"]).to(device).float() * STEP_DB
        there = torch.arange(decibel.shape[2], device=device) < self.n_frames[:, None]
        self.power = torch.where(there[:, None, :], 10 ** (decibel / 10), 0.0)

    def rows(self, job: str, fold: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The training rows and the test rows of a fold; "five" never uses the test part."""
        fold_of, used = (self.five, ~self.test) if job == "five" else (self.six, True)
        return np.flatnonzero(used & (fold_of != fold)), np.flatnonzero(used & (fold_of == fold))

    @torch.no_grad()
    def crops(self, rows: NDArray[np.int64], crops: int) -> list[Tensor]:
        """Log-mel of windows over whole recordings, placed as by ``Predictor`` but rounded to whole frames."""
        augmenter = Augmenter(AugmentConfig(("crop",)), self.config)
        chosen = torch.from_numpy(rows).to(self.device)
        u = torch.from_numpy(Draws.of_epoch(len(rows), len(rows), 1.0, 0, 0).uniform).to(self.device)
        u[:, Column.CROP] = 0.0
        windows = []
        for index in range(crops):
            u[:, Column.START] = (index + 0.5) / crops
            with self.device:
                windows.append(augmenter.from_power(self.power[chosen], self.n_frames[chosen], u))
        return windows
