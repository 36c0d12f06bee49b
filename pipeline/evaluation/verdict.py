"""The verdict: whether accuracy, weighted F1 and the recall of every class reach their targets.

Recordings that got no emotion as answer count as wrong here; the figure without them is shown next to it. The interval
is the one over speakers if there is one, else the one over recordings. If a figure meets its target but the interval
reaches below it, the outcome says so. A class without recordings is named and does not count for the outcome.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.storage.errors import SerError

MET = "met"
CROSSES = "met, but the interval crosses the line"
NOT_DECIDABLE = "not decidable"
NOT_MET = "not met"
_FROM_BEST = (MET, CROSSES, NOT_MET)
_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Targets:
    """The targets, as shares of 1."""

    accuracy: float = 0.80
    weighted_f1: float = 0.80
    class_recall: float = 0.75

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise SerError(f"the target for {name} must lie between 0 and 1, got {value}; 80 % is 0.80")


def judge(value: float | None, interval: Sequence[float] | None, target: float) -> str:
    """One of ``met``, ``met, but the interval crosses the line``, ``not met``, ``not decidable``."""
    if value is None:
        return NOT_DECIDABLE
    if value < target - _TOLERANCE:
        return NOT_MET
    if interval is None or interval[0] < target - _TOLERANCE:
        return CROSSES
    return MET


def decimals(value: float, target: float | None) -> int:
    """Decimals needed in a percentage to show that ``value`` misses ``target``: 79.96 % must not appear as 80.0 %."""
    if target is None or value >= target - _TOLERANCE:
        return 1
    return next((n for n in (1, 2, 3) if round(value * 100, n) < target * 100), 4)


def verdict(evaluation: Mapping[str, Any], targets: Targets) -> dict[str, Any]:
    """The outcome (see ``judge``) for each target, and the worst of them, from the figures of ``metrics.evaluate``."""
    checks = [
        _check("accuracy", None, targets.accuracy, evaluation["overall"]["accuracy"]),
        _check("weighted F1", None, targets.weighted_f1, evaluation["overall"]["weighted_f1"]),
    ]
    for row in evaluation["per_class"]:
        checks.append(_check("recall", row["label"], targets.class_recall, row["recall"]))
    decided = [check["outcome"] for check in checks if check["outcome"] != NOT_DECIDABLE]
    return {
        "outcome": max(decided, key=_FROM_BEST.index, default=NOT_DECIDABLE),
        "missed": [_name(check) for check in checks if check["outcome"] == NOT_MET],
        "undecidable": [_name(check) for check in checks if check["outcome"] == NOT_DECIDABLE],
        "lowest_class": _lowest(evaluation["per_class"]),
        "targets": asdict(targets),
        "checks": checks,
    }


def reached(found: Mapping[str, Any]) -> bool:
    """Whether every figure meets its target; False if the outcome is ``not decidable``."""
    return found["outcome"] in (MET, CROSSES)


def _check(metric: str, label: str | None, target: float, figure: Mapping[str, Any]) -> dict[str, Any]:
    over = "speakers" if figure["with_failed"]["over_speakers"] else "recordings"
    interval = figure["with_failed"][f"over_{over}"]
    return {
        "metric": metric,
        "label": label,
        "target": target,
        "value": figure["with_failed"]["value"],
        "interval": interval,
        "interval_over": over if interval else None,
        "value_read_only": figure["value"],
        "outcome": judge(figure["with_failed"]["value"], interval, target),
    }


def _lowest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The class with the lowest recall; recordings that got no emotion as answer count as wrong."""
    known = [(row["recall"]["with_failed"]["value"], row["label"]) for row in rows]
    value, label = min((pair for pair in known if pair[0] is not None), key=lambda pair: pair[0])
    return {"label": label, "value": value}


def _name(check: Mapping[str, Any]) -> str:
    return check["metric"] if check["label"] is None else f"{check['metric']} of {check['label']}"
