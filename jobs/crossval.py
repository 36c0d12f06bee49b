"""Cross-validation: trains and tests one model for each fold, by one or more protocols, which are compared."""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._common import (
    CSV_OPTIONS,
    ENGINE_OPTIONS,
    EXIT_TARGET_MISSED,
    TRUE_OR_FALSE,
    Parser,
    add_out,
    add_shared,
    command,
    exit_code,
    fields_of,
    parser_of,
    say,
    tell_engine,
    underscored,
)
from jobs._recipe import add_recipe_option, parse_with_recipe
from jobs._targets import add_targets, targets_of
from jobs.train_options import (
    USUAL,
    add_distill_option,
    add_fit_options,
    fit_config,
    model_options,
    names,
    refuse_beside_features,
)
from pipeline.evaluation.verdict import Targets, reached
from pipeline.storage.errors import SerError
from pipeline.storage.files import usable_cpus
from pipeline.storage.journal import locked

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.data.splits import Fold
    from pipeline.training.config import FitConfig
    from pipeline.training.cross_validation import FoldConcurrency

_CLIP_S = 0.03  # CPU seconds that a clip takes in training, roughly
_NAMES = ("holdout", "kfold", "speaker_kfold", "loso", "loco")  # splits.PROTOCOLS, whose import takes a second


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("crossval", __doc__, "--protocol kfold,speaker_kfold --features features --out protocols")
    _add_data_options(parser)
    _add_fold_options(parser)
    add_targets(parser)
    add_recipe_option(parser)
    add_fit_options(parser, ("model and loss", "training"))
    parser.put_first(USUAL)
    return parser


def _add_data_options(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data_csv", type=Path, help="CSV with the columns speech,label; its features are written to OUT/features"
    )
    add_shared(source, "features")
    add_shared(group, *CSV_OPTIONS)
    add_out(group, "reports", "metrics and reports; a folder of an interrupted run is continued")
    add_shared(group, "overwrite", "tolerate_failures")
    group.add_argument(
        "--crops",
        type=int,
        default=1,
        help="number of evenly spaced windows in each tested recording; their answers are averaged (default 1)",
    )
    add_shared(group, *ENGINE_OPTIONS)


def _add_fold_options(parser: Parser) -> None:
    """Add the options of the folds and of their training."""
    group = parser.add_argument_group("folds")
    group.add_argument(
        "--protocol",
        type=_protocols,
        default=("kfold",),
        metavar="NAME,...",
        help="how to split: holdout (one test part), kfold (by recording), speaker_kfold (by speaker), loso (leave one "
        "speaker out), loco (leave one corpus out); several are compared: kfold,speaker_kfold (default kfold)",
    )
    group.add_argument("--folds", type=int, default=5, help="number of folds of kfold and speaker_kfold (default 5)")
    group.add_argument(
        "--folds_csv",
        type=Path,
        help="CSV that names the fold in which a recording is tested: a column fold, and content_hash, id or speaker",
    )
    group.add_argument(
        "--test_size", type=float, default=0.2, help="share of all recordings in the test part of holdout (default 0.2)"
    )
    group.add_argument(
        "--inner_val",
        type=float,
        default=0.2,
        help="share of each fold's training part that is used to choose the best epoch; 0: train on all of it for "
        "exactly --epochs (default 0.2)",
    )
    group.add_argument("--keep_weights", action="store_true", help="keep the model of each fold, as a bundle")
    group.add_argument(
        "--teachers",
        type=Path,
        nargs="+",
        default=[],
        metavar="OUT",
        help="--out folders of earlier runs with --keep_weights, for knowledge distillation: their models of the same "
        "fold are its teachers",
    )
    add_distill_option(group)
    group.add_argument(
        "--join_seeds",
        type=int,
        nargs="+",
        default=[],
        metavar="SEED",
        help="instead of --seed: train each fold once with each of these seeds, and test the mean of their answers, as "
        "ser join would give it",
    )
    group.add_argument(
        "--folds_at_once", type=int, help="number of folds trained at the same time (default: one for each GPU or CPU)"
    )
    group.add_argument("--use_gpu", **TRUE_OR_FALSE, help="train on GPUs (default: if this machine has one)")
    group.add_argument(
        "--max_failures", type=int, default=3, help="how many times a fold whose process died is restarted (default 3)"
    )


