"""Sets the temperature of a model bundle, or its familiarity; the classes that it predicts do not change."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._common import EXIT_DONE, Parser, command, parser_of, say
from pipeline.data.labels import LabelSet
from pipeline.storage.errors import SerError
from pipeline.storage.files import usable_cpus

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.models.bundle import Bundle


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("calibrate", __doc__, "--model_weights runs/first --predictions protocols/kfold")
    parser.add_argument("--model_weights", type=Path, required=True, help="the bundle to change")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--features",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="set the familiarity, from the features that the model was trained on: one or more folders that ser "
        "extract wrote (ser train does this by itself)",
    )
    source.add_argument(
        "--predictions",
        type=Path,
        help="set the temperature, from answers to labelled recordings: the folder of a protocol that ser crossval "
        "wrote, or the model's own answers from ser evaluate or ser score (recordings that it was trained on are left "
        "out)",
    )
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Fit, write into the bundle, and print the change."""
    return _temperature(arguments) if arguments.features is None else _familiarity(arguments)


def _familiarity(arguments: argparse.Namespace) -> int:
    from pipeline.data.segments import HASH_COLUMN
    from pipeline.features.store import load_features
    from pipeline.models.bundle import load_bundle
    from pipeline.training.results import LEAST_ALONE, LEAST_HELD_OUT, learn_familiarity

    bundle = load_bundle(arguments.model_weights)
    table, training = load_features(arguments.features, bundle.features).table, bundle.training
    if training.empty or HASH_COLUMN not in table.columns:
        raise SerError("the bundle has no training.csv, or the features no content hashes; extract them again")
    learnt = training[training["split"] == "train"] if "split" in training.columns else training
    own = table[table["parent_id"] == ""]
    known = own[HASH_COLUMN].isin(set(learnt[HASH_COLUMN]))
    rows, others = own.loc[known, "row_id"], own.loc[~known, "row_id"]
    if not (used := learn_familiarity(bundle, arguments.features, set(rows), set(others))):
        raise SerError(
            f"{len(rows)} of these recordings are in the model's training part, and {len(others)} are not; give the "
            f"features that it was trained on, {LEAST_ALONE:,} or more, or also {LEAST_HELD_OUT} of other recordings"
        )
    found = load_bundle(bundle.folder).familiarity
    assert found is not None
    say(f"familiarity set from {used:,} training recordings; a recording below {found.least:.2f} is unfamiliar")
    return EXIT_DONE


def _temperature(arguments: argparse.Namespace) -> int:
    import numpy as np

    from pipeline.evaluation.outcomes import failed_rows
    from pipeline.models.bundle import load_bundle, set_temperature
    from pipeline.models.doubt import fit_temperature, scaled
    from pipeline.scoring.predictions import read_predictions

    bundle = load_bundle(arguments.model_weights)
    table = read_predictions(arguments.predictions)
    columns = [f"p_{label}" for label in bundle.labels]
    missing = [name for name in ["label_name", *columns] if name not in table.columns]
    if missing:
        raise SerError(
            f"{arguments.predictions} has no column {missing[0]}; give answers to labelled recordings, with the same "
            "classes as the model"
        )
    table = table[~failed_rows(table) & table["label_name"].isin(bundle.labels)]
    plan = _plan(arguments.predictions)
    if plan is not None:
        table = _without_training(table, plan, bundle)
    labels = LabelSet(bundle.labels)
    truth = np.array([labels.index(name) for name in table["label_name"]], np.int64)
    applied = 1.0 if plan is None else plan["temperature"]
    found = fit_temperature(truth, scaled(table[columns].to_numpy(np.float64), 1 / applied))
    set_temperature(bundle, found.temperature, {"n": found.n, "before": found.before, "after": found.after})
    say(f"temperature {found.temperature:.3f}, from {found.n} recordings (was {bundle.temperature:.3f})")
    for name, before in found.before.items():
        say(f"  {name:<9} {before:.4f} -> {found.after[name]:.4f}")
    return EXIT_DONE


def _plan(predictions: Path) -> dict[str, Any] | None:
    """The model and temperature of a scoring; None for the answers of a protocol: several models at temperature 1."""
    from pipeline.scoring.ledger import RUN

    record = (predictions if predictions.is_dir() else predictions.parent) / RUN
    if not record.is_file():
        return None
    try:
        plan = json.loads(record.read_text(encoding="utf-8"))["plan"]
        return {"model": str(plan["model"]), "temperature": float(plan["temperature"])}
    except (ValueError, KeyError, TypeError) as error:
        raise SerError(f"{record} is not the record of a finished scoring; run ser evaluate again") from error


def _without_training(table: pd.DataFrame, plan: Mapping[str, Any], bundle: Bundle) -> pd.DataFrame:
    """A bundle's own answers without those to its training recordings; the inner validation part is kept."""
    from pipeline.data.segments import END, START, place_of
    from pipeline.data.splits import add_hashes, leaked

    if plan["model"] != bundle.weights_sha256:
        raise SerError(
            f"the answers were given by the weights {plan['model'][:12]}, but {bundle.folder} has the weights "
            f"{bundle.weights_sha256[:12]}; give the model that gave the answers"
        )
    training = bundle.training
    if "split" in training.columns:
        training = training[training["split"] != "inner_val"]
    place = place_of(table)
    paths = table[[name for name in ("speech", START, END) if name in table.columns]][~place.duplicated()]
    known = paths.loc[leaked(add_hashes(paths, threads=usable_cpus()), training), "speech"]
    rows = place.isin(place[known.index])
    if rows.any():
        say(f"left out: {len(known)} of {len(paths)} recordings, which were used in training, such as {known.iloc[0]}")
    return table[~rows]


main = command(job, build_parser)


if __name__ == "__main__":
    raise SystemExit(main())
