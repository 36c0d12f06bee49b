"""Adapts a trained model to 20 to 5,000 labelled recordings of your own, and measures whether it becomes better."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from jobs._common import CSV_OPTIONS, Parser, Progress, add_shared, command, exit_code, parser_of, read_csv, say
from pipeline.audio.windows import Window
from pipeline.storage.errors import SerError
from pipeline.storage.files import usable_cpus
from pipeline.storage.journal import locked

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.evaluation.outcomes import Floats, Ints
    from pipeline.models.bundle import Bundle
    from pipeline.training.adapt import Verdict
    from pipeline.training.last_layer import Found, Parent, Recordings

_KEPT = ".adapt"  # features of the recordings that were read, for a restart after a crash


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("adapt", __doc__, "--data_csv mine.csv --out models/mine")
    parser.add_argument("--data_csv", type=Path, required=True, help="CSV with the columns speech,label (and speaker)")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the adapted model")
    parser.add_argument(
        "--model_weights",
        type=Path,
        help="the parent, the model to adapt: bundle folder or the .pt in it (default: the shipped one)",
    )
    add_shared(parser, *CSV_OPTIONS)
    parser.add_argument(
        "--window",
        choices=get_args(Window),
        help="input window of the new model: the middle of a recording, or the part with most speech; both are "
        "measured (default: as in the parent; the shipped model uses the middle)",
    )
    parser.add_argument(
        "--classes",
        choices=("auto", "mine", "all"),
        default="auto",
        help="classes of the new model: mine: those of the CSV; all: those of the CSV and of the parent; auto "
        "(default): those of the parent if they include all of the CSV's, else mine",
    )
    parser.add_argument(
        "--features",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="features of the parent's training corpora (ser extract): some of them are used in training too, if "
        "cross-validation shows that it helps",
    )
    parser.add_argument(
        "--learning_curve", action="store_true", help="also print the UAR with 1/4 and 1/2 of the recordings"
    )
    parser.add_argument(
        "--max_minutes",
        type=float,
        default=5.0,
        help="above 5: also try to train the last stage of the network, if that takes no longer than this (default 5)",
    )
    parser.add_argument("--anyway", action="store_true", help="write the model even if it is not better")
    parser.add_argument("--overwrite", action="store_true", help="replace a model in --out")
    parser.add_argument("--seed", type=int, default=0, help="random seed of folds and samples (default 0)")
    add_shared(parser, "tolerate_failures")
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Read the recordings, fit the new model, compare it with the parent, and print the verdict."""
    _check_out(arguments)
    with locked(arguments.out / ".adapt.lock", f"adapting into {arguments.out}"):
        return _job(arguments)


def _check_out(arguments: argparse.Namespace) -> None:
    from pipeline.models.bundle import DEFAULT_BUNDLE, load_bundle

    out: Path = arguments.out
    parent = load_bundle(arguments.model_weights).folder
    for folder in (parent, DEFAULT_BUNDLE):
        if out.resolve() == folder.resolve():
            raise SerError(f"--out {out} is the parent or the shipped model; give another folder")
    if (out / "config.json").is_file() and not arguments.overwrite:
        raise SerError(f"{out} already holds a model; give another --out, or --overwrite")


def _job(arguments: argparse.Namespace) -> int:
    """``job`` while ``--out`` is locked."""
    from dataclasses import replace

    import numpy as np
    import torch

    from pipeline.models.bundle import load_bundle
    from pipeline.training import adapt
    from pipeline.training.embeddings import embed_all, forget, last_layer
    from pipeline.training.last_layer import Recordings, parent_of
    from pipeline.training.last_layer import adapt as fit_and_choose

    started = time.monotonic()
    torch.set_num_threads(usable_cpus())
    bundle = load_bundle(arguments.model_weights)
    window: Window = arguments.window or bundle.features.window
    manifest = _manifest(arguments)
    say(f"parent: {bundle.folder} ({bundle.weights_sha256[:12]})")
    read = embed_all(
        manifest,
        bundle,
        arguments.out / _KEPT,
        sorted(get_args(Window), key=lambda one: one != window),
        keep_features=arguments.max_minutes > adapt.MIN_MINUTES,
        tell=Progress("read"),
    )
    for path, error in list(read.unread.items())[:3]:
        say(f"left out: {path}: {error}")
    rows, said = adapt.usable(read.table, bundle)
    for line in said:
        say(line)
    table = read.table.iloc[rows].reset_index(drop=True)
    labels = adapt.labels_for(sorted(set(table["label"])), bundle.labels, arguments.classes)
    truth, groups = np.array([labels.index(name) for name in table["label"]]), _groups(table, labels, bundle)
    by_window = {name: Recordings(every[rows], truth, groups) for name, every in read.embeddings.items()}
    recordings = by_window[window]
    parent = parent_of(*last_layer(bundle.build_model()), bundle.labels, labels)
    if arguments.features:
        parent = replace(parent, old=_old(arguments, bundle, window, labels, table))
    found = fit_and_choose(recordings, parent, seed=arguments.seed, tell=Progress("folds", "folds"))
    windows = _windows(by_window, window, parent, found, arguments.seed)
    state = None
    if read.features is not None:
        found, state = _with_last_stage(arguments, found, recordings, parent, bundle, read.features[rows])
    before = parent.answers(by_window[bundle.features.window].embeddings)
    verdict, about = _compared(arguments, bundle, table, labels, truth, before, found)
    about |= {"window": window, "windows": windows}
    about["learning_curve"] = (
        _learning_curve(recordings, parent, labels, table, found, arguments.seed) if arguments.learning_curve else []
    )
    about["seconds"] = round(time.monotonic() - started, 1)
    print(f"verdict: {verdict.told}")
    if verdict.adapted or arguments.anyway:
        made = adapt.write(
            arguments.out,
            bundle,
            table,
            labels,
            found,
            about=about,
            truth=truth,
            embeddings=recordings.embeddings,
            window=window,
            state=state,
        )
        print(f"model: {made.folder}")
    else:
        say(f"no model is written; keep using {bundle.folder}, or write the new one with --anyway")
        if (arguments.out / "config.json").is_file():
            say(f"{arguments.out} still holds its earlier model")
    forget(arguments.out / _KEPT)
    return exit_code(arguments, read.unread)


