"""Predicts the emotions of one or a few recordings at once: without Ray, and without PyTorch if ONNX Runtime works."""

from __future__ import annotations

import argparse
import glob
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs._common import EXIT_DONE, EXIT_SOME_FAILED, Parser, add_shared, command, fields_of, parser_of, say
from jobs._window_options import add_window_options, window_options
from pipeline.audio.source import EXTENSIONS, printable
from pipeline.audio.windows import LONG_S
from pipeline.inference.predictor import ScoreOptions
from pipeline.inference.timeline import NO_EMOTION
from pipeline.models.backends import BACKENDS
from pipeline.storage.files import scan

if TYPE_CHECKING:
    from pipeline.inference.predictor import Prediction, Predictor
    from pipeline.inference.timeline import Floats, Timeline

STDIN = "-"


def build_parser() -> Parser:
    """The options of this job."""
    parser = parser_of("infer", __doc__, "--model_weights runs/first --file a.wav b.flac")
    add_shared(parser, "model_weights")
    parser.add_argument(
        "--file",
        nargs="+",
        required=True,
        metavar="FILE",
        help="recordings, patterns such as '*.wav', or folders; - reads one recording from stdin",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_window_options(parser)
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="library that runs the network: ONNX Runtime or PyTorch; auto: ONNX Runtime on the CPU if possible "
        "(default auto)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, or a PyTorch device such as cuda (default cpu)")
    parser.add_argument("--threads", type=int, help="threads for the network's arithmetic (default: one for each CPU)")
    return parser


@dataclass(frozen=True)
class Answer:
    """The prediction for one file, and its windows (None without ``--window_s``)."""

    name: str
    prediction: Prediction
    windows: Timeline | None


def job(arguments: argparse.Namespace) -> int:
    """Predict and print; returns 4 if a recording could not be used."""
    from pipeline.inference.predictor import Predictor

    options = window_options(arguments)
    predictor = Predictor.from_bundle(
        arguments.model_weights, crops=options.crops, **fields_of(arguments, "backend", "device", "threads")
    )
    window_s = predictor.bundle.features.window_s
    answers = [_answer(name, predictor, options) for name in expanded(arguments.file)]
    if arguments.json:
        found = [as_json(answer, predictor.labels, options) for answer in answers]
        print(json.dumps(found, indent=2, ensure_ascii=True, allow_nan=False))
    else:
        print_table(answers, predictor.labels, options)
    for answer in answers:
        if answer.prediction.error is not None:
            say(answer.prediction.error)
        if answer.prediction.notice:
            say(f"notice: {printable(answer.name)}: {answer.prediction.notice}")
        if answer.windows is None and answer.prediction.ok and answer.prediction.duration_s > LONG_S:
            scored = f"{answer.prediction.scored_s:g} s of {answer.prediction.duration_s:g} s scored"
            say(f"notice: {printable(answer.name)}: {scored}; --window_s {window_s:g} scores all of it")
    return EXIT_DONE if all(answer.prediction.ok for answer in answers) else EXIT_SOME_FAILED


def expanded(names: Sequence[str]) -> list[str]:
    """``names`` with each pattern (``*.wav``, ``**/*.wav``) and folder replaced by its recordings.

    Not every shell expands patterns. A name stays as it is if a file has it, or if no file matches it.
    """
    files: list[str] = []
    for name in names:
        if os.path.isdir(name):
            found = scan(Path(name), EXTENSIONS)
            if skipped := found.skipped():
                say(f"left out of {printable(name)}: {skipped}")
            files += found.files or [name]
            continue
        fitting = [] if os.path.lexists(name) or not glob.has_magic(name) else sorted(glob.glob(name, recursive=True))
        files += fitting or [name]
    return files


def _answer(name: str, predictor: Predictor, options: ScoreOptions) -> Answer:
    source = sys.stdin.buffer.read() if name == STDIN else name
    if options.steps is None:
        return Answer(name, predictor.predict([source], channel=options.channel)[0], None)
    found = predictor.follow(source, options.steps, channels=options.channels, silence_dbfs=options.silence_dbfs)
    return Answer(name, *found)


