"""One or a few recordings -> emotions, at once: no Ray, and no PyTorch where ONNX Runtime serves the model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs._common import EXIT_DONE, EXIT_SOME_FAILED, Parser, run, say
from pipeline.backends import BACKENDS
from pipeline.predictor import Prediction, Predictor

STDIN = "-"


def build_parser() -> Parser:
    """The options of this job."""
    parser = Parser(
        prog="python -m jobs.infer",
        description=__doc__,
        epilog="example: python -m jobs.infer --model_weights runs/first --file a.wav b.flac",
    )
    parser.add_argument("--model_weights", type=Path, help="bundle folder or the .pt in it (default: the shipped one)")
    parser.add_argument("--file", nargs="+", required=True, metavar="FILE", help="recordings; - reads one from stdin")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--crops", type=int, help="windows a recording, evenly spaced (default: the bundle's number)")
    parser.add_argument(
        "--min_confidence", type=float, default=0.0, help="answers below it become 'uncertain' (default 0)"
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what runs the network (default auto)")
    parser.add_argument("--device", default="cpu", help="cpu, or a PyTorch device such as cuda (default cpu)")
    parser.add_argument("--threads", type=int, help="math threads (default: all CPUs)")
    return parser


def job(arguments: argparse.Namespace) -> int:
    """Predict, print; 4 when a recording could not be used."""
    predictor = Predictor.from_bundle(
        arguments.model_weights,
        backend=arguments.backend,
        device=arguments.device,
        threads=arguments.threads,
        crops=arguments.crops,
    )
    names: list[str] = arguments.file
    predictions = predictor.predict([sys.stdin.buffer.read() if name == STDIN else name for name in names])
    if arguments.json:
        answers = [
            as_json(name, prediction, predictor.labels, arguments.min_confidence)
            for name, prediction in zip(names, predictions, strict=True)
        ]
        print(json.dumps(answers, indent=2, ensure_ascii=True, allow_nan=False))
    else:
        print_table(names, predictions, predictor.labels, arguments.min_confidence)
    return EXIT_DONE if all(prediction.ok for prediction in predictions) else EXIT_SOME_FAILED


def as_json(name: str, prediction: Prediction, labels: Sequence[str], min_confidence: float) -> dict[str, Any]:
    """One answer, plain values; what is not known is null."""
    answer: dict[str, Any] = {"file": name, "status": prediction.status, "error": prediction.error}
    answer["predicted"] = prediction.label(min_confidence)
    if prediction.ok:
        answer |= {
            "confidence": prediction.confidence,
            "probabilities": dict(zip(labels, prediction.probabilities.tolist(), strict=True)),
            "entropy": prediction.entropy,
            "margin": prediction.margin,
            "scored_s": prediction.scored_s,
        }
    if math.isfinite(prediction.duration_s):
        answer |= {
            "duration_s": prediction.duration_s,
            "sample_rate_hz": prediction.sample_rate_hz,
            "channels": prediction.channels,
        }
    return answer


def print_table(
    names: Sequence[str], predictions: Sequence[Prediction], labels: Sequence[str], min_confidence: float
) -> None:
    """File, label, confidence and the runner-up, one line a recording; errors go to stderr."""
    shown = [name.encode("utf-8", "backslashreplace").decode("utf-8").replace("\n", "\\n") for name in names]
    width = max(len("file"), *map(len, shown))
    print(f"{'file':<{width}}  {'emotion':<12} {'confidence':>10}  then")
    for name, prediction in zip(shown, predictions, strict=True):
        if not prediction.ok:
            print(f"{name:<{width}}  {prediction.status}")
            say(f"{prediction.error}")
            continue
        order = prediction.probabilities.argsort()[::-1]
        then = ", ".join(f"{labels[i]} {prediction.probabilities[i]:.1%}" for i in order[1:3])
        print(f"{name:<{width}}  {prediction.label(min_confidence):<12} {prediction.confidence:>10.1%}  {then}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job."""
    return run(job, build_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
