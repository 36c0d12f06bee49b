"""Out-of-fold answers -> the temperature of a model bundle: confidences that mean what they say, answers unchanged."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jobs._common import EXIT_DONE, Parser, run, say
from pipeline.calibration import fit_temperature, scaled
from pipeline.checkpoint import load_bundle, set_temperature
from pipeline.errors import SerError
from pipeline.labels import LabelSet
from pipeline.outcomes import failed_rows
from pipeline.predictions import read_predictions


def build_parser() -> Parser:
    """The options of this job."""
    parser = Parser(
        prog="python -m jobs.calibrate",
        description=__doc__,
        epilog="example: python -m jobs.calibrate --model_weights runs/first --predictions protocols/kfold",
    )
    parser.add_argument("--model_weights", type=Path, required=True, help="bundle whose temperature is set")
    parser.add_argument(
        "--predictions",
        type=Path,
        required=True,
        help="answers to recordings that the answering models were not trained on: the folder of a protocol",
    )
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Fit, write, and say what it changed."""
    bundle = load_bundle(arguments.model_weights)
    table = read_predictions(arguments.predictions)
    columns = [f"p_{label}" for label in bundle.labels]
    missing = [name for name in ["label_name", *columns] if name not in table.columns]
    if missing:
        raise SerError(f"{arguments.predictions} has no column {missing[0]}; give labelled answers of the same classes")
    table = table[~failed_rows(table) & table["label_name"].isin(bundle.labels)]
    labels = LabelSet(bundle.labels)
    truth = np.array([labels.index(name) for name in table["label_name"]], np.int64)
    applied = _applied_temperature(arguments.predictions)
    found = fit_temperature(truth, scaled(table[columns].to_numpy(np.float64), 1 / applied))
    set_temperature(bundle, found.temperature, {"n": found.n, "before": found.before, "after": found.after})
    say(f"temperature {found.temperature:.3f}, from {found.n} recordings (was {bundle.temperature:.3f})")
    for name, before in found.before.items():
        say(f"  {name:<9} {before:.4f} -> {found.after[name]:.4f}")
    return EXIT_DONE


def _applied_temperature(predictions: Path) -> float:
    """The temperature that the answers have: 1 of a protocol, the bundle's of score and evaluate."""
    record = (predictions if predictions.is_dir() else predictions.parent) / "run.json"
    return float(json.loads(record.read_text(encoding="utf-8"))["plan"]["temperature"]) if record.is_file() else 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job."""
    return run(job, build_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
