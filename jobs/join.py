"""Several trained models -> one bundle whose networks answer together: slower, and better with voices never heard."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jobs._common import EXIT_DONE, Parser, called, run, say


def build_parser() -> Parser:
    """The options of this job."""
    parser = Parser(
        prog=called("join"),
        description=__doc__,
        epilog="example: %(prog)s runs/seed-42 runs/seed-43 runs/seed-44 --out runs/joined",
    )
    parser.add_argument(
        "bundles", type=Path, nargs="+", metavar="BUNDLE", help="models of one kind, of different seeds for example"
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder for the joined model")
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Join, and say what came of it."""
    from pipeline.models.ensemble import join

    bundle = join(arguments.bundles, arguments.out)
    say(
        f"{len(arguments.bundles)} networks in {bundle.folder}; each recording costs as many times the arithmetic. "
        "Measure it with jobs.evaluate; its temperature is 1"
    )
    return EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job."""
    return run(job, build_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
