"""``ser``: all jobs under one command. ``ser COMMAND --help`` lists the options of a command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from jobs._common import AS_SER, EXIT_DONE, EXIT_USAGE, say
from pipeline import __version__

COMMANDS = {
    "ravdess": "download the RAVDESS speech recordings and check them",
    "manifest": "write a CSV of a folder of labelled recordings",
    "extract": "compute features of recordings, as Parquet shards",
    "train": "train a model on recordings or features",
    "adapt": "adapt a model to 20 to 5,000 recordings of your own",
    "evaluate": "measure a model on labelled recordings, with a report",
    "crossval": "cross-validation: train and test one model for each fold",
    "join": "make one model of several, which averages their answers",
    "calibrate": "set the temperature of a model, or its familiarity",
    "score": "predict the emotions of a folder or CSV of recordings",
    "infer": "predict the emotions of one or a few files, without Ray",
    "submit": "run extract, train, evaluate, crossval or score on a Ray cluster",
    "serve": "run the HTTP service on this machine",
    "predict": "send files to a running service and print its answers",
    "app": "run the web page and the service together",
}


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return (
        "usage: ser COMMAND [options]\n\n"
        + "\n".join(lines)
        + "\n\nser COMMAND --help lists the options of a command; ser --version prints the version."
        + "\nexample: ser infer --file samples/ben_sad_window.wav"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by the first argument."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("-h", "--help"):
        print(usage())
        return EXIT_DONE
    if words and words[0] in ("-V", "--version"):
        print(f"ser {__version__}")
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
