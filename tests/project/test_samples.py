"""The committed sample clips: what they are, and that the script beside them makes them."""

from __future__ import annotations

import csv
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from pipeline.data.labels import RAVDESS_LABELS
from pipeline.data.manifest import read_manifest

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs the program espeak-ng")
with (SAMPLES / "metadata.csv").open(encoding="utf-8", newline="") as table:
    ROWS = list(csv.DictReader(table))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_samples", SAMPLES / "make_samples.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_manifest_lists_every_clip_and_they_are_short_small_and_varied() -> None:
    on_disk = {path.name for path in SAMPLES.iterdir() if path.suffix in {".wav", ".flac", ".ogg"}}
    assert {row["speech"] for row in ROWS} == on_disk
    assert len(ROWS) == len(on_disk) >= 8
    assert {row["label"] for row in ROWS} == set(RAVDESS_LABELS)
    assert {row["corpus"] for row in ROWS} == {"synthetic"}
    assert read_manifest(SAMPLES / "metadata.csv")["label"].tolist() == [row["label"] for row in ROWS]
    infos = [soundfile.info(SAMPLES / row["speech"]) for row in ROWS]
    assert all(1.5 <= info.duration <= 4.0 for info in infos)
    rates_hz = {info.samplerate for info in infos}
    assert len(rates_hz) >= 6
    assert (min(rates_hz), max(rates_hz)) == (8_000, 48_000)
    assert {info.channels for info in infos} == {1, 2}
    assert {info.format for info in infos} == {"WAV", "FLAC", "OGG"}
    assert sum(path.stat().st_size for path in SAMPLES.iterdir() if path.is_file()) < 1_500_000


def test_clips_hold_sound_with_quiet_ends_and_the_loudness_of_their_style(maker: ModuleType) -> None:
    for row in ROWS:
        samples, rate_hz = soundfile.read(SAMPLES / row["speech"], always_2d=True)
        edge = round(0.1 * rate_hz)
        peak = np.abs(samples).max()
        assert np.abs([*samples[:edge], *samples[-edge:]]).max() < 0.05 * peak, row["speech"]
        wanted_dbfs = maker.STYLES[row["label"]].peak_dbfs
        assert 20 * np.log10(peak) == pytest.approx(wanted_dbfs, abs=1.0), row["speech"]


@needs_espeak
def test_the_script_makes_the_clips_again(tmp_path: Path) -> None:
    command = [sys.executable, str(SAMPLES / "make_samples.py"), "--out", str(tmp_path / "made")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert len(printed.splitlines()) == len(ROWS)
    assert (tmp_path / "made/metadata.csv").read_bytes() == (SAMPLES / "metadata.csv").read_bytes()
    for row in ROWS:
        committed, made = (soundfile.info(folder / row["speech"]) for folder in (SAMPLES, tmp_path / "made"))
        assert (made.samplerate, made.channels) == (committed.samplerate, committed.channels)
        # Another version of espeak-ng may speak a little faster or slower than the one behind the committed clips.
        assert made.duration == pytest.approx(committed.duration, rel=0.15)


@needs_espeak
def test_a_style_is_heard(maker: ModuleType) -> None:
    def pitch_hz_and_duration_s(label: str) -> tuple[float, float]:
        """The median pitch by autocorrelation, of the half of the 40-ms frames that is loudest."""
        samples, rate_hz = maker.speak(maker.SENTENCES["kettle"], "en-us+f3", maker.STYLES[label])
        size, shortest, longest = rate_hz // 25, rate_hz // 600, rate_hz // 60
        frames = samples[: len(samples) // size * size].reshape(-1, size)
        energy = (frames**2).sum(axis=1)
        loud = frames[energy >= np.median(energy)]
        lags = np.fft.irfft(np.abs(np.fft.rfft(loud, 2 * size)) ** 2)[:, shortest:longest]
        return float(np.median(rate_hz / (lags.argmax(axis=1) + shortest))), len(samples) / rate_hz

    fearful, sad = pitch_hz_and_duration_s("fearful"), pitch_hz_and_duration_s("sad")
    assert fearful[0] > 1.5 * sad[0]
    assert sad[1] > 1.5 * fearful[1]
