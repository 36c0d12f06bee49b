"""The history of a run: the CSV and back, the curves, TensorBoard events."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from pipeline.training import run
from pipeline.training.run import EventLog, plot_curves, read_history, write_history

MISSING = {"val_loss": None, "val_accuracy": None, "val_weighted_f1": None}


def record(epoch: int, **changes: Any) -> dict[str, Any]:
    values = {"epoch": epoch, "lr": 1e-4 / epoch, "train_loss": 2.0 / epoch, "val_loss": 2.1, "val_accuracy": 0.25}
    return {**values, "val_weighted_f1": 0.2, "weights": "raw", "seconds": 1.5, "train_seconds": 1.25, **changes}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    records = [record(1), record(2, **MISSING), record(3, weights="ema")]
    for n in range(4):
        write_history(tmp_path, records[:n])
        assert [r["epoch"] for r in read_history(tmp_path)] == [1, 2, 3][:n]
    for found, given in zip(read_history(tmp_path), records, strict=True):
        assert found == {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in given.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


@pytest.mark.parametrize(
    ("records", "validated"),
    [([], True), ([record(1)], True), ([record(1), record(2, **MISSING)], True), ([record(1, **MISSING)] * 2, False)],
)
def test_curves_are_drawn_without_empty_panels(records: list[dict[str, Any]], validated: bool, tmp_path: Path) -> None:
    plot_curves(records, tmp_path / "curves.png")
    picture = image.imread(tmp_path / "curves.png")
    assert (picture.shape[1] > 1000) == validated  # three panels, or two
    assert (picture[..., :3].min(axis=2) < 0.9).any()


def test_events_hold_every_number_once(tmp_path: Path) -> None:
    with EventLog(tmp_path, done=0) as events:
        events.add(record(1))
        events.add(record(2, val_loss=None))
    (file,) = tmp_path.iterdir()
    found = file.read_bytes()
    assert [found.count(name) for name in (b"train_loss", b"val_loss", b"val_weighted_f1", b"raw")] == [2, 1, 2, 0]


def test_without_tensorboard_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with EventLog(tmp_path) as events:
        events.add(record(1))
    assert list(tmp_path.iterdir()) == []