def _protocols(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(names(text)))
    if not found or set(found) - set(_NAMES):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected one or more of {', '.join(_NAMES)}")
    return found


def asked(words: Sequence[str]) -> bool:
    """Whether these arguments of ``evaluate`` contain ``--protocol``, the old way to this command; if so, says it."""
    if not any(underscored(word).partition("=")[0] in ("--protocol", "--protoco", "--protoc") for word in words):
        return False
    say(f"evaluate --protocol is now a separate command: ser crossval {shlex.join(words)}")
    return True


def job(arguments: argparse.Namespace) -> int:
    """Train and test by each protocol, and print the figures."""
    if arguments.out.resolve() in [folder.resolve() for folder in arguments.teachers]:  # --overwrite would remove them
        raise SerError(f"--out {arguments.out} is the folder of the teachers; give another --out")
    if len(set(arguments.join_seeds)) != len(arguments.join_seeds) or len(arguments.join_seeds) == 1:
        raise SerError("--join_seeds needs two or more different seeds; for a single one use --seed")
    refuse_beside_features(arguments)
    with locked(arguments.out / ".protocols.lock", f"training the folds in {arguments.out}"):
        return _job(arguments, targets_of(arguments))


def _job(arguments: argparse.Namespace, targets: Targets) -> int:
    """``job`` while ``--out`` is locked: ``--overwrite`` would remove the folds that another process is training."""
    from jobs._provenance import provenance
    from jobs.train import extracted
    from pipeline.training.cross_validation import protocols_summary, write_protocols

    features, failed = (tuple(arguments.features), 0) if arguments.features else extracted(arguments)
    table = labelled_recordings(features)
    folds = {protocol: _folds(protocol, table, arguments) for protocol in arguments.protocol}
    meta = provenance(arguments.command) | {"data": str(arguments.data_csv or ", ".join(map(str, features)))}
    if unread := unread_note(features, len(table)):
        say(unread)
        meta |= {"note": unread}
    rows, verdicts = [], []
    for protocol, parts in folds.items():
        row, verdict = _run(protocol, parts, table, features, arguments, targets, meta)
        rows.append(row)
        verdicts.append(verdict)
    found = write_protocols(rows, arguments.out, meta)
    print(protocols_summary(found))
    print(f"page: {arguments.out / 'protocols.html'}")
    if arguments.enforce and not all(map(reached, verdicts)):
        say("--enforce: " + ", ".join(f"{row['protocol']} {row['verdict']}" for row in rows))
        return EXIT_TARGET_MISSED
    return exit_code(arguments, failed)


def labelled_recordings(features: Sequence[Path]) -> pd.DataFrame:
    """Labelled rows of feature folders, without pitch-shifted copies, with content hashes."""
    from jobs.extract import describe_labels, labelled
    from pipeline.data.splits import add_hashes, unknown_content
    from pipeline.features.store import known_hashes

    originals = labelled(features).reset_index(drop=True)
    describe_labels(originals)
    found = add_hashes(originals, known=known_hashes(features, originals))
    if unknown := unknown_content(found):
        say(unknown)
    return found


def unread_note(features: Sequence[Path], read: int) -> str | None:
    """A note for the reports if the extraction failed for some recordings, else None; ``read``: how many it read."""
    from pipeline.features.store import read_shard_manifest

    failed = sum(int(read_shard_manifest(folder)["failed"]) for folder in features)
    if not failed:
        return None
    return f"{failed} of {read + failed} recordings could not be read: they were neither trained on nor tested."


def _folds(protocol: str, table: pd.DataFrame, arguments: argparse.Namespace) -> list[Fold]:
    from pipeline.data.splits import assignment, folds_of
    from pipeline.training.plan import SPLIT_SEED

    assigned = None if arguments.folds_csv is None else assignment(table, arguments.folds_csv, "fold")
    found = folds_of(
        table,
        protocol,
        seed=SPLIT_SEED,
        assigned=assigned,
        **fields_of(arguments, "folds", "test_size", "inner_val"),
    )
    tested = [len(fold.splits["test"]) for fold in found]
    say(f"{protocol}: {len(found)} folds, {sum(tested)} recordings tested, {min(tested)}-{max(tested)} in each fold")
    return found


