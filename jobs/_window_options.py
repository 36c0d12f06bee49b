"""The options of ``score`` and ``infer`` that say what is heard of a recording, and how its answers are called."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pipeline.inference.timeline import SILENCE_DBFS, SURE_ENOUGH

if TYPE_CHECKING:
    from pipeline.inference.predictor import Channels, ScoreOptions


def add_window_options(parser: argparse.ArgumentParser) -> None:
    """Add them, as a group."""
    group = parser.add_argument_group("what is heard, and how it is called")
    group.add_argument(
        "--crops", type=int, help="windows a recording, evenly spaced; 1: the model's (default: its number)"
    )
    group.add_argument(
        "--window_s", type=float, help="hear all of a recording in windows of this length, up to the model's (2 s)"
    )
    group.add_argument("--hop_s", type=float, help="from one window to the next (default: the window's length)")
    group.add_argument(
        "--channels", type=_channels, default="mix", help="mix, each (with --window_s), or a channel's number"
    )
    group.add_argument(
        "--min_confidence",
        type=_confidence,
        default=0.0,
        metavar="P|auto",
        help="answers below it, and to what is unlike the training recordings, become 'uncertain'; auto: "
        f"{SURE_ENOUGH:g}, more likely right than wrong (default 0: never)",
    )
    group.add_argument(
        "--silence_dbfs",
        type=float,
        default=SILENCE_DBFS,
        help=f"what is quieter (RMS) becomes 'silence' (default {SILENCE_DBFS:g})",
    )


def window_options(arguments: argparse.Namespace) -> ScoreOptions:
    """What the options say.

    Raises:
        SerError: a number out of range, or options that exclude each other.
    """
    from pipeline.inference.predictor import ScoreOptions

    return ScoreOptions(
        crops=arguments.crops,
        min_confidence=arguments.min_confidence,
        channels=arguments.channels,
        window_s=arguments.window_s,
        hop_s=arguments.hop_s,
        silence_dbfs=arguments.silence_dbfs,
    )


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
