"""The options of `jobs.train`, and the settings they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._common import Parser, add_csv_options, add_out, true_or_false
from pipeline.data.labels import LabelSet
from pipeline.storage.errors import SerError
from pipeline.training.config import FitConfig

if TYPE_CHECKING:
    import pandas as pd

MODELS = ("inception", "cnn_bilstm")
FEATURE_KINDS = {"inception": "log_mel", "cnn_bilstm": "frame_features"}
USUAL = (
    *(
        "data_csv",
        "features",
        "protocol",
        "out",
        "epochs",
        "batch_size",
        "lr",
        "oversample_boost",
        "use_focal",
    ),
    *("augment", "num_workers"),
)  # of train and crossval; shown first


def add_data_options(parser: Parser) -> None:
    """What is trained on, and where the run is kept."""
    group = parser.add_argument_group("data")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data_csv",
        type=Path,
        nargs="+",
        metavar="CSV",
        help="CSV with the columns speech,label, or several; extracted to OUT/features first",
    )
    source.add_argument("--data_dir", type=Path, help="folder of labelled recordings; extracted to OUT/features first")
    source.add_argument(
        "--features", type=Path, nargs="+", metavar="FOLDER", help="folder that jobs.extract wrote, or several"
    )
    add_csv_options(group)
    add_out(group, "runs", "the run: checkpoints, history, bundle, report")
    group.add_argument(
        "--split",
        choices=("random", "speaker"),
        default="random",
        help="random: stratified by class; speaker: no voice in two parts",
    )
    group.add_argument(
        "--split_csv",
        type=Path,
        help="CSV with split and content_hash, id or speaker: the part of each recording; others are left out",
    )
    for name, what in (("corpora", "corpora"), ("speakers", "speakers")):
        group.add_argument(
            f"--test_{name}",
            type=names,
            default=(),
            metavar="NAME,...",
            help=f"train on everything but these {what}, and report on them",
        )
    group.add_argument("--test_size", type=float, default=0.2, help="share held out for the final report (default 0.2)")
    group.add_argument(
        "--inner_val",
        type=float,
        default=0.2,
        help="share of the rest that chooses the epoch; 0: train on all of it for exactly --epochs (default 0.2)",
    )
    group.add_argument(
        "--report_split",
        choices=("test", "inner_val", "none"),
        default="test",
        help="what the final report is computed on (default test)",
    )
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    group.add_argument("--tolerate_failures", action="store_true", help="exit 0 even when some recordings failed")


def names(text: str) -> tuple[str, ...]:
    """``a, b`` as its parts."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def refuse_beside_features(arguments: argparse.Namespace) -> None:
    """Refuse options of recordings where ``--features`` has their labels and paths already."""
    for name in ("label_map", "label_names", "root"):
        if arguments.features and getattr(arguments, name):
            raise SerError(f"--{name} is for a --data_csv or --data_dir, --features has what it was extracted with")


def add_fit_options(parser: Parser, groups: Sequence[str]) -> None:
    """The network, and the fields of ``FitConfig`` that are in these groups."""
    model = _group(parser, groups[0])
    model.add_argument("--model", choices=MODELS, default="inception", help="the network (default inception)")
    model.add_argument("--dropout", type=float, help="default: the model's own (inception 0.4, cnn_bilstm 0.3)")
    model.add_argument(
        "--width",
        type=float,
        help="of the inception: channels of every layer times this, 0.125 to 2; 0.5: a quarter of the weights",
    )
    for title in groups:
        for option in FitConfig.options(title):
            _group(parser, title).add_argument(f"--{option.name}", **_reading(option))


def _group(parser: Parser, title: str) -> argparse._ArgumentGroup:
    return next((g for g in parser._action_groups if g.title == title), None) or parser.add_argument_group(title)


def _reading(option: Field[Any]) -> dict[str, Any]:
    """How argparse reads a field: by its type, or as the text that stands for it."""
    how = {name: value for name, value in option.metadata.items() if name != "group"}
    if option.name in _TEXTS:
        default, read = _TEXTS[option.name]
        return {"type": read, "default": default, **how}
    if option.type == "bool":
        words = {"nargs": "?", "const": True, "metavar": "True|False"}
        return {"type": true_or_false, "default": option.default, **words, **how} | {
            "help": f"{how['help']} (default {option.default})"
        }
    told = f"{option.default:g}" if option.type == "float" else option.default
    read = {"int": int, "float": float, "str": str}[str(option.type)]
    return {"type": read, "default": option.default, **how, "help": f"{how['help']} (default {told})"}


