"""The options of `jobs.train`, and their conversion to training settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._common import CSV_OPTIONS, TRUE_OR_FALSE, Parser, add_out, add_shared, fields_of
from pipeline.data.labels import LabelSet
from pipeline.storage.errors import SerError
from pipeline.training.config import FitConfig

if TYPE_CHECKING:
    import pandas as pd

MODELS = ("inception", "cnn_bilstm")
FEATURE_KINDS = {"inception": "log_mel", "cnn_bilstm": "frame_features"}
# options of train and crossval that --help shows
USUAL: tuple[str, ...] = ("data_csv", "features", "protocol", "out", "epochs", "batch_size", "lr", "oversample_boost")
USUAL += ("use_focal", "augment", "num_workers")


def add_data_options(parser: Parser) -> None:
    """Add the options of the data, its parts and the run's folder."""
    group = parser.add_argument_group("data")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data_csv",
        type=Path,
        nargs="+",
        metavar="CSV",
        help="one or more CSVs with the columns speech,label; their features are written to OUT/features first",
    )
    source.add_argument(
        "--data_dir", type=Path, help="folder of labelled recordings; their features are written to OUT/features first"
    )
    add_shared(source, "features")
    add_shared(group, *CSV_OPTIONS)
    add_out(group, "runs", "the run: checkpoints, history, bundle, report")
    group.add_argument(
        "--split",
        choices=("random", "speaker"),
        default="random",
        help="random: split by recording, stratified by class; speaker: no speaker is in two parts (default random)",
    )
    group.add_argument(
        "--split_csv",
        type=Path,
        help="CSV that names each recording's part: a column split (train, inner_val, test), and content_hash, id or "
        "speaker; recordings that it does not name are left out",
    )
    for what in ("corpora", "speakers"):
        group.add_argument(
            f"--test_{what}",
            type=names,
            default=(),
            metavar="NAME,...",
            help=f"use these {what} as the test part, and train on all others",
        )
    group.add_argument(
        "--test_size", type=float, default=0.2, help="share of all recordings in the test part (default 0.2)"
    )
    group.add_argument(
        "--inner_val",
        type=float,
        default=0.2,
        help="share of the rest that is used to choose the best epoch; 0: train on all the rest for exactly --epochs "
        "(default 0.2)",
    )
    group.add_argument(
        "--report_split",
        choices=("test", "inner_val", "none"),
        default="test",
        help="the part that the final report is computed on (default test)",
    )
    group.add_argument("--resume", action="store_true", help="continue the run in --out")
    add_shared(group, "tolerate_failures")


