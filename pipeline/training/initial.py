"""Starting a training from the weights of an earlier model of this project, instead of from random ones.

The earlier bundle must say which recordings it was trained on: so a model stays "trained from scratch" (no weights
from elsewhere), and its leak check knows all that it has learnt from. Where the classes differ, the last layer is new
but for the rows of the classes that both have. Source: Yosinski et al. 2014, "How transferable are features in deep
neural networks?".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from torch import Tensor, nn

from pipeline.data.splits import HASH_COLUMN, used_in_training
from pipeline.features.features import FeatureConfig
from pipeline.models.bundle import Bundle, load_bundle
from pipeline.storage.errors import SerError


def check_start(path: Path, model_name: str, features: FeatureConfig) -> Bundle:
    """The bundle to start from.

    Raises:
        SerError: no bundle, one without a training record, of another network, or of other features.
    """
    bundle = load_bundle(path)
    if bundle.training.empty or "training" not in bundle.metrics:
        raise SerError(f"--init {path} does not say what it was trained on; give a bundle that `ser train` wrote")
    if bundle.model_name != model_name:
        raise SerError(f"--init {path} is a {bundle.model_name}, the training is of a {model_name}; give --model alike")
    if bundle.features.fingerprint() != features.fingerprint():
        raise SerError(
            f"--init {path} takes {bundle.features.kind} features of other settings; extract the recordings with its "
            "settings, or leave --init out"
        )
    return bundle


def start_from(path: Path, model: nn.Module, model_name: str, labels: Sequence[str], features: FeatureConfig) -> None:
    """Put the weights of the bundle at ``path`` into ``model``, whose classes are ``labels`` in index order.

    Raises:
        SerError: as ``check_start``; a network of other options, as its width.
    """
    bundle = check_start(path, model_name, features)
    own = model.state_dict()
    given = _for_classes(bundle.state_dict(), own, bundle.labels, labels)
    try:
        model.load_state_dict(given)
    except RuntimeError as error:
        raise SerError(
            f"--init {path} is a network with the options {dict(bundle.model_options)}, the one to be trained has "
            "others; give the same --width"
        ) from error


def _for_classes(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], theirs: Sequence[str], ours: Sequence[str]
) -> dict[str, Tensor]:
    """``given`` with a last layer for ``ours``: the rows of shared classes are kept, those of others are ``own``."""
    if tuple(theirs) == tuple(ours):
        return dict(given)
    head = list(own)[-2:]  # weight and bias of the last layer, in every network here
    changed = {name: own[name].clone() for name in head}
    for row, label in enumerate(ours):
        if label in theirs:
            for name in head:
                changed[name][row] = given[name][theirs.index(label)]
    return {**given, **changed}


def earlier_training(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Rows for ``training.csv`` of what the earlier model was trained on and ``table`` lacks, in its columns.

    Their ``split`` is ``init``, so that the leak check counts them as known.
    """
    used = used_in_training(load_bundle(path).training)
    new = used[~used[HASH_COLUMN].isin(set(table[HASH_COLUMN]) - {""}) & ~used["id"].isin(set(table["id"]))]
    return new.assign(split="init").reindex(columns=list(table.columns), fill_value="")


def about_start(path: Path | None) -> dict[str, object]:
    """The ``init`` entry of a model's training record; empty where it began with random weights."""
    if path is None:
        return {}
    bundle = load_bundle(path)
    record = bundle.metrics.get("training", {})
    return {
        "init": {"model_sha256": bundle.weights_sha256}
        | {name: record.get(name) for name in ("epochs", "trained_on", "settings")}
    }
