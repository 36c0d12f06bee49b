"""The folder of one training run: its plan, splits, checkpoint, growing history, curves, and at last its bundle.

`plan.json` says what the run is; `splits/` which recordings each part holds; `checkpoint.pt` is the full state after the last
epoch (replaced in one step, never half written); `history.csv` is written anew from that state after each epoch, so it
holds no epoch twice. `config.json` of the bundle comes last: its presence means finished. On several machines the
folder must be on storage that all of them share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline.arrays import load_features
from pipeline.batches import TrainingData, from_arrays
from pipeline.checkpoint import write_json
from pipeline.errors import SerError
from pipeline.fit import BatchCallback, EpochCallback, FitConfig, FitResult, Record, Run, fit
from pipeline.models import build_model
from pipeline.splits import SPLITS

PLAN_VERSION = 1
HISTORY_COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "val_loss",
    "val_accuracy",
    "val_weighted_f1",
    "weights",
    "seconds",
    "train_seconds",
)


@dataclass(frozen=True)
class Plan:
    """What a run trains, on what, and where it is kept."""

    out: Path
    features: Path
    labels: tuple[str, ...]
    model_name: str
    model_options: Mapping[str, Any]
    fit: FitConfig

    @property
    def checkpoint(self) -> Path:
        """The full state after the last finished epoch."""
        return self.out / "checkpoint.pt"

    @property
    def finished(self) -> bool:
        """Whether the bundle is complete."""
        return (self.out / "config.json").is_file()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "version": PLAN_VERSION,
            "features": str(self.features.absolute()),
            "labels": list(self.labels),
            "model": {"name": self.model_name, "options": dict(self.model_options)},
            "fit": asdict(self.fit),
        }


def begin(plan: Plan, splits: Mapping[str, pd.DataFrame]) -> None:
    """Lay down a new run: splits, then `plan.json`.

    Raises:
        SerError: the folder holds another run.
    """
    if (plan.out / "plan.json").exists() or plan.finished:
        raise SerError(f"{plan.out} already holds a run; continue it with --resume, or give another --out")
    (plan.out / "splits").mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        splits[name].to_csv(plan.out / "splits" / f"{name}.csv", index=False)
    write_json(plan.out / "plan.json", plan.to_dict())


def read_splits(out: Path) -> dict[str, pd.DataFrame]:
    """The recordings of each part, as `begin` wrote them; every cell a string.

    Raises:
        SerError: the folder holds no run.
    """
    missing = [name for name in SPLITS if not (out / "splits" / f"{name}.csv").is_file()]
    if missing:
        raise SerError(f"{out} holds no run to resume (no splits/{missing[0]}.csv); leave --resume out to start one")
    return {name: pd.read_csv(out / "splits" / f"{name}.csv", dtype=str, keep_default_na=False) for name in SPLITS}


def read_plan(out: Path) -> dict[str, Any]:
    """`plan.json` of a run.

    Raises:
        SerError: the folder holds no run, or one of another version.
    """
    path = out / "plan.json"
    if not path.is_file():
        raise SerError(f"{out} holds no run to resume (no plan.json); leave --resume out to start one")
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if values.get("version") != PLAN_VERSION:
        raise SerError(f"{path} has version {values.get('version')}, expected {PLAN_VERSION}; start a new run")
    return values


def training_data(plan: Plan) -> TrainingData:
    """The arrays and rows that a plan trains and validates on.

    Raises:
        SerError: the features are not those that the splits were made from.
    """
    arrays = load_features(plan.features)
    splits = read_splits(plan.out)
    rows = {name: rows_of(arrays.table, splits[name], plan.features) for name in ("train", "inner_val")}
    index = {name: i for i, name in enumerate(plan.labels)}
    classes = np.array([index[name] for name in arrays.table["label"]], dtype=np.int64)
    return from_arrays(arrays, classes, len(plan.labels), rows["train"], rows["inner_val"])


def rows_of(table: pd.DataFrame, part: pd.DataFrame, folder: Path) -> np.ndarray:
    """Positions in `table` of the recordings of a split, by `row_id`."""
    position = {str(row_id): i for i, row_id in enumerate(table["row_id"])}
    try:
        return np.array([position[str(row_id)] for row_id in part["row_id"]], dtype=np.int64)
    except KeyError as error:
        raise SerError(f"row {error} of the splits is not in {folder}; give the features the run began with") from error


def train_here(
    plan: Plan,
    *,
    device: str = "cpu",
    on_epoch: EpochCallback | None = None,
    on_batch: BatchCallback | None = None,
) -> FitResult:
    """Train in this process (one worker, or one of several), going on from the run's checkpoint when it has one.

    The first worker saves the state and the history before `on_epoch` is called.
    """
    data = training_data(plan)
    torch.manual_seed(plan.fit.seed)
    model = build_model(plan.model_name, plan.model_options, len(plan.labels), data.config.input_shape)
    state = load_checkpoint(plan.checkpoint) if plan.checkpoint.is_file() else None

    def save_then_report(record: Record, run: Run) -> None:
        if run.rank == 0:
            save_checkpoint(plan.checkpoint, run.state())
            write_history(plan.out, run.history)
        if on_epoch is not None:
            on_epoch(record, run)

    return fit(model, data, plan.fit, device=device, state=state, on_epoch=save_then_report, on_batch=on_batch)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values only (`weights_only=True`), on the CPU.

    Raises:
        SerError: no readable checkpoint.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for damaged files
        raise SerError(f"cannot read the checkpoint {path}: {str(error).splitlines()[0]}; start a new run") from error
    return state


def write_history(out: Path, history: Sequence[Record]) -> None:
    """`history.csv`, one row an epoch, replaced in one step."""
    temporary = out / f".history.{os.getpid()}.tmp"
    pd.DataFrame(history, columns=list(HISTORY_COLUMNS)).to_csv(temporary, index=False, float_format="%.6g")
    temporary.replace(out / "history.csv")


def plot_curves(history: Sequence[Record], path: Path) -> None:
    """Loss, validation figures and learning rate over the epochs, as a PNG."""
    from matplotlib.figure import Figure

    table = pd.DataFrame(history)
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for axis, columns in zip(
        panels, (("train_loss", "val_loss"), ("val_accuracy", "val_weighted_f1"), ("lr",)), strict=True
    ):
        for column in columns:
            if column in table and table[column].notna().any():
                axis.plot(table["epoch"], table[column], label=column)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
