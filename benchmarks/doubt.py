"""Measure a model's answers to sounds without speech, and to a corpus outside its training.

    python -m benchmarks.doubt --data_csv other_corpus.csv --sounds FOLDER --known_csv trained_on.csv

For synthetic sounds (tones, beeps, noise, clicks, hum) and the recordings of ``--sounds`` it prints the shares of
not_speech, uncertain, silence and too short, with ``--min_confidence auto``. For the labelled recordings of
``--data_csv`` it also prints coverage, accuracy, accuracy of the answered ones, and wrong answers with a confidence of
0.8 or more. With ``--known_csv`` it adds how well ``familiarity`` separates each set from recordings like those of the
training: the area under the ROC curve.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from pipeline.audio.source import EXTENSIONS
from pipeline.data.manifest import read_manifest
from pipeline.inference.predictor import Prediction, Predictor
from pipeline.inference.timeline import SURE_ENOUGH
from pipeline.storage.files import scan
from tests.support.recordings import encode

RATE_HZ, SECONDS = 48_000, 2
NO_ANSWER = ("not_speech", "uncertain", "silence", "too_short")


def synthetic(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Sounds without a voice, ``(samples,)`` each."""
    n = RATE_HZ * SECONDS
    t = np.arange(n) / RATE_HZ
    noise = rng.standard_normal(n)
    spectrum, frequency = np.fft.rfft(noise), np.maximum(np.fft.rfftfreq(n, 1 / RATE_HZ), 20)
    clicks = np.zeros(n)
    clicks[rng.integers(0, n, 40)] = 1
    ring = np.exp(-np.arange(500) / 60) * np.sin(0.3 * np.arange(500))
    found = {f"tone of {hz} Hz": np.sin(2 * np.pi * hz * t) for hz in (100, 220, 440, 1000, 3000)}
    found |= {f"sawtooth of {hz} Hz": (t * hz) % 1 - 0.5 for hz in (80, 150, 300)}
    found |= {f"noise, {e:g}": np.fft.irfft(spectrum / frequency**e, n) for e in (0.0, 0.5, 1.0)}
    found |= {f"{k} beeps a second": np.sin(2 * np.pi * 900 * t) * ((t * k) % 1 < 0.3) for k in (1, 2, 4)}
    found |= {"clicks": np.convolve(clicks, ring)[:n], "sweep": np.sin(2 * np.pi * (200 * t + 400 * t**2))}
    found |= {"hum": sum(np.sin(100 * np.pi * m * t) / m for m in range(1, 9)) + 0.02 * noise}
    return {name: (0.3 * x / np.abs(x).max()).astype(np.float32) for name, x in found.items()}


def told(predictions: Sequence[Prediction]) -> list[str]:
    """The answer to each recording, with ``--min_confidence auto``."""
    return [p.label(SURE_ENOUGH) or p.status for p in predictions]


def familiarity(predictions: Sequence[Prediction]) -> NDArray[np.float64]:
    """Familiarities of the recordings that could be analysed."""
    return np.array([p.familiarity for p in predictions if p.ok])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_weights", type=Path)
    parser.add_argument("--data_csv", type=Path, nargs="+", default=[], help="labelled recordings of other corpora")
    parser.add_argument("--known_csv", type=Path, nargs="+", default=[], help="recordings of corpora of the training")
    parser.add_argument("--sounds", type=Path, help="folder of recordings without speech")
    parser.add_argument("--sample", type=int, default=300, help="recordings of each table, drawn at random")
    arguments = parser.parse_args()
    predictor, rng = Predictor.from_bundle(arguments.model_weights), np.random.default_rng(0)

    def read(csv: Path) -> tuple[pd.DataFrame, list[Prediction]]:
        table = read_manifest(csv)
        table = table.iloc[np.sort(rng.permutation(len(table))[: arguments.sample])]
        return table, predictor.predict(list(table["speech"]))

    sounds = {
        "synthetic": predictor.predict([encode(x[:, None], RATE_HZ, "WAV", "PCM_16") for x in synthetic(rng).values()])
    }
    if arguments.sounds:
        paths = scan(arguments.sounds, EXTENSIONS).files
        drawn = rng.permutation(len(paths))[: arguments.sample]
        sounds[arguments.sounds.name] = predictor.predict([paths[i] for i in drawn])
    others = {csv.stem: read(csv) for csv in arguments.data_csv}
    known = np.concatenate([[], *(familiarity(read(csv)[1]) for csv in arguments.known_csv)])
    for name, found in [*sounds.items(), *((name, found) for name, (_, found) in others.items())]:
        counts = Counter(told(found))
        none = sum(counts[label] for label in NO_ANSWER)
        shares = ", ".join(f"{label} {counts[label] / len(found):.1%}" for label in NO_ANSWER)
        line = f"{name}: {len(found)} recordings; {shares}; an emotion {1 - none / len(found):.1%}"
        if len(known):
            these = familiarity(found)
            truth = np.r_[np.ones(len(known)), np.zeros(len(these))]
            line += f"; AUROC of familiarity {roc_auc_score(truth, np.r_[known, these]):.3f}"
        print(line)
    for name, (table, found) in others.items():
        labels = table["label"]
        answered = np.array([label not in NO_ANSWER and p.ok for label, p in zip(told(found), found, strict=True)])
        right = np.array([p.predicted == label for p, label in zip(found, labels, strict=True)])
        wrong = np.array([p.confidence >= 0.8 for p in found]) & ~right
        coverage, accuracy = answered.mean(), f"{right.mean():.1%}, of the answered {right[answered].mean():.1%}"
        sure = f"{wrong.mean():.1%}, of the answered {wrong[answered].mean():.1%}"
        print(f"{name}: coverage {coverage:.1%}, accuracy {accuracy}; wrong with 0.8 or more {sure}")


if __name__ == "__main__":
    main()
