"""The history of a run, epoch by epoch: `history.csv`, curves as a picture, TensorBoard event files.

All three are drawn from the records of `fit.Run.epoch`. TensorBoard is optional (extra `tensorboard`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from pipeline.training.loop import Record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HISTORY = "history.csv"
COLUMNS = (
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
_PANELS = (("train_loss", "val_loss"), ("val_accuracy", "val_weighted_f1"), ("lr",))


def write_history(folder: Path, records: Sequence[Record]) -> None:
    """Write `history.csv`, one row an epoch, replaced in one step."""
    temporary = folder / f".{HISTORY}.{os.getpid()}.tmp"
    pd.DataFrame(records, columns=list(COLUMNS)).to_csv(temporary, index=False, float_format="%.6g")
    temporary.replace(folder / HISTORY)


def read_history(folder: Path) -> list[Record]:
    """The records of `history.csv`, missing figures as None; empty when there is no such file yet."""
    path = folder / HISTORY
    if not path.is_file():
        return []
    table = pd.read_csv(path).astype(object)
    rows = table.where(table.notna(), None).to_dict("records")
    return [{str(name): cell for name, cell in row.items()} for row in rows]


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Loss, validation figures and learning rate over the epochs, as a PNG."""
    from matplotlib.figure import Figure

    table = pd.DataFrame(records, columns=list(COLUMNS))
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axis, names in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for name in names:
            if table[name].notna().any():
                axis.plot(table["epoch"], table[name].astype(float), label=name, marker="." if len(table) == 1 else "")
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=120)


class EventLog:
    """Numbers of each epoch as TensorBoard events in `folder`; does nothing where tensorboard is not installed.

    Args:
        done: epochs already finished; events of later ones that an interrupted run left are hidden.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        self._writer: SummaryWriter | None = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def add(self, record: Record) -> None:
        """Write one epoch."""
        if self._writer is None:
            return
        for name in COLUMNS[1:]:
            if isinstance(record[name], float):
                self._writer.add_scalar(name, record[name], record["epoch"])
        self._writer.flush()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
