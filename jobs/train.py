"""Recordings or feature shards -> a trained model bundle, on Ray Train or (--num_workers 0) in this process."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from jobs._common import EXIT_DONE, EXIT_INTERRUPTED, Parser, Progress, run, say, true_or_false
from jobs.extract import describe_labels, read_data
from pipeline.corpora import label_set
from pipeline.errors import SerError
from pipeline.labels import LabelSet, parse_label_map

if TYPE_CHECKING:
    from pipeline.fit import FitConfig
    from pipeline.runs import Plan

BUNDLE_NAMES = {"inception": "inception_ser_final", "cnn_bilstm": "cnn_bilstm_ser_final"}
FEATURE_KINDS = {"inception": "log_mel", "cnn_bilstm": "frame_features"}


def build_parser() -> Parser:
    """The options of this job."""
    parser = Parser(
        prog="python -m jobs.train",
        description=__doc__,
        epilog="example: python -m jobs.train --data_csv metadata.csv --epochs 50 --num_workers 2 --out runs/first",
    )
    _add_data_options(parser)
    _add_model_options(parser)
    _add_loop_options(parser)
    return parser


def _add_data_options(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data_csv", type=Path, help="CSV with the columns speech,label; extracted to OUT/features first"
    )
    source.add_argument("--data_dir", type=Path, help="folder of labelled recordings; extracted to OUT/features first")
    source.add_argument("--features", type=Path, help="folder that jobs.extract wrote")
    group.add_argument(
        "--root", type=Path, help="folder that relative paths in the CSV start from (default: the CSV's folder)"
    )
    group.add_argument("--label_map", type=parse_label_map, help="other label names: given=wanted,...")
    group.add_argument(
        "--out", type=Path, required=True, help="folder of the run: checkpoints, history, bundle, report"
    )
    group.add_argument(
        "--split",
        choices=("random", "speaker"),
        default="random",
        help="random: stratified by class; speaker: no voice in two parts",
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


def _add_model_options(parser: Parser) -> None:
    group = parser.add_argument_group("model and loss")
    group.add_argument("--model", choices=tuple(BUNDLE_NAMES), default="inception")
    group.add_argument("--dropout", type=float, help="default: the model's own (inception 0.4)")
    group.add_argument(
        "--oversample_boost",
        default="",
        metavar="CLASS:FACTOR,...",
        help="draw classes more often, by index or name: 1:2.0,sad:1.5",
    )
    group.add_argument(
        "--class_weights",
        default="none",
        metavar="balanced|none|CLASS:WEIGHT,...",
        help="weights in the loss (default none)",
    )
    group.add_argument("--label_smoothing", type=float, default=0.0)
    group.add_argument(
        "--use_focal",
        type=true_or_false,
        default=False,
        metavar="True|False",
        help="focal loss instead of cross-entropy",
    )
    group.add_argument("--focal_gamma", type=float, default=2.0)
    group.add_argument(
        "--augment",
        default="",
        metavar="NAME,...",
        help="crop,stretch,shift,masks,mixup,gain,noise,band,pitch (default none)",
    )
    group.add_argument("--mixup_alpha", type=float, default=0.2)


def _add_loop_options(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=50)
    group.add_argument("--batch_size", type=int, default=64, help="of all workers together (default 64)")
    group.add_argument("--lr", type=float, default=1e-4)
    group.add_argument("--weight_decay", type=float, default=1e-5)
    group.add_argument("--scheduler", choices=("cosine", "onecycle"), default="cosine")
    group.add_argument("--warmup_epochs", type=float, default=0.0)
    group.add_argument("--clip_norm", type=float, default=0.0, help="largest gradient norm; 0: no clipping")
    group.add_argument("--ema", type=float, default=0.0, help="decay of the average of weights, as 0.995; 0: none")
    group.add_argument(
        "--patience",
        type=int,
        default=7,
        help="epochs without a better validation F1 before stopping; 0: never stop early",
    )
    group.add_argument("--seed", type=int, default=42)
    group.add_argument(
        "--num_workers", type=int, default=1, help="Ray Train workers; 0: in this process, without Ray (default 1)"
    )
    group.add_argument(
        "--use_gpu", type=true_or_false, nargs="?", const=True, metavar="True|False", help="default: when there is one"
    )
    group.add_argument(
        "--threads", type=int, default=0, help="math threads a worker (default: the CPUs shared out equally)"
    )


def job(arguments: argparse.Namespace) -> int:
    """Prepare, train, write the bundle and the report."""
    if arguments.num_workers < 0:
        raise SerError(f"--num_workers {arguments.num_workers}; expected 0 (without Ray) or more")
    if arguments.resume and (arguments.out / "config.json").is_file():
        say(f"the run in {arguments.out} is finished; nothing is left to do")
        return EXIT_DONE
    plan = _prepare(arguments)
    start = time.monotonic()
    interrupted = _train(plan, arguments)
    if not plan.checkpoint.is_file():
        say("interrupted before the first epoch was done")
        return EXIT_INTERRUPTED
    _finish(plan, arguments, time.monotonic() - start)
    return EXIT_INTERRUPTED if interrupted else EXIT_DONE


def _prepare(arguments: argparse.Namespace) -> Plan:
    """Read or extract the features, split, and lay down the run (or find it again)."""
    from pipeline.arrays import load_features
    from pipeline.runs import Plan, begin, read_plan, read_splits
    from pipeline.splits import add_hashes, check_disjoint, split_table

    if not arguments.resume and (arguments.out / "plan.json").exists():
        raise SerError(f"{arguments.out} already holds a run; continue it with --resume, or give another --out")
    if arguments.resume:
        read_plan(arguments.out)
    features = arguments.features or _extract(arguments)
    arrays = load_features(features)
    originals = (
        arrays.table[arrays.table["parent_id"].isin(["", None])] if "parent_id" in arrays.table else arrays.table
    )
    if "label" not in originals.columns:
        raise SerError(f"{features} has no labels; extract it from a CSV with a label column")
    if arguments.features:
        describe_labels(originals)
    labels = label_set(originals)
    if arguments.resume:
        splits = read_splits(arguments.out)
    else:
        splits = split_table(
            add_hashes(originals), test_size=arguments.test_size, inner_val=arguments.inner_val, by=arguments.split
        )
        check_disjoint(splits)
    say("parts: " + ", ".join(f"{name} {len(part)}" for name, part in splits.items()))
    plan = Plan(
        out=arguments.out,
        features=features,
        labels=labels.names,
        model_name=arguments.model,
        model_options={} if arguments.dropout is None else {"dropout": arguments.dropout},
        fit=_fit_config(arguments, labels, splits["train"]),
    )
    if arguments.resume:
        _check_same(read_plan(arguments.out), plan)
    else:
        begin(plan, splits)
    return plan


def _check_same(recorded: dict[str, Any], plan: Plan) -> None:
    for name in ("labels", "model"):
        if recorded[name] != plan.to_dict()[name]:
            raise SerError(
                f"the run was started with {name} {recorded[name]}, got {plan.to_dict()[name]}; resume with the same"
            )


def _extract(arguments: argparse.Namespace) -> Path:
    from pipeline.features import FeatureConfig
    from pipeline.shards import extract_shards

    table = read_data(arguments)
    describe_labels(table)
    folder: Path = arguments.out / "features"
    summary = extract_shards(
        table, folder, FeatureConfig(kind=FEATURE_KINDS[arguments.model]), on_progress=Progress("extract")
    )
    if summary.failed:
        say(
            f"{summary.failed} of {summary.rows} recordings could not be read and are left out; see the column error in {folder}"
        )
    return folder


def _fit_config(arguments: argparse.Namespace, labels: LabelSet, train: pd.DataFrame) -> FitConfig:
    from pipeline.fit import FitConfig
    from pipeline.sampling import class_weights, parse_class_values

    weights: tuple[float, ...] | None = None
    if arguments.class_weights == "balanced":
        classes = np.array([labels.index(name) for name in train["label"]])
        weights = tuple(float(w) for w in class_weights(classes, len(labels)))
    elif arguments.class_weights != "none":
        given = parse_class_values(arguments.class_weights, labels, "--class_weights")
        weights = tuple(given.get(i, 1.0) for i in range(len(labels)))
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
        class_weights=weights,
        oversample_boost=parse_class_values(arguments.oversample_boost, labels),
        ema=arguments.ema,
        augment=tuple(name.strip() for name in arguments.augment.split(",") if name.strip()),
        mixup_alpha=arguments.mixup_alpha,
        patience=arguments.patience,
        seed=arguments.seed,
        threads=arguments.threads or _threads_a_worker(arguments.num_workers),
    )


def _threads_a_worker(num_workers: int) -> int:
    import os

    return max(1, len(os.sched_getaffinity(0)) // max(num_workers, 1))


def _train(plan: Plan, arguments: argparse.Namespace) -> bool:
    """Run the epochs; True when Ctrl-C ended them."""
    import torch

    use_gpu = torch.cuda.is_available() if arguments.use_gpu is None else arguments.use_gpu
    if use_gpu and not torch.cuda.is_available():
        raise SerError("--use_gpu True, but PyTorch sees no GPU here; leave it out to train on CPUs")
    show = _Show(plan.fit.epochs)
    if arguments.num_workers == 0:
        from pipeline.runs import train_here

        result = train_here(
            plan,
            device="cuda" if use_gpu else "cpu",
            on_epoch=lambda record, _: show.epoch(record),
            on_batch=show.batch,
        )
        return result.interrupted
    from pipeline.train import train_on_ray

    try:
        train_on_ray(plan, num_workers=arguments.num_workers, use_gpu=use_gpu, on_epoch=show.epoch, on_batch=show.batch)
    except KeyboardInterrupt:
        return True
    return False


class _Show:
    """A bar an epoch on a terminal, a line an epoch always."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.bar: Any = None

    def batch(self, epoch: int, done: int, total: int) -> None:
        import sys

        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=total, desc=f"epoch {epoch}/{self.epochs}", unit="batch", leave=False)
        self.bar.update(done - self.bar.n)

    def epoch(self, record: dict[str, Any]) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        text = f"epoch {record['epoch']}/{self.epochs}  loss {record['train_loss']:.4f}"
        if record["val_loss"] is not None:
            text += (
                f"  val loss {record['val_loss']:.4f}  accuracy {record['val_accuracy']:.1%}"
                f"  weighted F1 {record['val_weighted_f1']:.1%}  ({record['weights']})"
            )
        say(f"{text}  lr {record['lr']:.2g}  {record['seconds']:.1f} s")


def _finish(plan: Plan, arguments: argparse.Namespace, seconds: float) -> None:
    """Write the bundle; evaluate it once on the chosen split; print the report."""
    from pipeline.results import write_results

    report = write_results(plan, BUNDLE_NAMES[plan.model_name], arguments.report_split, seconds)
    if report.summary:
        print(report.summary)
    if report.path is not None:
        print(f"report: {report.path}")
    say(f"best epoch {report.best_epoch}; bundle: {plan.out / (BUNDLE_NAMES[plan.model_name] + '.pt')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job."""
    return run(job, build_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
