"""Predicts the emotions of a folder or CSV of recordings, with a report; run it again to resume an interrupted run."""

from __future__ import annotations

import argparse
import glob
from pathlib import Path
from typing import TYPE_CHECKING

from jobs._common import (
    ENGINE_OPTIONS,
    Parser,
    Progress,
    add_out,
    add_shared,
    command,
    exit_code,
    fields_of,
    parser_of,
    read_csv,
    say,
    tell_engine,
)
from jobs._window_options import add_window_options, window_options
from pipeline.audio.source import EXTENSIONS, USUAL_ENDINGS
from pipeline.data.labels import describe
from pipeline.scoring import FORMATS
from pipeline.storage.errors import SerError
from pipeline.storage.files import FolderScan, is_remote, local_path, path_text, scan, scan_remote

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.models.bundle import Bundle
    from pipeline.scoring.scoring import ScoreRun


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("score", __doc__, "--model_weights models/inception_ser_final --input calls/ --out scores")
    add_shared(parser, "model_weights")
    parser.add_argument(
        *("--input", "--data_csv"),
        required=True,
        help="folder of recordings (also s3://, gs://), one recording, or a table of paths: CSV, JSON Lines or text",
    )
    add_out(parser, "scores", "predictions, report and run.json; a folder of an interrupted run is continued")
    add_shared(parser, "root", "label_map")
    add_shared(parser, "overwrite", "tolerate_failures")
    parser.add_argument("--no_report", action="store_true", help="write the tables only")
    parser.add_argument("--note", help="a sentence to show at the top of the report")
    parser.add_argument(
        "--export", nargs="+", choices=FORMATS, default=[], help="also write JSON Lines, or Audacity label tracks"
    )
    parser.add_argument(
        "--merge", action="store_true", help="also write the table timeline: neighbouring windows of one class, merged"
    )
    add_window_options(parser)
    spread = parser.add_argument_group("CPUs, GPUs and batches (no effect on the results)")
    add_shared(spread, *ENGINE_OPTIONS)
    spread.add_argument("--num_gpus", type=int, default=0, help="GPUs to use (default 0)")
    spread.add_argument("--batch_size", type=int, default=16, help="windows in a batch of the network (default 16)")
    spread.add_argument(
        "--block_rows",
        type=int,
        help="recordings in a block; an interrupted run loses at most its unfinished blocks (default: up to 256)",
    )
    return parser


def read_input(arguments: argparse.Namespace, bundle: Bundle) -> tuple[pd.DataFrame, FolderScan | None]:
    """The manifest of ``--input``, and the result of the folder scan (None if it is no folder)."""
    from pipeline.data.manifest import ManifestError

    remote, source = is_remote(arguments.input), Path(local_path(arguments.input))
    if remote or source.is_dir():
        for name, value in fields_of(arguments, "root", "label_map").items():
            if value:
                raise SerError(f"--{name} is for a CSV; leave it out with the folder {arguments.input}")
    if remote:
        return _listed(arguments.input, scan_remote(arguments.input, EXTENSIONS))
    if recordings := _recordings(source):
        import pandas as pd

        return pd.DataFrame({"speech": recordings}), None
    if not source.is_dir():
        return read_csv(arguments, source, labels=bundle.labels, require_labels=False), None
    try:
        found = scan(source, EXTENSIONS)
    except OSError as error:
        raise ManifestError(f"cannot list {source}: {error.strerror}; check its permissions") from error
    return _listed(str(source), found)


def _recordings(source: Path) -> list[str]:
    """The recording at this path, or those that match it as a pattern; [] for a folder or a table."""
    if source.is_dir():
        return []
    found = [source] if source.is_file() else list(map(Path, sorted(glob.glob(str(source), recursive=True))))
    return [path_text(path.absolute()) for path in found if path.suffix.lower() in EXTENSIONS and path.is_file()]


def _listed(source: str, found: FolderScan) -> tuple[pd.DataFrame, FolderScan]:
    import pandas as pd

    from pipeline.data.manifest import ManifestError

    if skipped := found.skipped():
        say(f"left out: {skipped}")
    if not found.files:
        raise ManifestError(f"no recordings in {source}; expected files ending in {USUAL_ENDINGS}")
    return pd.DataFrame({"speech": found.files}), found


def job(arguments: argparse.Namespace) -> int:
    """Score the recordings and print a summary."""
    from jobs._provenance import provenance
    from pipeline.models.bundle import load_bundle
    from pipeline.scoring.scoring import Execution, score_manifest

    bundle = load_bundle(arguments.model_weights)
    table, found = read_input(arguments, bundle)
    say(f"labels: {describe(bundle.labels)}")
    say(f"scoring {len(table):,} recordings with {bundle.name} ({bundle.weights_sha256[:12]}) -> {arguments.out}")
    options = window_options(arguments)
    execution = Execution(**fields_of(arguments, "engine", "num_cpus", "num_gpus", "batch_size", "block_rows"))
    tell_engine(arguments, execution.chosen(len(table), walked=options.steps is not None), f"{len(table):,} recordings")
    result = score_manifest(
        table,
        arguments.out,
        weights=bundle.folder,
        options=options,
        execution=execution,
        report=not arguments.no_report,
        formats=arguments.export,
        **fields_of(arguments, "overwrite", "merge"),
        meta=provenance(arguments.command, bundle) | {"data": arguments.input, "note": arguments.note},
        on_progress=Progress("score"),
    )
    tell(result, bundle)
    if result.evaluation is not None and result.evaluation["labelled"]:
        from pipeline.reporting.report import terminal_summary

        print(terminal_summary(result.evaluation))
    for path in [arguments.out / ("predictions.csv" if arguments.no_report else "report.html"), *result.exports]:
        print(path)
    unseen = found is not None and (found.unreadable or found.too_deep)
    return exit_code(arguments, result.failed or unseen)


def tell(result: ScoreRun, bundle: Bundle) -> None:
    """Print the speed, the failures, and how much of long recordings was not analysed."""
    if result.scored:
        speed = result.scored / result.seconds
        say(f"{result.scored:,} recordings scored in {result.seconds:.1f} s, {speed:.3g} files/s including the start")
    else:
        say("nothing left to score")
    if result.failed:
        causes = ", ".join(f"{n:,} {code}" for code, n in sorted(result.statuses.items()) if code != "ok")
        say(f"{result.failed:,} of {result.rows:,} recordings could not be used: {causes}")
    if result.noted:
        say(f"{result.noted:,} recordings have a notice of how they were read, in the column notice")
    if result.silence_s >= 1:
        say(f"{result.silence_s:,.0f} s of silence were skipped: the windows named silence in segments.csv")
    if result.unheard:
        say(f"{result.unheard} scored; --window_s {bundle.features.window_s:g} scores all of it")


main = command(job, build_parser)


if __name__ == "__main__":
    raise SystemExit(main())