def _manifest(arguments: argparse.Namespace) -> pd.DataFrame:
    from jobs.extract import describe_labels
    from pipeline.data.corpora.voices import with_speakers

    table = read_csv(arguments, arguments.data_csv, label_names=arguments.label_names)
    describe_labels(table)
    return with_speakers(table)


def _windows(
    by_window: Mapping[Window, Recordings], used: Window, parent: Parent, found: Found, seed: int
) -> dict[Window, float]:
    """Out-of-fold UAR with each input window, also printed.

    For the window that is not ``used``, the settings that the folds chose with the used one are fitted again.
    """
    from pipeline.evaluation.outcomes import scores, tally
    from pipeline.training.last_layer import OUTER_FOLDS, folds, out_of_fold

    uars, named = {}, {"middle": "the middle", "speech": "the window with most speech"}
    fold_of = folds(by_window[used], OUTER_FOLDS, seed)
    moved = int((by_window["middle"].embeddings != by_window["speech"].embeddings).any(axis=1).sum())
    for window, recordings in by_window.items():
        logits = found.logits
        if window != used and moved:
            logits = out_of_fold(recordings, parent, fold_of, choices=found.choices, seed=seed)[0]
        uars[window] = float(scores(tally(recordings.truth, logits.argmax(axis=1), len(parent.known))).uar)
    print(f"input: {named[used]} of each recording (--window {used}); in {moved} recordings the two windows differ")
    if moved:
        print("  out of fold: " + ", ".join(f"{named[window]}: UAR {uar:.1%}" for window, uar in uars.items()))
    return uars


def _groups(table: pd.DataFrame, labels: Sequence[str], bundle: Bundle) -> Ints:
    """The group of each recording for cross-validation; prints what the groups and the new model's classes are."""
    from pipeline.training import adapt

    groups, by = adapt.groups_of(table)
    new = sorted(set(labels) - set(bundle.labels))
    say(
        f"{len(table)} recordings; the new model answers with {', '.join(labels)}"
        + (f" (new to the parent: {', '.join(new)})" if new else "")
    )
    if by == "speaker":
        say(f"cross-validated by speaker ({len(set(groups))}): no speaker is in training and test at once")
    else:
        say("cross-validated by recording, as there are fewer than 3 speakers: new speakers will get lower figures")
    return groups


def _with_last_stage(
    arguments: argparse.Namespace,
    found: Found,
    recordings: Recordings,
    parent: Parent,
    bundle: Bundle,
    features: Any,
) -> tuple[Found, Mapping[str, Any] | None]:
    """Also try to train the last stage of the network (``--max_minutes`` above 5).

    Returns what is better in cross-validation, and the weights of the last stage if that is used.
    """
    from pipeline.training.adapt import can_be_tuned, compete

    if not can_be_tuned(bundle):
        say("--max_minutes: only a single inception network has a last stage to train; only the last layer is fitted")
        return found, None
    found, state, needed = compete(
        found,
        recordings,
        parent,
        bundle,
        features,
        minutes=arguments.max_minutes,
        seed=arguments.seed,
        threads=usable_cpus(),
        tell=Progress("last stage", "trainings"),
    )
    if needed:
        say(f"the last stage was not trained: it would take {needed:.0f} minutes; allow it: --max_minutes {needed:.0f}")
    return found, state


