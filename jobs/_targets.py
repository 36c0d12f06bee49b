"""The options of ``evaluate`` and ``crossval`` that set targets for a model's figures."""

from __future__ import annotations

import argparse

from pipeline.evaluation.verdict import Targets


def add_targets(parser: argparse.ArgumentParser) -> None:
    """Add the target options, as a group."""
    targets = parser.add_argument_group("targets (write 80 % as 0.80 or 80)")
    targets.add_argument("--min_accuracy", type=_share, default=0.80, help="least accuracy (default 0.80)")
    targets.add_argument("--min_weighted_f1", type=_share, default=0.80, help="least weighted F1 (default 0.80)")
    targets.add_argument(
        "--min_class_accuracy", type=_share, default=0.75, help="least recall of every class (default 0.75)"
    )
    targets.add_argument("--enforce", action="store_true", help="exit with code 3 unless every target is reached")


def targets_of(arguments: argparse.Namespace) -> Targets:
    """The targets that the options set."""
    return Targets(arguments.min_accuracy, arguments.min_weighted_f1, arguments.min_class_accuracy)


def _share(text: str) -> float:
    try:
        value = float(text.strip().rstrip("%"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a share such as 0.80 or 80, got {text!r}") from None
    value = value / 100 if value > 1 or text.strip().endswith("%") else value
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, or 0 to 100 %, got {text!r}")
    return value
