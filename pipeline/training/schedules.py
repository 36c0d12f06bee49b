"""Learning-rate schedules as factors of the peak, a function of the step, for `torch.optim.lr_scheduler.LambdaLR`.

`cosine`: Loshchilov & Hutter 2017 without restarts, to 0 (`CosineAnnealingLR`). `onecycle`: Smith & Topin 2018 with
cosine arms (`OneCycleLR`: rise from 1/25 of the peak, fall to 1e-4 of the start). Limits: momentum stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULERS = ("cosine", "onecycle")
ONECYCLE_RISE = 0.15  # share of the steps, unless warm-up epochs are given
_START_DIVISOR = 25.0
_END_DIVISOR = 1e4


def learning_rates(name: str, steps_per_epoch: int, epochs: int, warmup_epochs: float = 0.0) -> Callable[[int], float]:
    """Factor of the peak learning rate at each step, from 0 to `steps_per_epoch * epochs`.

    Warm-up is linear from 0 for `cosine`; for `onecycle` it is the length of the rise.
    """
    total = steps_per_epoch * epochs
    warmup = min(round(warmup_epochs * steps_per_epoch), total)
    return _onecycle(total, warmup) if name == "onecycle" else _cosine(total, warmup)


def _cosine(total: int, warmup: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return _descent((step - warmup) / max(total - warmup, 1))

    return factor


def _onecycle(total: int, warmup: int) -> Callable[[int], float]:
    peak = float(warmup or ONECYCLE_RISE * total) - 1
    start, end = 1 / _START_DIVISOR, 1 / _START_DIVISOR / _END_DIVISOR

    def factor(step: int) -> float:
        if step < peak:
            return 1 - (1 - start) * _descent(step / peak)
        return end + (1 - end) * _descent((step - peak) / max(total - 1 - peak, 1))

    return factor


def _descent(progress: float) -> float:
    """Half a cosine: 1 at 0, 0 at 1 and after."""
    return (1 + math.cos(math.pi * min(progress, 1.0))) / 2
