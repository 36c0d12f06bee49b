"""A copy of each recording in another voice: does a model that hears these too know voices never heard better?

    pip install pyworld
    python -m benchmarks.other_voices --data_csv metadata.csv --out voices   # writes voices/metadata.csv
    ser extract --data_csv voices/metadata.csv --window_s 3 --hop_length 768 --out voices/features
    python -m benchmarks.gpu_lab pack --features FEATURES --copies voices/features --out lab.npz

WORLD (Morise, Yokomori & Ozawa 2016) takes speech apart into pitch, spectral envelope and aperiodicity, and puts it
together again; in between, each is changed by a factor of its own. One set of factors a recording, from its name.
On RAVDESS it did not help (docs/LAB_LOG.md, experiment 35). The augmentation `pitch` of `benchmarks.gpu_lab` takes the
copies. A third of a second of one CPU a second of sound. Limits: one voice at a time; pitch between 65 and 800 Hz.
"""

from __future__ import annotations

import argparse
import math
import os
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from numpy.typing import NDArray

MAX_FORMANTS, MAX_SEMITONES, MAX_BREATH = 0.2, 4.0, 0.25


@dataclass(frozen=True)
class Voice:
    """Factors: of all formants, of the pitch, and the power of the aperiodicity (below 1: breathier)."""

    formants: float
    pitch: float
    breath: float

    @classmethod
    def of(cls, stem: str) -> Voice:
        """Drawn from a recording's name: symmetric in the logarithm."""
        u = np.random.default_rng(zlib.crc32(stem.encode())).uniform(-1, 1, 3)
        return cls(
            float(np.exp(u[0] * math.log(1 + MAX_FORMANTS))),
            float(2 ** (u[1] * MAX_SEMITONES / 12)),
            float(np.exp(u[2] * math.log(1 + MAX_BREATH))),
        )


def moved(spectra: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    """Spectra (frames, bins) with what was at f Hz at ``factor`` times f Hz, interpolated between bins."""
    bins = np.arange(spectra.shape[1])
    return np.ascontiguousarray([np.interp(bins / factor, bins, row) for row in spectra])


def spoken_by(samples: NDArray[np.float64], rate_hz: int, voice: Voice) -> NDArray[np.float64]:
    """Mono samples (n,) in another voice: (n,) or a few less."""
    import pyworld

    pitch_hz, times = pyworld.dio(samples, rate_hz, f0_floor=65, f0_ceil=800)
    pitch_hz = pyworld.stonemask(samples, pitch_hz, times, rate_hz)
    envelope = np.exp(moved(np.log(pyworld.cheaptrick(samples, pitch_hz, times, rate_hz)), voice.formants))
    breath = moved(pyworld.d4c(samples, pitch_hz, times, rate_hz), voice.formants)
    breath = np.clip(breath, 1e-6, 1) ** voice.breath
    made: NDArray[np.float64] = pyworld.synthesize(pitch_hz * voice.pitch, envelope, breath, rate_hz)
    return made[: len(samples)]


def write_copy(source: str, out: Path) -> str:
    """Write a recording in another voice below ``out``, as FLAC; its path."""
    samples, rate_hz = soundfile.read(source, dtype="float64", always_2d=True)
    made = spoken_by(np.ascontiguousarray(samples.mean(axis=1)), rate_hz, Voice.of(Path(source).stem))
    target = out / Path(source).parent.name / f"{Path(source).stem}.flac"
    target.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(target, made * min(1.0, 0.99 / max(np.abs(made).max(), 1e-9)), rate_hz, subtype="PCM_16")
    return str(target)


def main() -> None:
    """Write the copies and their manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_csv", type=Path, required=True, help="manifest with absolute paths, as ser manifest writes"
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    table = pd.read_csv(arguments.data_csv, dtype=str, keep_default_na=False)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        paths = list(pool.map(write_copy, table["speech"], [arguments.out.absolute()] * len(table), chunksize=4))
    table.assign(speech=paths).to_csv(arguments.out / "metadata.csv", index=False)


if __name__ == "__main__":
    main()
