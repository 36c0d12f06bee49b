"""Sends recordings to a running service and prints its answers; needs no model, Ray or audio library."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs._common import EXIT_DONE, EXIT_SOME_FAILED, Parser, command, fields_of, parser_of, say
from pipeline.storage.errors import SerError

if TYPE_CHECKING:
    from serve.schema import Failure, Recording

STDIN = "-"


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("predict", __doc__, "--url http://127.0.0.1:8000 a.wav b.flac; SER_API_KEY holds the key")
    parser.add_argument("file", nargs="+", help="recordings; - reads one from stdin")
    parser.add_argument(
        "--url",
        default=os.environ.get("SER_API_URL"),
        help="address of the service (default: SER_API_URL, else port 8000 of this machine)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one answer per line, instead of a table")
    parser.add_argument(
        "--window_s",
        type=_window,
        help="analyse the whole recording in windows of this many seconds; or middle: one window (default: middle for "
        "recordings of up to 6 s, else windows)",
    )
    parser.add_argument(
        "--hop_s", type=float, help="seconds from one window's start to the next (default: the window's length)"
    )
    parser.add_argument(
        "--channels",
        help="mix: average of all channels; each: every channel on its own; or the number of one channel, from 0 "
        "(default: the service chooses)",
    )
    parser.add_argument("--top_k", type=int, help="number of classes in an answer, most likely first (default: all)")
    parser.add_argument("--min_confidence", type=float, help="answers with a lower confidence become 'uncertain'")
    parser.add_argument("--model", help="name of a model of the service (default: its first one)")
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Send the recordings and print the answers; returns 4 if a recording could not be used."""
    from serve.client import DEFAULT_URL, Client, ClientError
    from serve.schema import Failure

    names = ("window_s", "hop_s", "channels", "top_k", "min_confidence", "model")
    options = fields_of(arguments, *names)
    sources = [("-", sys.stdin.buffer.read()) if name == STDIN else name for name in arguments.file]
    windows = any(options[name] is not None for name in ("window_s", "hop_s")) or options["channels"] == "each"
    width = max(len("file"), *(len(Path(name).name) for name in arguments.file))
    failed = 0
    try:
        with Client(arguments.url or DEFAULT_URL, os.environ.get("SER_API_KEY")) as client:
            if not arguments.json:
                print(f"{'file':<{width}}  {'emotion':<12} {'confidence':>10}  then")
            for answer in client.predict_each(sources, **options):
                failed += isinstance(answer, Failure)
                print(
                    answer.model_dump_json(exclude_none=True) if arguments.json else _row(answer, width, windows),
                    flush=True,
                )
                if isinstance(answer, Failure):
                    say(f"{answer.name}: {answer.problem.detail}")
    except ClientError as error:
        raise SerError(str(error)) from error
    return EXIT_SOME_FAILED if failed else EXIT_DONE


def _window(text: str) -> float | str:
    return text if text == "middle" else float(text)


def _row(answer: Recording | Failure, width: int, windows: bool) -> str:
    from serve.schema import Failure

    if isinstance(answer, Failure):
        return f"{answer.name or '':<{width}}  {answer.problem.code}"
    then = ", ".join(f"{score.label} {score.score:.1%}" for score in answer.scores[1:3])
    lines = [f"{answer.name or '':<{width}}  {answer.label:<12} {_share(answer.confidence):>10}  {then}".rstrip()]
    for segment in (answer.segments or []) if windows else []:
        channel = "" if segment.channel == "mix" else f"channel {segment.channel}  "
        span = f"{segment.start_s:8.2f} - {segment.end_s:8.2f} s"
        lines.append(f"  {channel}{span}  {segment.label:<12} {_share(segment.confidence):>10}".rstrip())
    return "\n".join(lines)


def _share(confidence: float | None) -> str:
    """The confidence in percent; "" for silence, which has none."""
    return "" if confidence is None else f"{confidence:.1%}"


main = command(job, build_parser)


if __name__ == "__main__":
    raise SystemExit(main())
