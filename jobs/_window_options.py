"""The options of ``score`` and ``infer`` for the input windows of a recording and the names of the answers."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jobs._common import add_shared, fields_of
from pipeline.inference.timeline import SILENCE_DBFS, SURE_ENOUGH

if TYPE_CHECKING:
    from pipeline.inference.predictor import Channels, ScoreOptions


def add_window_options(parser: argparse.ArgumentParser) -> None:
    """Add them, as a group."""
    group = parser.add_argument_group("input windows and answers")
    add_shared(group, "crops")
    group.add_argument(
        "--window_s",
        type=float,
        help="analyse the whole recording in windows of this many seconds, at most the model's own (2 s)",
    )
    group.add_argument(
        "--hop_s", type=float, help="seconds from one window's start to the next (default: the window's length)"
    )
    group.add_argument(
        "--channels",
        type=_channels,
        default="mix",
        help="mix: average of all channels; each: every channel on its own (with --window_s); or the number of one "
        "channel, from 0 (default mix)",
    )
    group.add_argument(
        "--min_confidence",
        type=_confidence,
        default=0.0,
        metavar="P|auto",
        help="answers with a lower confidence, and answers for sound unlike the training recordings, become "
        f"'uncertain'; auto: {SURE_ENOUGH:g}, above which an answer is more likely right than wrong (default 0: never)",
    )
    group.add_argument(
        "--silence_dbfs",
        type=float,
        default=SILENCE_DBFS,
        help=f"windows with a lower RMS level become 'silence' (default {SILENCE_DBFS:g})",
    )


def window_options(arguments: argparse.Namespace) -> ScoreOptions:
    """The ``ScoreOptions`` of the command line; refuses numbers out of range, and options that exclude each other."""
    from pipeline.inference.predictor import ScoreOptions

    names = ("crops", "min_confidence", "channels", "window_s", "hop_s", "silence_dbfs")
    return ScoreOptions(**fields_of(arguments, *names))


def _confidence(text: str) -> float:
    try:
        return SURE_ENOUGH if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto or a number from 0 to 1, got {text!r}") from None


def _channels(text: str) -> Channels:
    if text == "mix":
        return "mix"
    if text == "each":
        return "each"
    if text.isdecimal() and int(text) < 64:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected mix, each or a channel number from 0, got {text!r}")
