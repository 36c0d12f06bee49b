"""Compare the time from a file to its log-mel features with plain librosa calls, on one core.

    python -m benchmarks.bench_features [--data_dir RAVDESS]

Three cases, middle 2 s of each: 48 kHz clips of a few seconds (RAVDESS ones with --data_dir, else synthetic), and one
10-minute 44.1 kHz stereo recording as WAV and as FLAC. "Plain" is `librosa.load(sr=48000)`, the middle cut out,
`librosa.feature.melspectrogram`, `librosa.power_to_db(ref=np.max)` and the same standardisation. The two sides take
turns; a figure is the median over the turns. Both are warmed up, and their features compared, before the measurement.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # before the imports that read them
    os.environ |= dict.fromkeys([f"{of}_NUM_THREADS" for of in ("OMP", "OPENBLAS", "MKL", "NUMBA")], "1")

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import librosa
import numpy as np
import numpy.typing as npt
import soundfile

from benchmarks.common import in_turns, timed
from pipeline.audio.load import load_middle
from pipeline.features.features import FeatureConfig, log_mel
from tests.support.processes import machine
from tests.support.recordings import synthetic_speech

Picture = npt.NDArray[np.float32]
CONFIG = FeatureConfig()
WANTED = {"48 kHz clip": 2.5, "10 min WAV, 44.1 kHz stereo": 30.0, "10 min FLAC, 44.1 kHz stereo": 20.0}


def ours(path: Path) -> Picture:
    clip = load_middle(path, window_s=CONFIG.window_s, sample_rate_hz=CONFIG.sample_rate_hz)
    return log_mel(clip.samples, CONFIG)


def plain(path: str | Path, config: FeatureConfig = CONFIG) -> Picture:
    """Log-mel features by plain librosa calls."""
    samples, rate_hz = librosa.load(path, sr=config.sample_rate_hz)
    samples = librosa.util.pad_center(samples, size=max(len(samples), config.window_samples))
    start = (len(samples) - config.window_samples) // 2
    window = samples[start : start + config.window_samples]
    power = librosa.feature.melspectrogram(
        y=window, sr=rate_hz, n_fft=config.n_fft, hop_length=config.hop_length, n_mels=config.n_mels
    )
    decibel = librosa.power_to_db(power, ref=np.max, top_db=config.top_db)
    return ((decibel - decibel.mean()) / (decibel.std() + 1e-6))[np.newaxis].astype(np.float32)


def compare(case: str, paths: Sequence[Path], turns: int) -> bool:
    """Measure and print one case; True where it reaches its target."""
    difference = max(float(np.abs(ours(path) - plain(path)).max()) for path in paths[:5])
    sides = {side.__name__: lambda side=side: timed(lambda: list(map(side, paths))) for side in (ours, plain)}
    times_s = in_turns(sides, turns)
    ours_s, plain_s = (statistics.median(found) / len(paths) for found in times_s.values())
    ratio = plain_s / ours_s
    verdict = "reached" if ratio >= WANTED[case] else "MISSED"
    figures = f"{plain_s * 1e3:10.2f} {ours_s * 1e3:10.2f} {ratio:7.1f}x {WANTED[case]:6.1f}x {verdict:8s}"
    print(f"{case:30s} {figures} {difference:9.1e} {len(paths):6d} x {turns}", flush=True)
    return ratio >= WANTED[case]


def clips(data_dir: Path | None, folder: Path, count: int) -> list[Path]:
    """`count` WAV clips: evenly spread over those in `data_dir`, or synthetic ones of 3 to 4 s."""
    if data_dir:
        found = sorted(data_dir.rglob("*.wav")) or sorted(data_dir.rglob("*.flac"))
        if not found:
            raise SystemExit(f"{data_dir}: no WAV or FLAC file below it. Give the folder of the recordings.")
        return found[:: max(len(found) // count, 1)][:count]
    paths = [folder / f"clip{index}.wav" for index in range(count)]
    for index, path in enumerate(paths):
        soundfile.write(path, synthetic_speech(3.0 + index / count, 48_000, seed=index), 48_000, "PCM_16")
    return paths


def main() -> int:
    """Parse the command line, measure, print; 0 where every case reaches its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", "--data-dir", type=Path, help="folder of 48 kHz recordings; default: synthetic")
    parser.add_argument("--clips", type=int, default=24, help="short clips per turn (default 24)")
    parser.add_argument("--turns", type=int, default=7, help="number of turns (default 7)")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core for both sides
    print(f"{machine()}; pinned to one CPU")
    print(f"{'middle 2 s -> log-mel':30s} {'plain ms':>10s} {'ours ms':>10s} {'faster':>8s} {'wanted':>7s}", end="")
    print(f" {'':8s} {'max diff':>9s} {'files x turns':>13s}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reached = [compare("48 kHz clip", clips(args.data_dir, folder, args.clips), args.turns)]
        for extension in ("wav", "flac"):
            path = folder / f"long.{extension}"
            with soundfile.SoundFile(path, "w", 44_100, 2, "PCM_16") as file:
                for minute in range(10):
                    file.write(synthetic_speech(60.0, 44_100, 2, seed=minute))
            reached.append(compare(f"10 min {extension.upper()}, 44.1 kHz stereo", [path], args.turns))
    return 0 if all(reached) else 1


if __name__ == "__main__":
    raise SystemExit(main())
