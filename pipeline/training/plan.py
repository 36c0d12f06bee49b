"""The plan of a training run, `plan.json` in its folder: model, data and settings.

A run can be resumed (`--resume`) only with the settings that it was started with.

Also starts a training from the weights of an earlier model of this project (`--init`). Its bundle must list its
training recordings, so that the leak check of the new model knows them too. If the classes differ, the last layer is
new except for the rows of shared classes.
Source: Yosinski et al. 2014, "How transferable are features in deep neural networks?".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from pipeline.data.splits import HASH_COLUMN, used_in_training
from pipeline.features.features import FeatureConfig
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.storage.errors import SerError
from pipeline.storage.journal import PLAN
from pipeline.training.config import FitConfig
from pipeline.training.losses import DISTILL

PLAN_VERSION = 1
KIND = "training"  # the kind that plan.json names
SPLIT_SEED = 42  # fixed, so that all runs on the same recordings have the same test part


@dataclass(frozen=True)
class Plan:
    """Model, data, settings and folder of a run."""

    out: Path
    features: tuple[Path, ...]  # folders of extracted features, read as one table
    labels: tuple[str, ...]
    model_name: str
    model_options: Mapping[str, Any]
    fit: FitConfig
    teachers: tuple[Path, ...] = ()  # bundles for knowledge distillation (`pipeline.training.losses`)
    distill: float = DISTILL  # the teachers' share of the loss
    init: Path | None = None  # bundle whose weights the training starts from
    crops: int = 1  # windows of each recording that the report is made of
    split: Mapping[str, Any] = field(default_factory=dict)  # options of the split into parts

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
        """Raise SerError if the run `started` may not be resumed with this plan; names what differs."""
        ours, theirs = self.to_dict(), started.to_dict()
        for name in ("labels", "model", "teachers", "distill", "init", "crops", "split"):
            if ours[name] != theirs[name] and theirs[name] != {}:  # {}: older runs did not record it
                raise SerError(
                    f"the run was started with {name} {theirs[name]}, got {ours[name]}; resume with the same {name}"
                )
        self.fit.check_continues(started.fit)


def read_plan(out: Path) -> Plan:
    """Read the plan of the run in a folder.

    Raises:
        SerError: the folder holds no run, or one that is damaged or of another version.
    """
    path = out / PLAN
    if not path.is_file():
        raise SerError(f"{out} holds no run to resume (no plan.json); leave --resume out to start one")
    try:
        return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")), out)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SerError(f"{path} is damaged ({type(error).__name__}: {error}); start anew in another --out") from error


def check_start(path: Path, model_name: str, features: FeatureConfig) -> Bundle:
    """Open the bundle of ``--init`` and check that a training can start from it.

    Raises:
        SerError: no bundle, or one without a training record, with another network or with other features.
    """
    bundle = load_bundle(path)
    if bundle.training.empty or "training" not in bundle.metrics:
        raise SerError(f"--init {path} has no record of its training data; give a bundle that `ser train` wrote")
    if bundle.model_name != model_name:
        raise SerError(
            f"--init {path} is a {bundle.model_name}, but --model is {model_name}; give --model {bundle.model_name}"
        )
    if bundle.features.fingerprint() != features.fingerprint():
        raise SerError(
            f"--init {path} needs other features ({bundle.features.unlike(features)}); extract the recordings with its "
            "settings, or leave --init out"
        )
    return bundle


def start_from(path: Path, model: nn.Module, model_name: str, labels: Sequence[str], features: FeatureConfig) -> None:
    """Put the weights of the bundle at ``path`` into ``model``, whose classes are ``labels``.

    Raises:
        SerError: as in ``check_start``; or the network has other options, such as another width.
    """
    bundle = check_start(path, model_name, features)
    own = model.state_dict()
    given = _for_classes(bundle.state_dict(), own, bundle.labels, labels)
    try:
        model.load_state_dict(given)
    except RuntimeError as error:
        raise SerError(
            f"--init {path} is a network with the options {dict(bundle.model_options)}, but the one to train has "
            "others; give the same --width"
        ) from error


def _for_classes(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], theirs: Sequence[str], ours: Sequence[str]
) -> dict[str, Tensor]:
    """``given`` with a last layer for the classes ``ours``: rows of shared classes are kept, the others are ``own``."""
    if tuple(theirs) == tuple(ours):
        return dict(given)
    head = list(own)[-2:]  # weight and bias of the last layer, in every network here
    changed = {name: own[name].clone() for name in head}
    for row, label in enumerate(ours):
        if label in theirs:
            for name in head:
                changed[name][row] = given[name][theirs.index(label)]
    return {**given, **changed}


def earlier_training(start: Bundle, table: pd.DataFrame) -> pd.DataFrame:
    """The earlier model's training and validation recordings that ``table`` lacks, as rows for ``training.csv``.

    They have the columns of ``table`` and the ``split`` ``init``; the leak check counts them as training recordings.
    """
    used = used_in_training(start.training)
    new = used[~used[HASH_COLUMN].isin(set(table[HASH_COLUMN]) - {""}) & ~used["id"].isin(set(table["id"]))]
    return new.assign(split="init").reindex(columns=list(table.columns), fill_value="")
