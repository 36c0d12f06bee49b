"""The loop under Ray Train: the same losses as alone, failures replaced or told, Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_data import LABELS, write_features

from pipeline.cluster.ray_internals import TRAIN_WORKER
from pipeline.data.splits import split_table
from pipeline.features.store import load_features
from pipeline.storage.errors import SerError
from pipeline.training import on_ray as train
from pipeline.training.config import FitConfig
from pipeline.training.on_ray import _Beat, _user_error, _Watch, train_on_ray
from pipeline.training.plan import Plan
from pipeline.training.run import begin, load_checkpoint, read_history, train_here, write_history
from tests.support.processes import command_of, descendants

CONFIG = FitConfig(epochs=2, batch_size=16, lr=1e-3, ema=0.9, augment=("crop", "mixup"), threads=1)


def on_ray(test: Any) -> Any:
    return pytest.mark.timeout(600)(pytest.mark.usefixtures("ray_session")(test))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("toy") / "features")


def new_run(features: Path, out: Path, config: FitConfig = CONFIG) -> Plan:
    plan = Plan(out, (features,), LABELS, "inception", {"width": 0.125}, config)
    begin(plan, split_table(load_features(features).table))
    return plan


def losses(plan: Plan) -> list[Any]:
    names = ("epoch", "train_loss", "val_loss", "val_weighted_f1")
    return [[record[name] for name in names] for record in read_history(plan.out)]


@on_ray
def test_one_ray_worker_gives_the_losses_and_weights_of_the_loop_alone(features: Path, tmp_path: Path) -> None:
    alone, ours = new_run(features, tmp_path / "alone"), new_run(features, tmp_path / "ray")
    train_here(alone)
    told: list[int] = []
    train_on_ray(ours, num_workers=1, on_epoch=lambda record: told.append(record["epoch"]))
    assert told == [1, 2]
    assert losses(ours) == losses(alone)
    found, expected = (load_checkpoint(plan.checkpoint) for plan in (ours, alone))
    for part in ("model", "ema"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    assert not (ours.out / "ray").exists()


@pytest.mark.slow
@on_ray
def test_early_stopping_is_one_decision_of_all_workers(features: Path, tmp_path: Path) -> None:
    plan = new_run(features, tmp_path / "run", replace(CONFIG, epochs=6, lr=1e-9, patience=1))
    train_on_ray(plan, num_workers=2)
    history = read_history(plan.out)
    assert len(history) < 6
    best = max(record["val_weighted_f1"] for record in history)
    assert history[-1]["val_weighted_f1"] <= best == history[-2]["val_weighted_f1"]


@pytest.mark.slow
@on_ray
def test_a_killed_worker_is_replaced(features: Path, tmp_path: Path) -> None:
    plan, undisturbed = (new_run(features, tmp_path / name, replace(CONFIG, epochs=5)) for name in ("run", "whole"))
    train_on_ray(undisturbed, num_workers=2)
    killed: list[int] = []

    def kill_in_epoch_three(epoch: int, done: int, total: int) -> None:
        if epoch == 3 and not killed:
            killed.append(min(ray_workers()))
            os.kill(killed[0], signal.SIGKILL)

    train_on_ray(plan, num_workers=2, on_batch=kill_in_epoch_three)
    assert killed
    assert losses(plan) == losses(undisturbed)


@pytest.mark.slow
@on_ray
def test_a_diverged_run_is_told_at_once(features: Path, tmp_path: Path) -> None:
    plan = new_run(features, tmp_path / "run", replace(CONFIG, lr=1e30))
    with pytest.raises(SerError, match="became nan in epoch"):
        train_on_ray(plan, num_workers=2)


@pytest.mark.slow
@on_ray
def test_ctrl_c_stops_the_workers_and_keeps_the_checkpoint(features: Path, tmp_path: Path) -> None:
    plan = new_run(features, tmp_path / "run", replace(CONFIG, epochs=500))
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_on_ray(plan, num_workers=2, on_epoch=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    deadline_s = time.monotonic() + 30
    while ray_workers() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert ray_workers() == []
    state = load_checkpoint(plan.checkpoint)
    assert 2 <= len(state["history"]) < 500
    assert len(state["history"]) == len(read_history(plan.out))


def ray_workers() -> list[int]:
    """Training workers below this process."""
    return [pid for pid in descendants(os.getpid()) if command_of(pid).startswith(TRAIN_WORKER)]


def test_a_users_mistake_is_found_in_rays_wrapping() -> None:
    mistake = SerError("batch size 9 cannot be shared")
    wrapped = RuntimeError("a task failed")
    wrapped.__cause__ = ValueError("something between")
    wrapped.__cause__.__cause__ = mistake
    group = RuntimeError("workers failed")
    group.worker_failures = {0: RuntimeError("connection reset"), 1: wrapped}  # type: ignore[attr-defined]
    assert _user_error(group) == "batch size 9 cannot be shared"
    assert _user_error(RuntimeError("out of memory")) is None


def test_progress_goes_from_the_worker_to_the_driver(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    records = [{"epoch": n, "train_loss": 1.0 / n, "val_loss": None} for n in (1, 2, 3)]
    write_history(tmp_path, records[:1])
    epochs: list[int] = []
    batches: list[tuple[int, int, int]] = []
    beat = _Beat(train._progress(tmp_path))
    with _Watch(tmp_path, lambda record: epochs.append(record["epoch"]), lambda *state: batches.append(state)):
        for done in range(1, 5):
            beat(2, done, 4)
        write_history(tmp_path, records)
    assert epochs == [2, 3]  # epoch 1 was there before
    assert batches[-1] == (2, 4, 4)  # the last batch of an epoch is always told


def test_gpus_that_are_not_there_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    train._check_gpus(1)
    with pytest.raises(SerError, match="GPU"):
        train._check_gpus(2)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    train._check_gpus(2)
