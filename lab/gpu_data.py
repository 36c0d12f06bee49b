"""Data for the trainings of ``lab.gpu_lab``: features of all recordings in one small file, without audio.

``pack`` rounds mel power to 0.2 dB (that of copies to 0.4 dB), log-mel features to 0.01 and frame features to 0.06 of
a standard deviation.
Limits: folds and parts are those of ``models/splits``; recordings that they do not name belong to no fold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.features.features import FeatureConfig
from pipeline.training.augment import AugmentConfig, Augmenter, Column, Draws

STEP_DB = 0.2
STEP_COPY_DB = 0.4
STEP_FRAME = 0.06  # in standardised values, clipped to 127 steps
SPLITS = Path("models/splits")


def pack(features: Path, out: Path, copies: Path | None = None) -> None:
    """Pack mel power and log-mel features, or frame features, of all recordings, with their classes and folds.

    Args:
        copies: features of one changed copy of each recording, extracted from a manifest in the same order. The
            augmentation ``pitch`` uses them, whatever the change is.
    """
    from pipeline.data.manifest import label_set
    from pipeline.features.store import load_features

    arrays = load_features(features)
    stems = arrays.table["speech"].map(lambda path: Path(str(path)).stem)
    labels = label_set(arrays.table)
    shared: dict[str, Any] = {
        "classes": np.array([labels.index(label) for label in arrays.table["label"]], dtype=np.int64),
        "part": _column(stems, "ravdess_split", "split"),
        "five": _column(stems, "ravdess_five_folds_of_80", "fold").astype(int),
        "six": _column(stems, "ravdess_six_actor_folds", "fold").astype(int),
        "stems": stems.to_numpy(str),
        "config": json.dumps(arrays.config.to_dict()),
    }
    if arrays.config.kind == "frame_features":
        steps = np.round(np.array(arrays.features) / STEP_FRAME).clip(-127, 127).astype(np.int8)
        np.savez_compressed(out, frames=steps, **shared)
        return
    if copies is not None:
        changed = load_features(copies)
        if (changed.table["speech"].map(lambda path: Path(str(path)).stem) != stems).any():
            raise SystemExit(f"{copies} must have the recordings of {features} in the same order; extract it again")
        shared |= {"copy_decibel": _decibel(changed, STEP_COPY_DB), "copy_n_frames": changed.n_frames}
    np.savez_compressed(
        out,
        decibel=_decibel(arrays, STEP_DB),
        n_frames=arrays.n_frames,
        features=np.round(np.array(arrays.features) * 100).astype(np.int16),
        **shared,
    )


def _decibel(arrays: Any, step: float) -> NDArray[np.int16]:
    """Mel power in steps of ``step`` dB, (n, n_mels, frames of the longest); 0 after the end of a recording."""
    assert arrays.mel_power is not None, "features without mel power; extract without --mel_power_s 0"
    power = np.array(arrays.mel_power[:, :, : arrays.n_frames.max()])
    there = np.arange(power.shape[2]) < arrays.n_frames[:, None]
    decibel = np.where(there[:, None, :], 10 * np.log10(np.maximum(power, 1e-10)), 0)
    return np.round(decibel / step).astype(np.int16)


def _column(stems: pd.Series, name: str, which: str) -> NDArray[np.str_]:
    table = pd.read_csv(SPLITS / f"{name}.csv", dtype=str).set_index("id")[which]
    return stems.map(table).fillna("0").to_numpy(str)


class Data:
    """Packed files on a device: ``stored`` has the features for each kind of model, ``configs`` their settings."""

    def __init__(self, paths: list[Path], device: torch.device) -> None:
        self.device = device
        self.stored: dict[str, Tensor] = {}
        self.configs: dict[str, FeatureConfig] = {}
        self.copies: tuple[Tensor, Tensor] | None = None  # mel power and numbers of frames
        stems: list[NDArray[np.str_]] = []
        for path in paths:
            file = np.load(path)
            stems.append(file["stems"])
            self.classes = file["classes"]
            self.part, self.five, self.six = file["part"], file["five"], file["six"]
            model = "cnn_bilstm" if "frames" in file else "inception"
            self.configs[model] = FeatureConfig.from_dict(json.loads(str(file["config"])))
            if "frames" in file:
                self.stored["cnn_bilstm"] = torch.from_numpy(file["frames"]).to(device).float() * STEP_FRAME
                continue
            self.power, self.n_frames = self._power(file["decibel"], file["n_frames"], STEP_DB)
            if "copy_decibel" in file:
                self.copies = self._power(file["copy_decibel"], file["copy_n_frames"], STEP_COPY_DB)
            self.stored["inception"] = torch.from_numpy(file["features"]).to(device).float() / 100
        if any((other != stems[0]).any() for other in stems):
            raise SystemExit("the packed files hold different recordings; pack them from the same manifest")

    def _power(self, steps: NDArray[np.int16], n_frames: NDArray[np.int64], step: float) -> tuple[Tensor, Tensor]:
        decibel = torch.from_numpy(steps).to(self.device).float() * step
        n = torch.from_numpy(n_frames).to(self.device)
        there = torch.arange(decibel.shape[2], device=self.device) < n[:, None]
        return torch.where(there[:, None, :], 10 ** (decibel / 10), 0.0), n

    def rows(self, job: str, fold: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The training rows and the test rows of a job."""
        seen = self.part != "test"
        train, test = {
            "five": (seen & (self.five != fold), seen & (self.five == fold)),
            "six": (self.six != fold, self.six == fold),
            "inner": (self.part == "train", self.part == "inner_val"),
            "final": (seen, ~seen),
        }[job]
        return np.flatnonzero(train), np.flatnonzero(test)

    @torch.no_grad()
    def crops(self, rows: NDArray[np.int64], crops: int) -> list[Tensor]:
        """Log-mel of windows over whole recordings, placed as by ``Predictor`` but rounded to whole frames."""
        augmenter = Augmenter(AugmentConfig(("crop",)), self.configs["inception"])
        chosen = torch.from_numpy(rows).to(self.device)
        u = torch.from_numpy(Draws.of_epoch(len(rows), len(rows), 1.0, 0, 0).uniform).to(self.device)
        u[:, Column.CROP] = 0.0
        windows = []
        for index in range(crops):
            u[:, Column.START] = (index + 0.5) / crops
            with self.device:
                windows.append(augmenter.from_power(self.power[chosen], self.n_frames[chosen], u))
        return windows
