"""Runs a job on a Ray cluster: uploads the code, starts the job, prints its log, returns its exit code.

Only this project's code and the models and CSV files that the job names are uploaded. Recordings, features and results
stay on storage that all nodes share.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from jobs import crossval
from jobs._common import EXIT_DONE, Parser, command, parser_of, say
from jobs._follow import follow
from jobs._package import describe, largest, pack
from jobs._paths import Placed, place, read_words
from pipeline.cluster.submit import connect, new_name
from pipeline.storage.errors import SerError

JOBS = ("extract", "train", "evaluate", "crossval", "score")
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
_MIB = 2**20


def build_parser() -> Parser:
    """The options of this command; all other options are the job's."""
    parser = parser_of("submit", __doc__, "train --features features --out runs/first --storage_path /shared")
    parser.usage = "ser submit {extract,train,evaluate,crossval,score} [options of the job] [options below]"
    parser.allow_abbrev = False
    parser.add_argument("job", choices=JOBS, help="the command to run there; for its options see ser JOB --help")
    parser.add_argument(
        "--address",
        help="address of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else "
        "http://127.0.0.1:8265)",
    )
    parser.add_argument(
        "--storage_path",
        type=Path,
        help="folder that has the same path on all nodes; a relative --out and relative inputs are inside it",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an environment variable for the job; not for secrets; may be given several times",
    )
    parser.add_argument(
        "--submission_id", help="unique name of the job on the cluster (default: made from the command and the time)"
    )
    parser.add_argument("--max_upload_mb", type=float, default=100.0, help="largest upload, in MiB (default 100)")
    parser.add_argument("--no_wait", action="store_true", help="print the job's name and return at once")
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Check the arguments, pack the upload, submit the job, follow its log."""
    environment = _environment(arguments.env)
    placed = _placed(arguments)
    with tempfile.TemporaryDirectory(prefix="ser-submit-") as scratch:
        folder = Path(scratch) / "job"
        size = pack(folder, placed.shipped)
        if size > arguments.max_upload_mb * _MIB:
            raise SerError(
                f"{size / _MIB:.1f} MiB would be uploaded ({largest(folder)}), more than --max_upload_mb "
                f"{arguments.max_upload_mb:g}; put large files on storage that all nodes share and give absolute paths"
            )
        client = connect(arguments.address)
        say(f"uploading {describe(folder)} to {client.address}")
        name = client.submit(
            shlex.join(["python", "-m", f"jobs.{arguments.job}", *placed.words]),
            folder,
            name=arguments.submission_id or new_name(arguments.job),
            environment=environment,
        )
    say(f"job {name}: python -m jobs.{arguments.job} {shlex.join(placed.words)}")
    if arguments.no_wait:
        print(name)
        return EXIT_DONE
    return follow(client, name)


def _placed(arguments: argparse.Namespace) -> Placed:
    """The job's arguments for the cluster, and the uploads that they need."""
    storage: Path | None = arguments.storage_path
    if storage is not None and not storage.is_absolute():
        raise SerError(
            f"--storage_path {storage} must be an absolute path of a folder that all nodes share; object stores cannot "
            "be used, as jobs only read from them"
        )
    return place(arguments.job, arguments.words, arguments.of_job, storage)


def _environment(given: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` arguments as a mapping; refuses secrets, which all who see the job could read in its record."""
    pairs = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise SerError(f"--env {word}: expected NAME=VALUE")
        if any(part in name.upper() for part in _SECRETS):
            raise SerError(f"--env {name}: secrets would be visible in the job's record; set them on the nodes instead")
        pairs[name] = value
    return pairs


def split_words(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Parse this command's options, which may be anywhere; the others become ``words`` and, parsed, ``of_job``."""
    arguments: argparse.Namespace
    arguments, others = parser.parse_known_args(list(words))  # type: ignore[no-untyped-call]
    arguments.words = others
    if arguments.job == "evaluate" and crossval.asked(others):
        arguments.job = "crossval"
    arguments.of_job = read_words(import_module(f"jobs.{arguments.job}").build_parser(), others)
    return arguments


main = command(job, build_parser, parse=split_words)


if __name__ == "__main__":
    raise SystemExit(main())
