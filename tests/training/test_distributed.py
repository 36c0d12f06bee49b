"""Two real processes that train together over gloo, without Ray."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from toy_data import toy_data, toy_model

from pipeline.training.config import FitConfig
from pipeline.training.loop import Workers, fit

WORLD = 2
# 40, 8 and 12 clips of the three classes: far from balanced
CLASSES = np.repeat([0, 1, 2, 0, 1, 2], [40, 8, 12, 3, 3, 3])


def settings(**changes: Any) -> FitConfig:
    return FitConfig(**{"epochs": 3, "batch_size": 20, "lr": 1e-2, "threads": 1, "patience": 0, **changes})


def linear() -> nn.Module:
    """Without batch norm and dropout, the gradient of a batch is the mean of those of its halves."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(512, 3))


def train(rank: int, port: int, out: str) -> None:
    """One of the two workers: trains, and writes down what it ended with."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    data, workers = toy_data(60, 9, classes=CLASSES), Workers.current()
    torch.manual_seed(rank)  # other weights in each worker at first: DDP must make them one
    result = fit(toy_model(), data, settings(ema=0.9, augment=("crop", "mixup")))
    found = {
        "weights": result.weights,
        "history": [{k: v for k, v in r.items() if not k.endswith("seconds")} for r in result.history],
        "linear": fit(linear(), data, settings()).weights,
        "gathered": workers.gather_rows(torch.arange(rank, 5, WORLD).float()[:, None], 5, torch.device("cpu")),
        "sum": workers.sum(torch.tensor(float(rank + 1))),
    }
    torch.save(found, Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each worker wrote down."""
    out = tmp_path_factory.mktemp("workers")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(train, (port, str(out)), nprocs=WORLD)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_workers_end_with_identical_weights_and_figures(both: list[dict[str, Any]]) -> None:
    first, second = both
    assert first["history"] == second["history"]
    assert len(first["history"]) == 3
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)


def test_two_workers_take_the_steps_of_one(both: list[dict[str, Any]]) -> None:
    alone = fit(linear(), toy_data(60, 9, classes=CLASSES), settings()).weights
    for found in both:
        torch.testing.assert_close(found["linear"], alone, rtol=1e-3, atol=1e-4)


def test_exchanges(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["gathered"].flatten().tolist() == [0, 1, 2, 3, 4]
        assert float(found["sum"]) == 3
    alone, value = Workers.current(), torch.tensor([[1.0], [2.0]])
    assert (alone.rank, alone.world) == (0, 1)
    assert alone.sum(value) is value
    assert alone.gather_rows(value, 2, torch.device("cpu")) is value
