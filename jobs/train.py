"""Trains a model on recordings or their features and writes a bundle; on Ray Train, or without it (--num_workers 0)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._common import EXIT_DONE, EXIT_INTERRUPTED, Parser, Progress, command, exit_code, fields_of, parser_of, say
from jobs._recipe import add_recipe_option, parse_with_recipe
from jobs.extract import describe_labels, labelled, read_data
from jobs.train_options import (
    FEATURE_KINDS,
    USUAL,
    add_data_options,
    add_fit_options,
    add_teacher_options,
    add_worker_options,
    fit_config,
    model_options,
    names,
    refuse_beside_features,
)
from pipeline.storage.errors import SerError
from pipeline.storage.journal import locked

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.training.plan import Plan

PITCH_SEMITONES = (-1.0, 1.0)  # shifts of the extra copies that --augment pitch needs


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("train", __doc__, "--data_csv metadata.csv --epochs 50 --num_workers 2 --out runs/first")
    add_data_options(parser)
    add_recipe_option(parser)
    add_fit_options(parser, ("model and loss", "training", "workers"))
    add_teacher_options(parser)
    add_worker_options(parser)
    parser.put_first(USUAL)
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Prepare, train, write the bundle and the report."""
    if arguments.num_workers < 0 or arguments.max_failures < 0:
        raise SerError("--num_workers and --max_failures must be 0 or more; 0 workers: without Ray")
    if _nothing_left(arguments.out, arguments.resume):
        say(f"the run in {arguments.out} is finished; there is nothing left to do")
        return EXIT_DONE
    device = _device(arguments)
    refuse_beside_features(arguments)
    if arguments.split_csv is not None and (arguments.test_corpora or arguments.test_speakers):
        raise SerError("--split_csv already names the test part; leave out --test_corpora and --test_speakers")
    with locked(arguments.out / ".train.lock", f"training into {arguments.out}"):
        return _job(arguments, device)


def _job(arguments: argparse.Namespace, device: str) -> int:
    """``job`` while ``--out`` is locked: a second training there would write other splits."""
    features, failed = (tuple(arguments.features), 0) if arguments.features else extracted(arguments)
    plan = _plan(arguments, features)
    interrupted = _train(plan, arguments, device)
    if not plan.checkpoint.is_file():
        say("interrupted before the first epoch was finished")
        return EXIT_INTERRUPTED
    _finish(plan, arguments.report_split, interrupted)
    if interrupted:
        return EXIT_INTERRUPTED
    return exit_code(arguments, failed)


def _nothing_left(out: Path, resume: bool) -> bool:
    """Whether the run in `out` is finished; refuses a folder that does not fit `--resume`."""
    from pipeline.training.plan import read_plan
    from pipeline.training.run import refuse_begun

    if not resume:
        refuse_begun(out)
        return False
    read_plan(out)
    return (out / "config.json").is_file()


def extracted(arguments: argparse.Namespace) -> tuple[tuple[Path, ...], int]:
    """Extract features into ``--out``; returns their folder and the number of recordings that could not be read."""
    from pipeline.features.extract import ShardOptions, extract_shards
    from pipeline.features.features import FeatureConfig
    from pipeline.training.plan import check_start

    table = read_data(arguments)
    describe_labels(table)
    _check_corpora(table, arguments)
    config = FeatureConfig(kind=FEATURE_KINDS[arguments.model])
    if getattr(arguments, "init", None) is not None:
        check_start(arguments.init, arguments.model, config)
    folder: Path = arguments.out / "features"
    summary = extract_shards(
        table,
        folder,
        config,
        options=ShardOptions(pitch_semitones=PITCH_SEMITONES if "pitch" in names(arguments.augment) else ()),
        overwrite=getattr(arguments, "overwrite", False),  # an option of crossval only
        on_progress=Progress("extract"),
    )
    if summary.failed:
        say(
            f"{summary.failed} of {summary.rows} recordings could not be read and are left out; see the column error "
            f"in {folder}"
        )
    return (folder,), summary.failed


