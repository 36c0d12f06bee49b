"""Measure the share of unchanged labels, and the accuracy, after small changes of the sound.

    python -m benchmarks.robustness --data_csv test.csv [--model_weights BUNDLE] [--limit N] [--seed 0]

Each recording is decoded as a whole, changed, written as 16-bit WAV at its own sample rate (or as MP3), and classified
by the Predictor. Noise is white, at the given ratio to the recording's level.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray
from scipy.signal import butter, sosfiltfilt

from pipeline.audio.load import load, probe
from pipeline.data.manifest import read_manifest
from pipeline.inference.predictor import Predictor
from tests.support.recordings import encode

Samples = NDArray[np.float32]
AIM = 0.95
_BATCH = 32


def gain(samples: Samples, db: float) -> Samples:
    """Change the level; values beyond 16 bits are clipped."""
    return np.asarray(samples * 10 ** (db / 20), np.float32)


def shifted(samples: Samples, rate_hz: int, shift_s: float) -> Samples:
    """Delay by ``shift_s`` and cut off the end."""
    n = round(shift_s * rate_hz)
    return np.concatenate([np.zeros(n, np.float32), samples[:-n]])


def noisy(samples: Samples, snr_db: float, seed: int) -> Samples:
    """Add white noise at ``snr_db`` below the recording's RMS."""
    rms = float(np.sqrt(np.mean(np.square(samples), dtype=np.float64)))
    noise = np.random.default_rng(seed).standard_normal(len(samples))
    return np.asarray(samples + noise * rms * 10 ** (-snr_db / 20), np.float32)


def through_rate(samples: Samples, rate_hz: int, narrow_hz: int) -> Samples:
    """Resample down to ``narrow_hz`` and back."""
    return np.asarray(soxr.resample(soxr.resample(samples, rate_hz, narrow_hz), narrow_hz, rate_hz), np.float32)


def telephone(samples: Samples, rate_hz: int) -> Samples:
    """Keep the band from 300 to 3400 Hz."""
    band = butter(4, (300, 3400), "bandpass", fs=rate_hz, output="sos")
    return np.asarray(sosfiltfilt(band, samples), np.float32)


def encoded(samples: Samples, rate_hz: int, container: str) -> bytes:
    """The bytes of a WAV (16 bit) or MP3 (about 128 kbit/s) file."""
    clipped = np.clip(samples, -1, 32767 / 32768)
    if container == "WAV":
        return encode(clipped[:, np.newaxis], rate_hz, "WAV", "PCM_16")
    buffer = io.BytesIO()
    soundfile.write(buffer, clipped, rate_hz, format="MP3", bitrate_mode="CONSTANT", compression_level=0.65)
    return buffer.getvalue()


def changes(seed: int) -> dict[str, Callable[[Samples, int], bytes]]:
    """Name of each change -> function that makes the changed file of a recording."""

    def wav(change: Callable[[Samples, int], Samples]) -> Callable[[Samples, int], bytes]:
        return lambda samples, rate_hz: encoded(change(samples, rate_hz), rate_hz, "WAV")

    return {
        "gain -6 dB": wav(lambda s, _: gain(s, -6)),
        "gain +6 dB": wav(lambda s, _: gain(s, 6)),
        "10 ms later": wav(lambda s, r: shifted(s, r, 0.010)),
        "white noise, 30 dB SNR": wav(lambda s, _: noisy(s, 30, seed)),
        "16 kHz and back": wav(lambda s, r: through_rate(s, r, 16_000)),
        "MP3 128k": lambda s, r: encoded(s, r, "MP3"),
        "telephone band": wav(telephone),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_csv", type=Path, required=True)
    parser.add_argument("--model_weights", help="default: the shipped bundle")
    parser.add_argument("--limit", type=int, help="number of recordings, spread evenly over the table")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    predictor = Predictor.from_bundle(arguments.model_weights)
    table = read_manifest(arguments.data_csv, labels=predictor.labels)
    if arguments.limit:
        table = table.iloc[np.linspace(0, len(table) - 1, min(arguments.limit, len(table))).astype(int)]
    rates = {path: probe(path).sample_rate_hz for path in table["speech"]}
    sounds = [(load(path, sample_rate_hz=rates[path]).samples, rates[path]) for path in table["speech"]]
    truth = table["label"].to_numpy()

    def answers(make: Callable[[Samples, int], bytes]) -> NDArray[np.object_]:
        found: list[str | None] = []
        for i in range(0, len(sounds), _BATCH):
            found += [p.predicted for p in predictor.predict([make(s, r) for s, r in sounds[i : i + _BATCH]])]
        return np.array(found, dtype=object)

    before = answers(lambda s, r: encoded(s, r, "WAV"))
    print(f"{predictor.bundle.name} {predictor.bundle.weights_sha256[:12]}, {len(sounds)} recordings")
    print(f"{'change':<26}{'unchanged labels':>18}{'accuracy':>10}")
    print(f"{'none':<26}{'':>18}{np.mean(before == truth):>10.1%}")
    for name, make in changes(arguments.seed).items():
        after = answers(make)
        print(f"{name:<26}{np.mean(after == before):>18.1%}{np.mean(after == truth):>10.1%}", flush=True)
    print(f"aim: at least {AIM:.0%} unchanged for the first five")


if __name__ == "__main__":
    main()