def names(text: str) -> tuple[str, ...]:
    """The names in ``a, b``: ``("a", "b")``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def refuse_beside_features(arguments: argparse.Namespace) -> None:
    """Raise SerError if ``--features`` is given together with options about labels or paths of recordings."""
    for name in ("label_map", "label_names", "root"):
        if arguments.features and getattr(arguments, name):
            raise SerError(
                f"--{name} cannot be used with --features, whose labels and paths are fixed; give it to ser extract"
            )


def add_fit_options(parser: Parser, groups: Sequence[str]) -> None:
    """Add the options of the network, and an option for each field of ``FitConfig`` in these groups."""
    model = _group(parser, groups[0])
    model.add_argument("--model", choices=MODELS, default="inception", help="the network (default inception)")
    model.add_argument("--dropout", type=float, help="dropout rate (default: inception 0.4, cnn_bilstm 0.3)")
    model.add_argument(
        "--width",
        type=float,
        help="inception only: multiplies the number of channels of every layer, 0.125 to 2; 0.5 gives a quarter of the "
        "weights (default 1)",
    )
    for title in groups:
        for option in FitConfig.options(title):
            _group(parser, title).add_argument(f"--{option.name}", **_reading(option))


def _group(parser: Parser, title: str) -> argparse._ArgumentGroup:
    return next((g for g in parser._action_groups if g.title == title), None) or parser.add_argument_group(title)


def _reading(option: Field[Any]) -> dict[str, Any]:
    """The keywords of ``add_argument`` for a field: from its type, or from ``_TEXTS``."""
    how = {name: value for name, value in option.metadata.items() if name != "group"}
    if option.name in _TEXTS:
        default, read = _TEXTS[option.name]
        return {"type": read, "default": default, **how}
    default = f"{option.default:g}" if option.type == "float" else option.default
    how |= {"default": option.default, "help": f"{how['help']} (default {default})"}
    if option.type == "bool":
        return TRUE_OR_FALSE | how
    return {"type": {"int": int, "float": float, "str": str}[str(option.type)], **how}


def shares(text: str) -> dict[str, float]:
    """Parse ``ravdess_speech:0.4,crema_d:0.6`` into a mapping from corpus to share."""
    from pipeline.training.batches import pairs

    found: dict[str, float] = {}
    try:
        for name, share in pairs(
            text, "--corpus_share", "CORPUS:SHARE with a share above 0, as in ravdess:0.4,mine:0.6"
        ):
            if name in found:
                raise SerError(f"--corpus_share: corpus {name!r} is given twice; give it once")
            found[name] = share
    except SerError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return found


# field -> default and parser; a text that names classes stays a str until the labels of the data are known
_TEXTS: dict[str, tuple[Any, Callable[[str], Any]]] = {
    "class_weights": ("none", str),
    "oversample_boost": ("", str),
    "corpus_share": ({}, shares),
    "augment": ("", str),
}


def add_teacher_options(parser: Parser) -> None:
    """Add the options that name earlier models: to start from, or as teachers."""
    group = parser.add_argument_group("earlier models")
    group.add_argument(
        "--init",
        type=Path,
        metavar="BUNDLE",
        help="start from the weights of this model, which ser train wrote, instead of random weights; its classes may "
        "differ",
    )
    group.add_argument(
        "--teachers",
        type=Path,
        nargs="+",
        default=[],
        metavar="BUNDLE",
        help="models for knowledge distillation: their mean answer to each augmented example is a part of its target",
    )
    add_distill_option(group)


def add_distill_option(group: argparse._ArgumentGroup) -> None:
    """Add ``--distill``."""
    group.add_argument(
        "--distill", type=_share, default=0.7, metavar="SHARE", help="share of the teachers in the loss (default 0.7)"
    )


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}; expected a number above 0 and at most 1")


def add_worker_options(parser: Parser) -> None:
    """Add the options of the Ray Train workers."""
    group = _group(parser, "workers")
    group.add_argument(
        "--num_workers",
        type=int,
        default=1,
        help="number of Ray Train workers; 0: train in this process; together with --features no Ray is used at all "
        "(default 1)",
    )
    group.add_argument(
        "--max_failures",
        type=int,
        default=3,
        help="how many times failed Ray workers are restarted before the training stops (default 3)",
    )
    group.add_argument("--use_gpu", **TRUE_OR_FALSE, help="train on a GPU (default: if this machine has one)")


def model_options(arguments: argparse.Namespace) -> dict[str, float]:
    """Those of ``--dropout`` and ``--width`` that were given; refuses what the network does not have or allow."""
    from pipeline.models.networks import check_options

    given = {name: value for name, value in fields_of(arguments, "dropout", "width").items() if value is not None}
    check_options(arguments.model, given)
    return given


def fit_config(
    arguments: argparse.Namespace, labels: LabelSet, train: pd.DataFrame, threads: int | None = None
) -> FitConfig:
    """The training settings of the options; refuses values out of range, and unknown classes or augmentations.

    Args:
        train: manifest rows of the training part.
        threads: math threads of each worker; by default those of the worker options.
    """
    from pipeline.cluster.engine import cpus_a_worker
    from pipeline.training.batches import parse_class_values

    if threads is None:
        threads = arguments.threads or cpus_a_worker(arguments.num_workers)
    given: dict[str, Any] = {option.name: getattr(arguments, option.name, None) for option in FitConfig.options()}
    given |= {
        "class_weights": _loss_weights(arguments.class_weights, labels, train),
        "oversample_boost": parse_class_values(arguments.oversample_boost, labels),
        "augment": names(arguments.augment),
        "threads": threads,
    }
    return FitConfig(**given)


def _loss_weights(wanted: str | Mapping[str, float], labels: LabelSet, train: pd.DataFrame) -> tuple[float, ...] | None:
    """Class weights from `none` (None), `balanced`, `CLASS:WEIGHT,...` or a mapping; classes not named get 1."""
    from pipeline.training.batches import class_weights, parse_class_values

    if wanted == "none":
        return None
    if wanted == "balanced":
        import numpy as np

        classes = np.array([labels.index(name) for name in train["label"]])
        return tuple(float(w) or 1.0 for w in class_weights(classes, len(labels)))
    given = parse_class_values(wanted, labels, "--class_weights")
    return tuple(given.get(i, 1.0) for i in range(len(labels)))
