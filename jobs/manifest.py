"""``ser manifest DIR --out metadata.csv``: a folder of labelled recordings as a manifest CSV."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jobs._common import EXIT_DONE, Parser, run, say
from jobs.extract import describe_labels
from pipeline.corpora import scan_folder


def build_parser() -> Parser:
    """The options of this job."""
    parser = Parser(prog="ser manifest", description=__doc__, epilog="example: ser manifest RAVDESS --out metadata.csv")
    parser.add_argument("folder", type=Path, help="folder of recordings: RAVDESS names, or one folder an emotion")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write: speech,label,speaker,...")
    parser.add_argument("--songs", action="store_true", help="keep RAVDESS song files too (default: speech only)")
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Write the manifest and say what is in it."""
    table = scan_folder(arguments.folder, songs=arguments.songs)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out, index=False)
    say(f"{len(table)} recordings -> {arguments.out}")
    describe_labels(table)
    return EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job."""
    return run(job, build_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
