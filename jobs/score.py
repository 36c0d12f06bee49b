"""A folder or CSV of recordings -> a table of emotions and a report, on Ray Data; resumes where it was cut off."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from jobs._common import EXIT_DONE, EXIT_SOME_FAILED, Parser, Progress, run, say
from pipeline.audio import EXTENSIONS
from pipeline.checkpoint import Bundle, load_bundle
from pipeline.corpora import ManifestError, read_manifest
from pipeline.folders import FolderScan, scan
from pipeline.labels import parse_label_map


def build_parser() -> Parser:
    """The options of this job."""
    parser = Parser(
        prog="python -m jobs.score",
        description=__doc__,
        epilog="example: python -m jobs.score --model_weights models/inception_ser_final --input calls/ --out scores",
    )
    parser.add_argument("--model_weights", type=Path, help="bundle folder or the .pt in it (default: the shipped one)")
    parser.add_argument(
        *("--input", "--data_csv"), type=Path, required=True, help="folder of recordings, or CSV with the column speech"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for predictions.parquet, .csv, report, run.json"
    )
    parser.add_argument("--root", type=Path, help="folder that relative paths in the CSV start from (default: its own)")
    parser.add_argument("--label_map", type=parse_label_map, help="other label names in the CSV: given=wanted,...")
    parser.add_argument("--overwrite", action="store_true", help="begin again whatever --out holds")
    parser.add_argument("--no_report", action="store_true", help="write the tables only")
    parser.add_argument("--tolerate_failures", action="store_true", help="exit 0 even when some recordings failed")
    model = parser.add_argument_group("what is asked of the model")
    model.add_argument("--crops", type=int, help="windows a recording, evenly spaced (default: the bundle's number)")
    model.add_argument(
        "--min_confidence", type=float, default=0.0, help="answers below it become 'uncertain' (default 0)"
    )
    model.add_argument("--channels", type=_channel, default="mix", help="mix, or the number of a channel (default mix)")
    spread = parser.add_argument_group("how the work is spread (changes no result)")
    spread.add_argument("--num_cpus", type=int, help="CPUs of the Ray started here; 0: no Ray (default: all)")
    spread.add_argument("--num_gpus", type=int, default=0, help="GPUs to use (default 0)")
    spread.add_argument("--batch_size", type=int, default=16, help="clips the network sees at once (default 16)")
    spread.add_argument(
        "--block_rows", type=int, help="recordings a block, the unit of resumption (default: up to 256)"
    )
    return parser


def _channel(text: str) -> int | str:
    if text == "mix" or (text.isdecimal() and int(text) < 64):
        return text if text == "mix" else int(text)
    raise argparse.ArgumentTypeError(f"expected mix or a channel number from 0, got {text!r}")


def read_input(arguments: argparse.Namespace, bundle: Bundle) -> tuple[pd.DataFrame, FolderScan | None]:
    """The manifest that ``--input`` names, and what the folder scan left out."""
    source: Path = arguments.input
    if not source.is_dir():
        table = read_manifest(
            source,
            root=arguments.root,
            label_map=arguments.label_map,
            labels=bundle.labels,
            require_labels=False,
        )
        return table, None
    try:
        found = scan(source, EXTENSIONS)
    except OSError as error:
        raise ManifestError(f"cannot list {source}: {error.strerror}; check its permissions") from error
    if skipped := found.skipped():
        say(f"left out: {skipped}")
    if not found.files:
        raise ManifestError(f"no recordings in {source}; expected files ending in {', '.join(sorted(EXTENSIONS))}")
    return pd.DataFrame({"speech": found.files}), found


def job(arguments: argparse.Namespace) -> int:
    """Score, and say what came of it."""
    from pipeline.scoring import Execution, ScoreOptions, score_manifest

    bundle = load_bundle(arguments.model_weights)
    table, found = read_input(arguments, bundle)
    say("labels: " + ", ".join(f"{i} {name}" for i, name in enumerate(bundle.labels)))
    say(f"scoring {len(table):,} recordings with {bundle.name} ({bundle.weights_sha256[:12]}) -> {arguments.out}")
    result = score_manifest(
        table,
        arguments.out,
        weights=bundle.folder,
        options=ScoreOptions(
            crops=arguments.crops, min_confidence=arguments.min_confidence, channel=arguments.channels
        ),
        execution=Execution(
            num_cpus=arguments.num_cpus,
            num_gpus=arguments.num_gpus,
            batch_size=arguments.batch_size,
            block_rows=arguments.block_rows,
        ),
        overwrite=arguments.overwrite,
        report=not arguments.no_report,
        on_progress=Progress("score"),
    )
    if result.scored:
        speed = result.scored / result.seconds
        say(f"{result.scored:,} recordings scored in {result.seconds:.1f} s, {speed:.0f} files/s")
    else:
        say("nothing left to do")
    if result.failed:
        causes = ", ".join(f"{n:,} {code}" for code, n in sorted(result.statuses.items()) if code != "ok")
        say(f"{result.failed:,} of {result.rows:,} recordings could not be used: {causes}")
    if result.evaluation is not None and "label" in table.columns:
        from pipeline.report import terminal_summary

        print(terminal_summary(result.evaluation))
    print(arguments.out / ("predictions.csv" if arguments.no_report else "report.html"))
    unseen = found is not None and (found.unreadable or found.too_deep)
    return EXIT_SOME_FAILED if (result.failed or unseen) and not arguments.tolerate_failures else EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job."""
    return run(job, build_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
