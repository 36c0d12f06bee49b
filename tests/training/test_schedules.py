"""Learning-rate factors against torch's own schedulers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from pipeline.training.config import learning_rates

STEPS, EPOCHS = 10, 20


@pytest.mark.parametrize(
    ("name", "warmup_epochs", "make"),
    [
        ("cosine", 0.0, lambda sgd: CosineAnnealingLR(sgd, T_max=STEPS * EPOCHS)),
        ("onecycle", 0.0, lambda sgd: OneCycleLR(sgd, max_lr=1.0, total_steps=STEPS * EPOCHS, pct_start=0.15)),
        ("onecycle", 6.0, lambda sgd: OneCycleLR(sgd, max_lr=1.0, total_steps=STEPS * EPOCHS, pct_start=0.3)),
    ],
)
def test_rates_are_torchs(name: str, warmup_epochs: float, make: Callable[[SGD], LRScheduler]) -> None:
    factor = learning_rates(name, STEPS, EPOCHS, warmup_epochs)
    scheduler = make(SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    for step in range(STEPS * EPOCHS):
        assert factor(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        scheduler.optimizer.step()
        scheduler.step()
    if name == "cosine":
        assert factor(STEPS * EPOCHS) == 0


def test_cosine_warms_up_linearly_and_then_falls() -> None:
    factor = learning_rates("cosine", STEPS, EPOCHS, 2.0)
    assert [factor(step) for step in range(20)] == pytest.approx([(i + 1) / 21 for i in range(20)])
    assert factor(20) == 1
    assert all(factor(step) > factor(step + 1) for step in range(20, STEPS * EPOCHS))


@pytest.mark.parametrize("name", ["cosine", "onecycle"])
@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0, 5.0])
def test_one_step_runs_and_long_warm_ups_stay_in_range(name: str, warmup_epochs: float) -> None:
    for epochs in (1, 2):
        factor = learning_rates(name, 1, epochs, warmup_epochs)
        assert all(0 <= factor(step) <= 1 for step in range(epochs + 2))