def _old(
    arguments: argparse.Namespace, bundle: Bundle, window: Window, labels: tuple[str, ...], table: pd.DataFrame
) -> Recordings | None:
    """Recordings of the parent's training corpora to train on too, or None; prints how many."""
    from dataclasses import replace

    import numpy as np

    from pipeline.features.store import load_features
    from pipeline.training.embeddings import rehearsed
    from pipeline.training.last_layer import Recordings

    arrays = load_features(arguments.features, replace(bundle.features, window=window))
    found = rehearsed(arrays, labels, table, bundle, seed=arguments.seed)
    if found is None:
        say("--features has no recording that the parent was trained on and whose class the new model has: not used")
        return None
    say(f"{len(found[1])} old recordings are used in training too, if the folds show that it helps")
    return Recordings(*found, groups=np.zeros(len(found[1]), np.int64))


def _compared(
    arguments: argparse.Namespace,
    bundle: Bundle,
    table: pd.DataFrame,
    labels: tuple[str, ...],
    truth: Ints,
    old: Floats,
    found: Found,
) -> tuple[Verdict, dict[str, Any]]:
    """Compare parent and new model, printed and written as a page; the verdict, and a record of it for the new model.

    ``old``: the parent's logits ``(n, C)``.
    """
    from dataclasses import asdict

    import numpy as np
    import pandas as pd

    from jobs._provenance import provenance
    from pipeline.data.splits import has_speakers
    from pipeline.evaluation.compare import comparison_summary
    from pipeline.evaluation.metrics import permutation_hint
    from pipeline.evaluation.outcomes import outcomes, scores, tally
    from pipeline.reporting.report import write_comparison
    from pipeline.training import adapt

    before = adapt.answers(table, old, labels, bundle.temperature)
    after = adapt.answers(table, found.logits, labels, adapt.temperature_of(truth, found.logits)[0])
    names = (str(bundle.folder), f"{arguments.out} (out of fold: no recording is answered by a model trained on it)")
    meta = provenance(arguments.command, bundle) | {"data": str(arguments.data_csv)}
    print(comparison_summary(write_comparison(before, after, labels, arguments.out / "report", names=names, meta=meta)))
    there = np.isin(np.arange(len(labels)), truth)
    restricted = np.where(there, old, -np.inf).argmax(axis=1)
    alone = float(scores(tally(truth, restricted, len(labels))).uar)
    if not there.all():
        say(f"the parent, restricted to the {there.sum()} classes of the recordings: UAR {alone:.1%}")
    if hint := permutation_hint(outcomes(before, labels)):
        say(hint)
    speakers = pd.factorize(table["speaker"])[0] if has_speakers(table) else None
    verdict = adapt.judge(
        truth,
        old.argmax(axis=1),
        found.logits.argmax(axis=1),
        speakers,
        compared=1 if arguments.max_minutes <= adapt.MIN_MINUTES else 2,
    )
    say(f"chosen: {found.choice.told}; in the folds: {', '.join(sorted({each.told for each in found.choices}))}")
    about = {
        "parent": bundle.name,
        "parent_sha256": bundle.weights_sha256,
        "method": found.choice.told,
        "in_folds": [each.told for each in found.choices],
        "recordings": len(table),
        "before_restricted": alone,
        "folds_by": adapt.groups_of(table)[1],
        "verdict": asdict(verdict) | {"adapted": verdict.adapted, "told": verdict.told},
    }
    return verdict, about


def _learning_curve(
    recordings: Recordings, parent: Parent, labels: tuple[str, ...], table: pd.DataFrame, found: Found, seed: int
) -> list[dict[str, Any]]:
    """The out-of-fold UAR with a quarter, half and all of the recordings, and its 95 % interval; also printed."""
    from pipeline.evaluation.metrics import evaluate
    from pipeline.training import adapt
    from pipeline.training.last_layer import OUTER_FOLDS, folds, out_of_fold

    curve = []
    fold_of = folds(recordings, OUTER_FOLDS, seed)
    print("learning curve (out of fold):")
    for share in (0.25, 0.5, 1.0):
        logits = found.logits if share == 1 else out_of_fold(recordings, parent, fold_of, share=share, seed=seed)[0]
        figure = evaluate(adapt.answers(table, logits, labels), labels)["overall"]["uar"]
        low, high = figure["over_speakers"] or figure["over_recordings"]
        curve.append({"share": share, "uar": figure["value"], "interval_95": [low, high]})
        print(f"  {share:>4.0%} of the recordings: UAR {figure['value']:.1%} [{low:.1%}, {high:.1%}]")
    return curve


main = command(job, build_parser)


if __name__ == "__main__":
    raise SystemExit(main())