def _check_corpora(table: pd.DataFrame, arguments: argparse.Namespace) -> None:
    """Print the corpora; check that they can be combined, and that the options name corpora and speakers that exist."""
    from pipeline.data.corpora.voices import check_corpora, corpora_of, renewed
    from pipeline.training.batches import shares_of

    check_corpora(table, {*(arguments.label_map or {}).values(), *(arguments.label_names or ())})
    table = renewed(table)  # as load_features will do
    corpora, number = corpora_of(table)
    if len(corpora) > 1:
        say("corpora: " + ", ".join(f"{name or '(none)'} {(number == k).sum()}" for k, name in enumerate(corpora)))
    if getattr(arguments, "test_corpora", ()) or getattr(arguments, "test_speakers", ()):
        held = _held_out(table, arguments)["split"] == "test"
        corpora = corpora_of(table[~held])[0]
    shares_of(arguments.corpus_share, corpora)


def _held_out(table: pd.DataFrame, arguments: argparse.Namespace) -> pd.DataFrame:
    """The table with the recordings of ``--test_corpora`` and ``--test_speakers`` as its test part."""
    import pandas as pd

    from pipeline.data.corpora.voices import voice, voices

    held = pd.Series(False, index=table.index)
    for option, column in (("test_corpora", "corpus"), ("test_speakers", "speaker")):
        cells = table[column].fillna("").astype(str) if column in table.columns else pd.Series("", index=table.index)
        cells = voices(cells) if column == "speaker" else cells
        for name in getattr(arguments, option):
            name = voice(name) if column == "speaker" else name
            if not (cells == name).any():
                there = sorted(set(cells) - {""})
                raise SerError(
                    f"--{option}: no recording has {column} {name!r}; choose from: {', '.join(there) or '(none)'}"
                )
            held |= cells == name
    if held.all():
        raise SerError("--test_corpora and --test_speakers leave no recordings to train on; name fewer")
    return table.assign(split=held.map({True: "test", False: "train"}))


def _plan(arguments: argparse.Namespace, features: tuple[Path, ...]) -> Plan:
    """The checked plan of a new run, whose parts are drawn and written here, or of the run to resume."""
    from pipeline.data.manifest import label_set
    from pipeline.data.splits import add_hashes, check_disjoint, split_table, unknown_content
    from pipeline.features.store import known_hashes
    from pipeline.training.losses import refuse_leaks
    from pipeline.training.plan import SPLIT_SEED, Plan
    from pipeline.training.run import begin, check, check_resumes, read_splits, refuse_changed

    originals = labelled(features)
    if arguments.features:
        describe_labels(originals)
        _check_corpora(originals, arguments)
    labels = label_set(originals)
    hashed = add_hashes(originals, known=known_hashes(features, originals))
    if arguments.resume:
        splits = read_splits(arguments.out)
        refuse_changed(splits, hashed)
    else:
        found = _in_given_parts(hashed, arguments.split_csv)
        if arguments.test_corpora or arguments.test_speakers:
            found = _held_out(found, arguments)
        if unknown := unknown_content(found):
            say(unknown)
        splits = split_table(
            found, by=arguments.split, seed=SPLIT_SEED, **fields_of(arguments, "test_size", "inner_val")
        )
        check_disjoint(splits)
    say("parts: " + ", ".join(f"{name} {len(part)}" for name, part in splits.items()))
    plan = Plan(
        out=arguments.out,
        features=features,
        labels=labels.names,
        model_name=arguments.model,
        model_options=model_options(arguments),
        fit=fit_config(arguments, labels, splits["train"]),
        teachers=tuple(arguments.teachers),
        distill=arguments.distill,
        init=arguments.init,
        split=_split_options(arguments),
    )
    refuse_leaks(plan.teachers, splits)
    if plan.init is not None:
        refuse_leaks([plan.init], splits, "--init")
    if arguments.resume:
        check_resumes(plan)
    else:
        begin(plan, splits)
    check(plan, max(arguments.num_workers, 1))
    return plan