def _run(
    protocol: str,
    folds: list[Fold],
    table: pd.DataFrame,
    features: tuple[Path, ...],
    arguments: argparse.Namespace,
    targets: Targets,
    meta: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train, test and report one protocol; returns its row of the comparison, and its verdict on the targets."""
    from pipeline.data.manifest import label_set
    from pipeline.models.ensemble import mean_answers
    from pipeline.reporting.report import write_report
    from pipeline.training.cross_validation import protocol_row, train_folds
    from pipeline.training.plan import Plan

    out: Path = arguments.out / protocol
    if arguments.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    side, labels = _side_by_side(len(folds), arguments), label_set(table)
    plan = Plan(
        out=out,
        features=features,
        labels=labels.names,
        model_name=arguments.model,
        model_options=model_options(arguments),
        fit=fit_config(arguments, labels, table, threads=side.cpus),
        teachers=tuple(folder / protocol for folder in arguments.teachers),
        distill=arguments.distill,
        crops=arguments.crops,
    )
    say(f"{protocol}: {side.folds} folds at once, {side.cpus} threads each -> {out}")

    def show(fold: str, record: dict[str, Any]) -> None:
        chosen = "" if record["val_loss"] is None else f"  validation F1 {record['val_weighted_f1']:.1%}"
        epoch = f"epoch {record['epoch']:.0f}/{plan.fit.epochs}"
        say(f"{protocol} fold {fold}  {epoch}  loss {record['train_loss']:.4f}{chosen}  {record['seconds']:.1f} s")

    fits = {fold.name: fit_config(arguments, labels, fold.splits["train"], threads=side.cpus) for fold in folds}
    seeds = arguments.join_seeds or [plan.fit.seed]
    engine = _engine(plan.fit, folds, len(seeds), side, arguments)
    joined, tables = len(seeds) > 1, []
    for seed in seeds:
        if joined:
            say(f"{protocol}: seed {seed}")
        place = out / f"seed-{seed}" if joined else out
        found = train_folds(
            folds,
            replace(plan, out=place, fit=replace(plan.fit, seed=seed)),
            side,
            fits={name: replace(fit, seed=seed) for name, fit in fits.items()},
            engine=engine,
            on_epoch=show,
            **fields_of(arguments, "keep_weights", "max_failures"),
        )
        tables.append(found)
    answers = mean_answers(tables, labels.names) if joined else tables[0]
    answers.to_parquet(out / "predictions.parquet", index=False)
    networks = f"{len(seeds)} a fold, joined (seeds {', '.join(map(str, seeds))})" if joined else "one a fold"
    about = {"model": f"{arguments.model}, {networks}", "protocol": protocol, "folds": len(folds), "crops": plan.crops}
    if plan.teachers:
        about |= {"teachers": ", ".join(map(str, plan.teachers)), "distill": plan.distill}
    settings = {"settings": plan.fit.to_dict()}
    evaluation = write_report(answers, labels.names, out, meta=about | meta | settings, targets=targets)
    return protocol_row(protocol, folds, answers, labels.names, evaluation), evaluation["verdict"]


def _engine(fit: FitConfig, folds: list[Fold], seeds: int, side: FoldConcurrency, arguments: argparse.Namespace) -> str:
    """The engine that trains the folds; prints a message if ``auto`` chose the local one."""
    from pipeline.cluster.engine import choose_engine

    if side.gpus:
        if arguments.engine == "local":
            raise SerError("--engine local trains on CPUs; give --use_gpu False too, or --engine ray")
        return "ray"
    clips = seeds * fit.epochs * sum(fit.draws or len(fold.splits["train"]) for fold in folds)
    engine = choose_engine(arguments.engine, clips * _CLIP_S, arguments.num_cpus)
    tell_engine(arguments, engine, f"{seeds * len(folds)} trainings", "Ray")
    return engine


def _side_by_side(folds: int, arguments: argparse.Namespace) -> FoldConcurrency:
    import torch

    from pipeline.training.cross_validation import FoldConcurrency

    gpus = torch.cuda.device_count() if arguments.use_gpu is not False else 0
    if arguments.use_gpu and not gpus:
        raise SerError("--use_gpu True, but PyTorch finds no GPU here; leave it out to train on CPUs")
    cpus = arguments.num_cpus or usable_cpus()
    return FoldConcurrency.of(folds, arguments.folds_at_once, cpus, gpus)


main = command(job, build_parser, parse=parse_with_recipe)


if __name__ == "__main__":
    raise SystemExit(main())
