"""The options of `jobs.train`, and the settings they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from jobs._common import LabelMap, Parser, add_label_names, true_or_false
from pipeline.data.labels import LabelSet
from pipeline.storage.errors import SerError

if TYPE_CHECKING:
    from pipeline.training.config import FitConfig

MODELS = ("inception", "cnn_bilstm")
FEATURE_KINDS = {"inception": "log_mel", "cnn_bilstm": "frame_features"}


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
    group.add_argument(
        "--root", type=Path, help="folder that relative paths in the CSV start from (default: the CSV's folder)"
    )
    group.add_argument("--label_map", action=LabelMap, help="other label names: given=wanted,...")
    add_label_names(group)
    group.add_argument(
        "--out", type=Path, required=True, help="folder of the run: checkpoints, history, bundle, report"
    )
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


def add_model_options(parser: Parser) -> None:
    """Model, sampling, loss and augmentation."""
    group = parser.add_argument_group("model and loss")
    group.add_argument("--model", choices=MODELS, default="inception", help="the network (default inception)")
    group.add_argument("--dropout", type=float, help="default: the model's own (inception 0.4, cnn_bilstm 0.3)")
    group.add_argument(
        "--width",
        type=float,
        help="of the inception: channels of every layer times this, 0.125 to 2; 0.5: a quarter of the weights",
    )
    group.add_argument(
        "--oversample_boost",
        default="",
        metavar="CLASS:FACTOR,...",
        help="draw classes more often, by index or name: 1:2.0,sad:1.5",
    )
    group.add_argument(
        "--corpus_share",
        type=shares,
        default={},
        metavar="CORPUS:SHARE,...",
        help="how much of the draws each corpus gets (column corpus; default: by the square root of its size)",
    )
    group.add_argument(
        "--mask_missing_classes",
        type=true_or_false,
        default=True,
        metavar="True|False",
        help="take classes that a corpus has not got out of the softmax of its recordings (default True)",
    )
    group.add_argument(
        "--class_weights",
        default="none",
        metavar="balanced|none|CLASS:WEIGHT,...",
        help="weights in the loss (default none)",
    )
    group.add_argument(
        "--label_smoothing", type=float, default=0.0, help="share of the target spread over all classes (default 0)"
    )
    group.add_argument(
        "--use_focal",
        type=true_or_false,
        default=False,
        metavar="True|False",
        help="focal loss instead of cross-entropy",
    )
    group.add_argument("--focal_gamma", type=float, default=2.0, help="how far easy clips count less (default 2)")
    group.add_argument(
        "--augment",
        default="",
        metavar="NAME[:STRENGTH],...",
        help="of crop, stretch, shift, warp, masks, mixup, gain, noise, band, pitch; with commas (default none); "
        "stronger or weaker than usual: stretch:0.15, warp:0.12 (shares), gain:6 (dB), noise:10 (lowest SNR in dB), "
        "band:0.2 (how often)",
    )
    group.add_argument(
        "--mixup_alpha", type=float, default=0.2, help="of the Beta distribution that mixes (default 0.2)"
    )


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


def add_loop_options(parser: Parser) -> None:
    """Epochs, optimiser, seed."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=50, help="at most so many (default 50)")
    group.add_argument(
        "--draws", type=int, default=0, help="recordings drawn an epoch (default 0: as many as there are)"
    )
    group.add_argument("--batch_size", type=int, default=64, help="of all workers together (default 64)")
    group.add_argument("--lr", type=float, default=1e-4, help="highest learning rate (default 1e-4)")
    group.add_argument("--weight_decay", type=float, default=1e-5, help="of AdamW (default 1e-5)")
    group.add_argument(
        "--scheduler", choices=("cosine", "onecycle"), default="cosine", help="course of the learning rate"
    )
    group.add_argument("--warmup_epochs", type=float, default=0.0, help="rise to the highest rate (default 0)")
    group.add_argument("--clip_norm", type=float, default=0.0, help="largest gradient norm; 0: no clipping")
    group.add_argument("--ema", type=float, default=0.0, help="decay of the average of weights, as 0.995; 0: none")
    group.add_argument(
        "--patience",
        type=int,
        default=7,
        help="epochs without a better validation F1 before stopping; 0: never stop early",
    )
    group.add_argument("--seed", type=int, default=42, help="of weights, order and augmentation (default 42)")
    group.add_argument(
        "--cpu_bfloat16",
        action="store_true",
        help="bfloat16 arithmetic on CPUs, as on GPUs: faster where `lscpu` shows amx_bf16 or avx512_bf16",
    )


def add_worker_options(parser: Parser) -> None:
    """Workers and what each is given."""
    group = parser.add_argument_group("workers")
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
    group.add_argument(
        "--threads", type=int, default=0, help="math threads a worker (default: the CPUs shared out equally)"
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
    from pipeline.cluster.nodes import cpus_a_worker
    from pipeline.training.batches import parse_class_values
    from pipeline.training.config import FitConfig

    if threads is None:
        threads = arguments.threads or cpus_a_worker(arguments.num_workers)
    return FitConfig(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        weight_decay=arguments.weight_decay,
        scheduler=arguments.scheduler,
        warmup_epochs=arguments.warmup_epochs,
        clip_norm=arguments.clip_norm,
        label_smoothing=arguments.label_smoothing,
        use_focal=arguments.use_focal,
        focal_gamma=arguments.focal_gamma,
        class_weights=_loss_weights(arguments.class_weights, labels, train),
        oversample_boost=parse_class_values(arguments.oversample_boost, labels),
        corpus_share=arguments.corpus_share,
        draws=arguments.draws,
        mask_missing_classes=arguments.mask_missing_classes,
        ema=arguments.ema,
        augment=augmentations(arguments),
        mixup_alpha=arguments.mixup_alpha,
        patience=arguments.patience,
        seed=arguments.seed,
        threads=threads,
        cpu_bfloat16=arguments.cpu_bfloat16,
    )


def _loss_weights(wanted: str | Mapping[str, float], labels: LabelSet, train: pd.DataFrame) -> tuple[float, ...] | None:
    """`none`, `balanced`, or weights of classes, as `CLASS:WEIGHT,...` too, with 1 for those that are not named."""
    from pipeline.training.batches import class_weights, parse_class_values

    if wanted == "none":
        return None
    if wanted == "balanced":
        classes = np.array([labels.index(name) for name in train["label"]])
        return tuple(float(w) or 1.0 for w in class_weights(classes, len(labels)))
    given = parse_class_values(wanted, labels, "--class_weights")
    return tuple(given.get(i, 1.0) for i in range(len(labels)))