def _split_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the split; ``--split_csv`` by its hash, since the file may have moved before ``--resume``."""
    from pipeline.models.bundle import file_sha256

    given = fields_of(arguments, "split", "test_size", "inner_val")
    given |= {name: list(held) for name, held in fields_of(arguments, "test_corpora", "test_speakers").items() if held}
    csv: Path | None = arguments.split_csv
    return given | {"split_csv": file_sha256(csv)[:12] if csv is not None and csv.is_file() else None}


def _in_given_parts(table: pd.DataFrame, split_csv: Path | None) -> pd.DataFrame:
    """The table with the parts of ``--split_csv`` in its column split, without the rows that the CSV does not name."""
    from pipeline.data.splits import assignment

    if split_csv is None:
        return table
    found = table.assign(split=assignment(table, split_csv, "split")).dropna(subset=["split"])
    if len(found) < len(table):
        say(f"{len(table) - len(found)} recordings are not named in {split_csv} and are left out")
    return found.reset_index(drop=True)


def _device(arguments: argparse.Namespace) -> str:
    """``cuda`` or ``cpu``: `--use_gpu`, or what this machine has. On a cluster `--use_gpu` needs no GPU here."""
    import torch

    from pipeline.cluster.runtime import joins_cluster

    here = torch.cuda.is_available()
    if arguments.use_gpu and not here and (arguments.num_workers == 0 or not joins_cluster()):
        raise SerError("--use_gpu True, but PyTorch finds no GPU here; leave it out to train on CPUs")
    return "cuda" if (here if arguments.use_gpu is None else arguments.use_gpu) else "cpu"


def _train(plan: Plan, arguments: argparse.Namespace, device: str) -> bool:
    """Train; returns True if Ctrl-C interrupted it."""
    show = _Show(plan.fit.epochs)
    try:
        if arguments.num_workers == 0:
            from pipeline.training.run import train_here

            result = train_here(plan, device=device, on_epoch=lambda record, _: show.epoch(record), on_batch=show.batch)
            return result.interrupted
        from pipeline.training.on_ray import train_on_ray

        train_on_ray(
            plan,
            num_workers=arguments.num_workers,
            use_gpu=device == "cuda",
            max_failures=arguments.max_failures,
            on_epoch=show.epoch,
            on_batch=show.batch,
        )
    except KeyboardInterrupt:
        return True
    finally:
        show.close()
    return False


class _Show:
    """Shows one line for each epoch, and on a terminal a progress bar while it runs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.bar: Any = None

    def batch(self, epoch: int, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=total, desc=f"epoch {epoch}/{self.epochs}", unit="batch", leave=False)
        self.bar.update(done - self.bar.n)

    def epoch(self, record: dict[str, Any]) -> None:
        self.close()
        text = f"epoch {record['epoch']}/{self.epochs}  loss {record['train_loss']:.4f}"
        if record["val_loss"] is not None:
            text += (
                f"  val loss {record['val_loss']:.4f}  accuracy {record['val_accuracy']:.1%}"
                f"  weighted F1 {record['val_weighted_f1']:.1%}  ({record['weights']})"
            )
        say(f"{text}  lr {record['lr']:.2g}  {record['seconds']:.1f} s")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _finish(plan: Plan, report_split: str, interrupted: bool) -> None:
    """Write the bundle, evaluate it on the chosen part, print the report. After Ctrl-C only write the best weights."""
    from pipeline.training.results import keep_weights, write_results

    if interrupted:
        kept = keep_weights(plan)
        say(f"interrupted; the best weights so far, of epoch {kept.best_epoch}, are in {kept.bundle.weights_path}")
        say("to continue, run the same command with --resume")
        return
    results = write_results(plan, report_split)
    if results.report is not None:
        print(results.summary)
        print(f"report: {results.report}")
    say(f"best epoch {results.best_epoch}; bundle: {results.bundle.weights_path}")


main = command(job, build_parser, parse=parse_with_recipe)


if __name__ == "__main__":
    raise SystemExit(main())
