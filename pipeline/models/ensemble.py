"""Joins several trained models into one bundle, which answers with their mean log-probability (a deep ensemble).

Networks of one recipe and different seeds make different mistakes, and together are better with new speakers than each
alone (docs/lab, experiment 37; Lakshminarayanan et al. 2017). Limits: models of one kind, with the same classes and
features; the joined model's temperature is 1 until it is calibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.data.corpora.voices import with_corpora
from pipeline.data.splits import HASH_COLUMN
from pipeline.evaluation.outcomes import with_answers
from pipeline.models.bundle import Bundle, load_bundle, save_bundle
from pipeline.models.doubt import log_softmax
from pipeline.models.model_card import model_card
from pipeline.models.networks import MAX_MEMBERS, MEMBERS
from pipeline.storage.errors import SerError

_ORDER = ("train", "inner_val", "test")  # of a recording's parts in the members, the first one in this order counts


def join(paths: Sequence[Path], out: Path) -> Bundle:
    """Write the networks of the bundles ``paths`` as one bundle into the new folder ``out``.

    Raises:
        SerError: fewer than two bundles, the same one twice, bundles that do not fit together, or ``out`` exists.
    """
    bundles = [load_bundle(path) for path in paths]
    _refuse_misfits(bundles)
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise SerError(f"{out} exists already; give another --out, or remove it") from error
    first = bundles[0]
    state = {
        f"members.{number}.{name}": value
        for number, bundle in enumerate(bundles)
        for name, value in bundle.state_dict().items()
    }
    table = _training_table(bundles)
    training = _training(bundles, table)
    known = pd.DataFrame() if table is None else with_corpora(table)
    return save_bundle(
        out,
        name=first.name,
        state_dict=state,
        model_name=first.model_name,
        model_options=_own_options(first) | {MEMBERS: len(bundles)},
        labels=first.labels,
        features=first.features,
        crops=first.crops,
        metrics={"training": training},
        training=table,
        card=model_card(first.name, first.labels, first.features, training, {}, known),
    )


def mean_answers(tables: Sequence[pd.DataFrame], labels: Sequence[str]) -> pd.DataFrame:
    """The score table that the joined model would give, from those of its members, with rows in the same order.

    Raises:
        SerError: the tables have different recordings.
    """
    first = tables[0]
    if any(list(table["row_id"]) != list(first["row_id"]) for table in tables):
        raise SerError("the answers to join are for different recordings; train all models on the same folds")
    columns = [f"p_{name}" for name in labels]
    log_p = np.mean([np.log(np.maximum(table[columns].to_numpy(np.float64), 1e-300)) for table in tables], axis=0)
    return with_answers(first, np.exp(log_softmax(log_p)), labels)


def _own_options(bundle: Bundle) -> dict[str, Any]:
    """The options that decide a member's network; without dropout, which has no effect after training."""
    return {name: value for name, value in bundle.model_options.items() if name != "dropout"}


def _refuse_misfits(bundles: Sequence[Bundle]) -> None:
    if not 2 <= len(bundles) <= MAX_MEMBERS:
        raise SerError(f"{len(bundles)} models to join; give 2 to {MAX_MEMBERS}")
    first, seen = bundles[0], dict[str, Path]()
    for bundle in bundles:
        if MEMBERS in bundle.model_options:
            raise SerError(f"{bundle.folder} is a joined model itself; give the models that it was made from")
        if bundle.weights_sha256 in seen:
            raise SerError(f"{bundle.folder} and {seen[bundle.weights_sha256]} have the same weights; give one of them")
        seen[bundle.weights_sha256] = bundle.folder
        differences = {
            "is another network": (bundle.model_name, _own_options(bundle)) != (first.model_name, _own_options(first)),
            "has other classes": bundle.labels != first.labels,
            "uses other features": bundle.features != first.features,
            "uses another number of crops": bundle.crops != first.crops,
        }
        for difference, there in differences.items():
            if there:
                raise SerError(f"{bundle.folder} {difference} than {first.folder}; join models of one kind")


def _training_table(bundles: Sequence[Bundle]) -> pd.DataFrame | None:
    """``training.csv``: every recording of the members once, in its first part of ``_ORDER``; None without a list."""
    tables = [bundle.training for bundle in bundles]
    recording = ["id", HASH_COLUMN]
    if any(not {*recording, "split"} <= set(table.columns) for table in tables):
        return None
    rows = pd.concat(tables, ignore_index=True)
    place = rows["split"].map({name: place for place, name in enumerate(_ORDER)}).fillna(0).astype(int)
    first = rows.assign(split=place).groupby(recording, sort=False)["split"].transform("min")
    return rows.assign(split=first.map(dict(enumerate(_ORDER)))).drop_duplicates(recording).reset_index(drop=True)


def _training(bundles: Sequence[Bundle], table: pd.DataFrame | None) -> dict[str, Any]:
    """The `training` block of metrics.json: settings of the first member; weights, epochs and settings of each."""
    clips = "unknown data" if table is None else f"{(table['split'] == 'train').sum()} clips (training.csv)"
    return {
        "model": bundles[0].model_name,
        "trained_on": clips,
        "settings": bundles[0].about()["settings"],
        "joined": [bundle.about(("epochs", "best_epoch", "trained_on", "settings")) for bundle in bundles],
    }
