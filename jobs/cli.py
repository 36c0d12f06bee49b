"""``ser``: all jobs under one command. ``ser COMMAND --help`` tells each one's options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from jobs._common import AS_SER, EXIT_DONE, EXIT_USAGE, say

COMMANDS = {
    "ravdess": "download the RAVDESS speech recordings, checked",
    "manifest": "a folder of labelled recordings -> a manifest CSV",
    "extract": "recordings -> log-mel Parquet shards (Ray Data)",
    "train": "a manifest or shards -> a trained model bundle (Ray Train)",
    "adapt": "20 to 5,000 recordings of one's own -> a model of one's own",
    "evaluate": "a labelled CSV -> metrics, confusion matrix, verdict, report",
    "crossval": "a recipe trained and tested on folds, one model each (Ray)",
    "join": "several trained models -> one that answers with their mean",
    "calibrate": "out-of-fold answers -> the temperature of a model",
    "score": "a folder or CSV -> a table of emotions (Ray Data)",
    "infer": "one or a few files -> emotions, without Ray",
    "submit": "extract, train, evaluate, crossval or score on a Ray cluster",
    "serve": "the HTTP service on this machine (Ray Serve, or --engine local)",
    "predict": "files -> emotions, by a running service",
    "app": "the web page and the service together",
}


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return (
        "usage: ser COMMAND [options]\n\n"
        + "\n".join(lines)
        + "\n\nser COMMAND --help tells each command's options."
        + "\nexample: ser infer --file samples/ben_sad_window.wav"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the first word names."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("-h", "--help"):
        print(usage())
        return EXIT_DONE
    if not words or words[0] not in COMMANDS:
        say(f"error: unknown command {words[0]!r}; see ser --help" if words else usage())
        return EXIT_USAGE
    was = AS_SER.set(True)
    try:
        result: int = import_module(f"jobs.{words[0]}").main(words[1:])
    finally:
        AS_SER.reset(was)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
