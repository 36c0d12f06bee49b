"""A job on a Ray cluster: upload the code, start it there, follow its log, return its exit code.

Only what the job needs travels: this project's code, the model it names, the CSV files it names. Recordings, shards and
results stay on storage that all nodes share.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from jobs import crossval
from jobs._common import EXIT_DONE, Parser, called, run, say
from jobs._follow import follow
from jobs._package import describe, largest, pack
from jobs._paths import Placed, place, read_words
from pipeline.cluster.submit import connect, new_name
from pipeline.storage.errors import SerError

JOBS = ("extract", "train", "evaluate", "crossval", "score")
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
_MIB = 2**20


def build_parser() -> Parser:
    """The options of this command; what it does not know are the job's."""
    parser = Parser(
        prog=called("submit"),
        description=__doc__,
        usage="ser submit {extract,train,evaluate,crossval,score} [options of the job] [options below]",
        epilog="example: %(prog)s train --features features --out runs/first --storage_path /shared",
        allow_abbrev=False,
    )
    parser.add_argument("job", choices=JOBS, help="its options are those of python -m jobs.JOB")
    parser.add_argument(
        "--address",
        help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265)",
    )
    parser.add_argument(
        "--storage_path", type=Path, help="folder at one path on all nodes; relative --out and inputs lie in it"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the job; no secrets")
    parser.add_argument(
        "--submission_id", help="the job's name on the cluster, which no other has (default: made from job and time)"
    )
    parser.add_argument("--max_upload_mb", type=float, default=100.0, help="refuse a larger upload (default 100)")
    parser.add_argument("--no_wait", action="store_true", help="print the job's name and return at once")
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Check, pack, submit, follow."""
    environment = _environment(arguments.env)
    placed = _placed(arguments)
    with tempfile.TemporaryDirectory(prefix="ser-submit-") as scratch:
        folder = Path(scratch) / "job"
        size = pack(folder, placed.shipped)
        if size > arguments.max_upload_mb * _MIB:
            raise SerError(
                f"{size / _MIB:.1f} MiB would be uploaded ({', '.join(largest(folder))}), more than --max_upload_mb "
                f"{arguments.max_upload_mb:g}; put what is large on storage that all nodes share and name it absolutely"
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
    """The job's words as the cluster needs them, and what is uploaded for them."""
    storage: Path | None = arguments.storage_path
    if storage is not None and not storage.is_absolute():
        raise SerError(
            f"--storage_path {storage} must be an absolute folder, the same on all nodes; object stores are read only"
        )
    return place(arguments.job, arguments.words, arguments.of_job, storage)


def _environment(given: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` words as a table.

    Raises:
        SerError: no such word, or a secret: the job's record shows its environment to everybody who can see the job.
    """
    pairs = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise SerError(f"--env {word}: expected NAME=VALUE")
        if any(part in name.upper() for part in _SECRETS):
            raise SerError(f"--env {name}: a job's record shows its environment; set secrets on the nodes themselves")
        pairs[name] = value
    return pairs


def split_words(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Our options wherever they stand; all others, in order, as ``words``, and ``of_job`` as the job reads them."""
    arguments: argparse.Namespace
    arguments, others = parser.parse_known_args(list(words))  # type: ignore[no-untyped-call]
    arguments.words = others
    if arguments.job == "evaluate" and crossval.asked(others):
        arguments.job = "crossval"
    arguments.of_job = read_words(import_module(f"jobs.{arguments.job}").build_parser(), others)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(job, build_parser(), argv, parse=split_words)


if __name__ == "__main__":
    raise SystemExit(main())