def shares(text: str) -> dict[str, float]:
    """``ravdess_speech:0.4,crema_d:0.6`` as a mapping."""
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


_TEXTS: dict[str, tuple[Any, Callable[[str], Any]]] = {  # what the labels of the data are needed for stays a text
    "class_weights": ("none", str),
    "oversample_boost": ("", str),
    "corpus_share": ({}, shares),
    "augment": ("", str),
}


def add_teacher_options(parser: Parser) -> None:
    """Trained models to begin with or to learn from."""
    group = parser.add_argument_group("earlier models")
    group.add_argument(
        "--init",
        type=Path,
        metavar="BUNDLE",
        help="start from the weights of this model of `ser train` (same or other classes) instead of random ones",
    )
    group.add_argument(
        "--teachers",
        type=Path,
        nargs="+",
        default=[],
        metavar="BUNDLE",
        help="models whose mean answer to each augmented example is part of its target (knowledge distillation)",
    )
    add_distill_option(group)


def add_distill_option(group: argparse._ArgumentGroup) -> None:
    """``--distill``, beside whatever names the teachers."""
    group.add_argument(
        "--distill", type=_share, default=0.7, metavar="SHARE", help="the teachers' share of the loss (default 0.7)"
    )


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"got {text!r}; expected a number above 0, at most 1")


def add_worker_options(parser: Parser) -> None:
    """Workers and what each is given."""
    group = _group(parser, "workers")
    group.add_argument(
        "--num_workers",
        type=int,
        default=1,
        help="Ray Train workers; 0: in this process, with --features wholly without Ray (default 1)",
    )
    group.add_argument(
        "--max_failures", type=int, default=3, help="how often failed Ray workers are started again (default 3)"
    )
    group.add_argument(
        "--use_gpu", type=true_or_false, nargs="?", const=True, metavar="True|False", help="default: when there is one"
    )


def model_options(arguments: argparse.Namespace) -> dict[str, float]:
    """The options of the network that were given.

    Raises:
        SerError: one that the network does not have, or a value out of range.
    """
    from pipeline.models.networks import check_options

    values = {name: getattr(arguments, name) for name in ("dropout", "width")}
    given = {name: value for name, value in values.items() if value is not None}
    check_options(arguments.model, given)
    return given


def augmentations(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The names in `--augment`."""
    return tuple(name.strip() for name in arguments.augment.split(",") if name.strip())


def fit_config(
    arguments: argparse.Namespace, labels: LabelSet, train: pd.DataFrame, threads: int | None = None
) -> FitConfig:
    """The settings that the options stand for; `train` are the manifest rows of the training part.

    `threads` are those of a worker; by default as the worker options say.

    Raises:
        SerError: a value out of range, an unknown class or name.
    """
    from pipeline.cluster.engine import cpus_a_worker
    from pipeline.training.batches import parse_class_values

    if threads is None:
        threads = arguments.threads or cpus_a_worker(arguments.num_workers)
    given: dict[str, Any] = {option.name: getattr(arguments, option.name, None) for option in FitConfig.options()}
    given |= {
        "class_weights": _loss_weights(arguments.class_weights, labels, train),
        "oversample_boost": parse_class_values(arguments.oversample_boost, labels),
        "augment": augmentations(arguments),
        "threads": threads,
    }
    return FitConfig(**given)


def _loss_weights(wanted: str | Mapping[str, float], labels: LabelSet, train: pd.DataFrame) -> tuple[float, ...] | None:
    """`none`, `balanced`, or weights of classes, as `CLASS:WEIGHT,...` too, with 1 for those that are not named."""
    from pipeline.training.batches import class_weights, parse_class_values

    if wanted == "none":
        return None
    if wanted == "balanced":
        import numpy as np

        classes = np.array([labels.index(name) for name in train["label"]])
        return tuple(float(w) or 1.0 for w in class_weights(classes, len(labels)))
    given = parse_class_values(wanted, labels, "--class_weights")
    return tuple(given.get(i, 1.0) for i in range(len(labels)))
