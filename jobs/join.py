"""Makes one bundle of several models that averages their log-probabilities: slower, but better with new speakers."""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs._common import EXIT_DONE, Parser, command, parser_of, say


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("join", __doc__, "runs/seed-42 runs/seed-43 runs/seed-44 --out runs/joined")
    parser.add_argument(
        "bundles", type=Path, nargs="+", metavar="BUNDLE", help="models of one kind, for example of different seeds"
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder for the joined model")
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Join the models and print what to do next."""
    from pipeline.models.ensemble import join

    bundle = join(arguments.bundles, arguments.out)
    say(
        f"{len(arguments.bundles)} networks in {bundle.folder}; a recording takes {len(arguments.bundles)} times the "
        "computation. Measure the model with ser evaluate; its temperature is 1, set it with ser calibrate"
    )
    return EXIT_DONE


main = command(job, build_parser)


if __name__ == "__main__":
    raise SystemExit(main())
