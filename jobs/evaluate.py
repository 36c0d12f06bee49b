"""Measures a model on labelled recordings: metrics with intervals, confusion matrix, verdict and a report page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import crossval
from jobs._common import (
    ENGINE_OPTIONS,
    EXIT_TARGET_MISSED,
    Parser,
    Progress,
    add_out,
    add_shared,
    exit_code,
    parser_of,
    read_csv,
    run,
    say,
    tell_engine,
)
from jobs._targets import add_targets, targets_of
from pipeline.data.labels import describe
from pipeline.evaluation.verdict import reached
from pipeline.storage.errors import SerError
from pipeline.storage.files import usable_cpus

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.evaluation.leaks import Leaks
    from pipeline.models.bundle import Bundle


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("evaluate", __doc__, "--model_weights runs/first --data_csv val_metadata.csv")
    add_shared(parser, "model_weights")
    parser.add_argument("--data_csv", type=Path, help="CSV with the columns speech,label")
    add_shared(parser, "root", "label_map")
    add_out(parser, "reports", "predictions, metrics, figures and report.html")
    add_shared(parser, "overwrite", "crops")
    add_shared(parser, *ENGINE_OPTIONS)
    parser.add_argument(
        "--leak_check",
        choices=("warn", "error", "off"),
        default="warn",
        help="look for recordings that the model was trained on, by content: warn about them, stop with an error, or "
        "do not look (default warn)",
    )
    parser.add_argument(
        "--embed_audio",
        type=_count,
        default=0,
        metavar="N",
        help="put the audio of the N most confident mistakes into the report, up to 200 (default 0)",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="compare two models instead: two bundles, which are scored on --data_csv, or two --out folders with "
        "scores of the same recordings",
    )
    add_shared(parser, "tolerate_failures")
    add_targets(parser)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) > 200:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 200, got {text!r}")
    return int(text)


def job(arguments: argparse.Namespace) -> int:
    """Evaluate one model or compare two, and print the figures."""
    from jobs._provenance import provenance
    from pipeline.evaluation import leaks
    from pipeline.models.bundle import load_bundle
    from pipeline.reporting.report import terminal_summary, write_report

    if arguments.compare is not None:
        _refuse_beside_compare(arguments)
        return _compare(arguments)
    if arguments.data_csv is None:
        raise SerError("--data_csv is missing; give the CSV of labelled recordings to evaluate on")
    bundle = load_bundle(arguments.model_weights)
    manifest = _manifest(arguments, bundle)
    found = _leaks(arguments, manifest, bundle) if arguments.leak_check == "error" else None
    predictions, failed = _score(arguments, manifest, bundle, arguments.out)
    found = found or _leaks(arguments, manifest, bundle)  # late, as it reads every recording
    meta = provenance(arguments.command, bundle)
    meta |= {"data": str(arguments.data_csv), "crops": arguments.crops or bundle.crops}
    seconds = float(json.loads((arguments.out / "run.json").read_text(encoding="utf-8"))["seconds"])  # of the scoring
    evaluation = write_report(
        predictions,
        bundle.labels,
        arguments.out,
        meta=meta | {"seconds": round(seconds, 1)},
        targets=targets_of(arguments),
        embed_audio=arguments.embed_audio,
        leak_check=None if found is None else leaks.describe(found, predictions, bundle.labels),
    )
    print(terminal_summary(evaluation))
    _say_leaks(evaluation["leak_check"])
    print(f"report: {arguments.out / 'report.html'}")
    missed = None
    if arguments.enforce and not evaluation["labelled"]:
        missed = "without labels no target can be checked"
    elif arguments.enforce and not reached(evaluation["verdict"]):
        missed = evaluation["verdict"]["outcome"]
    if missed:
        say(f"--enforce: {missed}")
        return EXIT_TARGET_MISSED
    return exit_code(arguments, failed)


def _manifest(arguments: argparse.Namespace, bundle: Bundle, labels: Sequence[str] | None = None) -> pd.DataFrame:
    """Read the CSV; ``labels``: the classes that it may have (default: the bundle's)."""
    from pipeline.data.manifest import label_counts

    labels = labels or bundle.labels
    manifest = read_csv(arguments, arguments.data_csv, labels=labels, require_labels=False)
    say(f"labels: {describe(labels)}")
    if "label" in manifest.columns and manifest["label"].notna().any():
        counts = label_counts(manifest, labels)
        say("counts: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    else:
        say(f"{arguments.data_csv} has no labels: the recordings are scored, but no metrics are computed")
    return manifest


def _leaks(
    arguments: argparse.Namespace, manifest: pd.DataFrame, bundle: Bundle, contents: pd.DataFrame | None = None
) -> Leaks | None:
    """The recordings and speakers that the CSV shares with the model's training; None with ``--leak_check off``.

    ``contents``: the manifest with content hashes, if they are known already.
    """
    from pipeline.evaluation import leaks

    if arguments.leak_check == "off":
        return None
    found = leaks.find(manifest, bundle.training, contents=contents, threads=usable_cpus())
    if found.mask.any() and arguments.leak_check == "error":
        example = manifest.loc[found.mask, "speech"].iloc[0]
        raise SerError(
            f"{int(found.mask.sum())} of {len(manifest)} recordings were used to train {bundle.name}, such as "
            f"{example}; leave them out, or use --leak_check warn for the figures with and without them"
        )
    return found


def _say_leaks(found: dict[str, Any] | None) -> None:
    if found is None:
        return
    if found["note"]:
        say(f"leak check: {found['note']}")
    if found["by_name"]:
        say(f"leak check: {found['by_name']} training recordings without a content hash were compared by file name")
    if found["leaked"]:
        say(f"leak check: {found['leaked']} of {found['checked']} recordings were used in training")
        if found["partly"]:
            say(
                f"leak check: {found['partly']} of these only in part: the training used the whole recording of which "
                "they are a segment, or a segment that overlaps them"
            )
        if found["all"] and found["unseen"]:
            for name in ("all", "unseen"):
                row = found[name]
                figures = "n/a" if row["accuracy"] is None else f"accuracy {row['accuracy']:.1%}, UAR {row['uar']:.1%}"
                say(f"  {'with' if name == 'all' else 'without'} them ({row['n']}): {figures}")
    if found["shared_speakers"]:
        more = f" and {found['more_shared_speakers']} more" if found["more_shared_speakers"] else ""
        say(f"leak check: speakers who were also in training: {', '.join(found['shared_speakers'])}{more}")
    if found["duplicate_groups"]:
        say(f"leak check: recordings with the same content as another one in the CSV: {found['duplicate_groups']}")


def _score(
    arguments: argparse.Namespace, manifest: pd.DataFrame, bundle: Bundle, out: Path
) -> tuple[pd.DataFrame, int]:
    """Score the manifest into ``out``; returns the predictions of all rows, and how many recordings failed."""
    from pipeline.scoring.predictions import read_predictions
    from pipeline.scoring.scoring import Execution, ScoreOptions, score_manifest

    say(f"scoring {len(manifest):,} recordings with {bundle.name} ({bundle.weights_sha256[:12]}) -> {out}")
    execution = Execution(engine=arguments.engine, num_cpus=arguments.num_cpus)
    tell_engine(arguments, execution.chosen(len(manifest), walked=False), f"{len(manifest):,} recordings")
    result = score_manifest(
        manifest,
        out,
        weights=bundle.folder,
        options=ScoreOptions(crops=arguments.crops),
        execution=execution,
        overwrite=arguments.overwrite,
        report=False,
        on_progress=Progress("score"),
    )
    return read_predictions(out), result.failed


def _refuse_beside_compare(arguments: argparse.Namespace) -> None:
    defaults = build_parser()
    targets = ("min_accuracy", "min_weighted_f1", "min_class_accuracy")
    for name in ("model_weights", "enforce", "embed_audio", *targets):
        if getattr(arguments, name) != defaults.get_default(name):
            raise SerError(f"--compare compares two models and gives no verdict; leave --{name} out")


def _compare(arguments: argparse.Namespace) -> int:
    """Compare two bundles on the CSV, or two finished score tables."""
    from jobs._provenance import provenance
    from pipeline.data.splits import add_hashes
    from pipeline.evaluation import leaks
    from pipeline.evaluation.compare import comparison_summary
    from pipeline.models.bundle import Bundle
    from pipeline.reporting.report import write_comparison

    given = [Path(text) for text in arguments.compare]
    sides = [_side(arguments, place) for place in given]
    known = [list(s.labels) if isinstance(s, Bundle) else _labels_of(s, p) for s, p in zip(sides, given, strict=True)]
    names = [str(place) for place in given]
    labels = _together(known, names)
    tables: list[pd.DataFrame] = []
    failed = 0
    checks: list[dict[str, Any]] = []
    contents: pd.DataFrame | None = None  # content hashes of the CSV's recordings, computed once for both models
    for place, name, side in zip("AB", names, sides, strict=True):
        if not isinstance(side, Bundle):
            tables.append(side)
            continue
        manifest = _manifest(arguments, side, labels)
        if contents is None and arguments.leak_check != "off":
            contents = add_hashes(manifest, threads=usable_cpus())
        shared = _leaks(arguments, manifest, side, contents)
        table, lost = _score(arguments, manifest, side, arguments.out / place)
        if shared is not None:
            checks.append({"name": name} | leaks.describe(shared, table, labels))
        tables.append(table)
        failed += lost
    meta = provenance(arguments.command) | {"data": arguments.data_csv}
    result = write_comparison(
        tables[0], tables[1], labels, arguments.out, names=(names[0], names[1]), meta=meta, leak_checks=checks
    )
    print(comparison_summary(result))
    for check in checks:
        say(f"{check['name']}:")
        _say_leaks(check)
    print(f"comparison: {arguments.out / 'comparison.html'}")
    return exit_code(arguments, failed)


def _together(known: Sequence[list[str]], names: Sequence[str]) -> list[str]:
    """The union of both models' classes. Where a model lacks some, prints that these count as its mistakes."""
    if known[0] == known[1]:
        return known[0]
    if not set(known[0]) & set(known[1]):
        raise SerError(
            f"{names[0]} has the classes {known[0]}, {names[1]} has {known[1]}; compare models that share classes"
        )
    for name, own, other in zip(names, known, reversed(known), strict=True):
        if lacking := sorted(set(other) - set(own)):
            say(f"{name} does not have {', '.join(lacking)}: recordings of such a class count as its mistakes")
    return sorted({*known[0], *known[1]})


def _side(arguments: argparse.Namespace, given: Path) -> Bundle | pd.DataFrame:
    """One side of ``--compare``: a model to score with, or a finished table of scores."""
    from pipeline.models.bundle import load_bundle
    from pipeline.scoring.predictions import read_predictions

    if given.suffix != ".pt" and not (given / "config.json").is_file():
        for name in ("crops", "root", "label_map"):
            if getattr(arguments, name) and arguments.data_csv is None:
                raise SerError(f"--compare does not change finished scores; leave --{name} out")
        return read_predictions(given)
    if arguments.data_csv is None:
        raise SerError(f"{given} is a model; give the CSV to compare on with --data_csv")
    return load_bundle(given)


def _labels_of(table: pd.DataFrame, place: Path) -> list[str]:
    """Class names of a table of scores: from its ``run.json``, else from its ``p_`` columns after ``confidence``."""
    run_json = (place if place.is_dir() else place.parent) / "run.json"
    if run_json.is_file():
        return list(json.loads(run_json.read_text(encoding="utf-8"))["labels"])
    columns = list(table.columns)
    if "confidence" not in columns:
        raise SerError(f"{place} is no table of scores: it has no column confidence; give an --out folder of ser score")
    return [name[2:] for name in columns[columns.index("confidence") :] if name.startswith("p_")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job."""
    words = list(sys.argv[1:] if argv is None else argv)
    if crossval.asked(words):
        return crossval.main(words)
    return run(job, build_parser(), words)


if __name__ == "__main__":
    raise SystemExit(main())
