"""What a training run trains, on what, and with which settings: `plan.json` in the run's folder.

A run goes on (`--resume`) only with the settings that it was begun with. Limits: one format version; one that is not
known is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.storage.errors import SerError
from pipeline.training.config import FitConfig
from pipeline.training.distillation import DISTILL

PLAN_VERSION = 1
SPLIT_SEED = 42  # not an option: all runs on the same recordings hold out the same ones


@dataclass(frozen=True)
class Plan:
    """What a run trains, on what, and where it is kept."""

    out: Path
    features: tuple[Path, ...]  # folders of extracted features, read as one
    labels: tuple[str, ...]
    model_name: str
    model_options: Mapping[str, Any]
    fit: FitConfig
    teachers: tuple[Path, ...] = ()  # bundles that are learnt from (`pipeline.training.distillation`)
    distill: float = DISTILL  # their share of the loss
    init: Path | None = None  # bundle whose weights the training starts from
    crops: int = 1  # windows a recording that are heard of those reported on
    split: Mapping[str, Any] = field(default_factory=dict)  # the options that its parts were drawn with

    @property
    def checkpoint(self) -> Path:
        """The full state after the last finished epoch."""
        return self.out / "checkpoint.pt"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "version": PLAN_VERSION,
            "features": [str(folder.absolute()) for folder in self.features],
            "labels": list(self.labels),
            "model": {"name": self.model_name, "options": dict(self.model_options)},
            "fit": self.fit.to_dict(),
            "teachers": [str(path.absolute()) for path in self.teachers],
            "distill": self.distill,
            "init": None if self.init is None else str(self.init.absolute()),
            "crops": self.crops,
            "split": dict(self.split),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], out: Path) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            SerError: a plan of another version.
        """
        if values.get("version") != PLAN_VERSION:
            raise SerError(f"{out} holds a run of version {values.get('version')}, expected {PLAN_VERSION}; start anew")
        return cls(
            out=out,
            features=tuple(map(Path, [features] if isinstance(features := values["features"], str) else features)),
            labels=tuple(values["labels"]),
            model_name=values["model"]["name"],
            model_options=values["model"]["options"],
            fit=FitConfig.from_dict(values["fit"]),
            teachers=tuple(Path(path) for path in values.get("teachers", ())),
            distill=values.get("distill", DISTILL),
            init=None if values.get("init") is None else Path(values["init"]),
            crops=values.get("crops", 1),
            split=values.get("split", {}),
        )

    def check_continues(self, started: Plan) -> None:
        """Refuse to go on with a run of other labels, parts, another model or other settings.

        Raises:
            SerError: names what differs.
        """
        ours, theirs = self.to_dict(), started.to_dict()
        for name in ("labels", "model", "teachers", "distill", "init", "crops", "split"):
            if ours[name] != theirs[name] and theirs[name] != {}:  # begun before this was kept
                raise SerError(
                    f"the run was started with {name} {theirs[name]}, got {ours[name]}; resume with the same"
                )
        self.fit.check_continues(started.fit)


def read_plan(out: Path) -> Plan:
    """The plan of a run.

    Raises:
        SerError: the folder holds no run, one of another version, or a damaged one.
    """
    path = out / "plan.json"
    if not path.is_file():
        raise SerError(f"{out} holds no run to resume (no plan.json); leave --resume out to start one")
    try:
        return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")), out)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SerError(f"{path} is damaged ({type(error).__name__}: {error}); start anew in another --out") from error