def as_json(answer: Answer, labels: Sequence[str], options: ScoreOptions) -> dict[str, Any]:
    """One answer as plain values for JSON; None where a value is unknown."""
    prediction, windows = answer.prediction.told(options.silence_dbfs), answer.windows
    found: dict[str, Any] = {"file": answer.name, "status": prediction.status, "error": prediction.error}
    found["predicted"] = prediction.label(options.min_confidence, options.silence_dbfs)
    if prediction.ok:
        found |= {
            "confidence": known(prediction.confidence),
            "probabilities": _named(labels, prediction.probabilities),
            "entropy": known(prediction.entropy),
            "margin": known(prediction.margin),
            "familiarity": known(prediction.familiarity),
            "speech_share": known(prediction.speech_share),
            "level_dbfs": prediction.level_dbfs,
            "scored_s": prediction.scored_s,
            "notice": prediction.notice or None,
        }
    if math.isfinite(prediction.duration_s):
        found |= {
            "duration_s": prediction.duration_s,
            "sample_rate_hz": prediction.sample_rate_hz,
            "channels": prediction.channels,
        }
    if windows is not None:
        found["segments"] = [
            {
                "channel": windows.channel[i],
                "start_s": float(windows.start_s[i]),
                "end_s": float(windows.end_s[i]),
                "predicted": name,
                "probabilities": _named(labels, p),
            }
            for i, (name, p) in enumerate(_told(windows, labels, options))
        ]
    return found


def _told(windows: Timeline, labels: Sequence[str], options: ScoreOptions) -> Iterator[tuple[str, Floats]]:
    """The name and the probabilities ``(C,)`` of each window."""
    names = windows.names(labels, options.min_confidence, options.silence_dbfs)
    return zip(names, windows.told(options.silence_dbfs), strict=True)


def known(number: float) -> float | None:
    """The number, or None for NaN (silence has no confidence)."""
    return number if math.isfinite(number) else None


def _named(labels: Sequence[str], p: Floats) -> dict[str, float] | None:
    return dict(zip(labels, p.tolist(), strict=True)) if all(map(math.isfinite, p)) else None


def print_table(answers: Sequence[Answer], labels: Sequence[str], options: ScoreOptions) -> None:
    """Print a line for each recording: file, label, confidence, next two labels; below it a line for each window."""
    shown = [answer.name.encode("utf-8", "backslashreplace").decode("utf-8").replace("\n", "\\n") for answer in answers]
    width = max(len("file"), *map(len, shown))
    print(f"{'file':<{width}}  {'emotion':<12} {'confidence':>10}  then")
    for name, answer in zip(shown, answers, strict=True):
        prediction = answer.prediction
        if not prediction.ok:
            print(f"{name:<{width}}  {prediction.status}")
            continue
        label = prediction.label(options.min_confidence, options.silence_dbfs)
        if label in NO_EMOTION:
            print(f"{name:<{width}}  {label}")
        else:
            order = prediction.probabilities.argsort()[::-1]
            then = ", ".join(f"{labels[i]} {prediction.probabilities[i]:.1%}" for i in order[1:3])
            print(f"{name:<{width}}  {label:<12} {prediction.confidence:>10.1%}  {then}")
        if answer.windows is not None:
            _print_windows(answer.windows, labels, options)


def _print_windows(windows: Timeline, labels: Sequence[str], options: ScoreOptions) -> None:
    for i, (name, p) in enumerate(_told(windows, labels, options)):
        sure = "" if name in NO_EMOTION else f"{p.max():.1%}"
        channel = "" if windows.channel[i] == "mix" else f"channel {windows.channel[i]}  "
        print(f"  {channel}{windows.start_s[i]:8.2f} - {windows.end_s[i]:8.2f} s  {name:<12} {sure:>10}".rstrip())


main = command(job, build_parser)


if __name__ == "__main__":
    raise SystemExit(main())
