"""Make the sample clips: synthetic speech by espeak-ng, one style an emotion, in several formats.

    python samples/make_samples.py            # writes beside this file; needs the program espeak-ng

The styles set what is known to carry emotion in a voice: pitch, its range, rate and loudness (Scherer 2003,
"Vocal communication of emotion"). They are caricatures: nobody felt anything, and no listener judged
them. One espeak-ng version gives the same samples nearly every time; another may speak a little differently.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
SENTENCES = {
    "kettle": "The kettle is on the stove again.",
    "window": "Somebody left the window open all night.",
    "letter": "There is a letter for you on the table.",
    "train": "The last train leaves in ten minutes.",
}
LEAD_S = 0.15  # silence before and after the words
_COLUMNS = ("speech", "label", "speaker", "sex", "statement", "corpus")


@dataclass(frozen=True)
class Style:
    """How an emotion is spoken: espeak-ng's pitch (0-99), pitch range (100: usual), words a minute, peak."""

    pitch: int
    range_percent: int
    rate_wpm: int
    peak_dbfs: float


STYLES = {
    "angry": Style(pitch=60, range_percent=170, rate_wpm=210, peak_dbfs=-0.5),
    "calm": Style(pitch=35, range_percent=70, rate_wpm=140, peak_dbfs=-14.0),
    "disgust": Style(pitch=25, range_percent=120, rate_wpm=130, peak_dbfs=-9.0),
    "fearful": Style(pitch=90, range_percent=140, rate_wpm=220, peak_dbfs=-8.0),
    "happy": Style(pitch=75, range_percent=180, rate_wpm=185, peak_dbfs=-4.0),
    "neutral": Style(pitch=45, range_percent=100, rate_wpm=165, peak_dbfs=-8.0),
    "sad": Style(pitch=25, range_percent=40, rate_wpm=125, peak_dbfs=-18.0),
    "surprised": Style(pitch=92, range_percent=198, rate_wpm=170, peak_dbfs=-3.0),
}


@dataclass(frozen=True)
class Voice:
    """A speaker: espeak-ng's voice and what the manifest says about it."""

    name: str
    sex: str


VOICES = {"anna": Voice("en-us+f3", "female"), "ben": Voice("en-gb+m3", "male")}


@dataclass(frozen=True)
class Recording:
    """One clip to make. ``pan`` places the voice of a stereo clip between left (0) and right (1)."""

    label: str
    speaker: str
    statement: str
    sample_rate_hz: int
    channels: int
    extension: str
    subtype: str
    pan: float = 0.5

    @property
    def file_name(self) -> str:
        """``anna_angry_kettle.wav``."""
        return f"{self.speaker}_{self.label}_{self.statement}.{self.extension}"


RECORDINGS = (
    Recording("angry", "anna", "window", 48_000, 2, "flac", "PCM_16", pan=0.35),
    Recording("angry", "ben", "kettle", 16_000, 1, "wav", "PCM_16"),
    Recording("calm", "anna", "letter", 44_100, 1, "flac", "PCM_16"),
    Recording("calm", "ben", "train", 8_000, 1, "wav", "ULAW"),
    Recording("disgust", "anna", "kettle", 32_000, 1, "ogg", "VORBIS"),
    Recording("fearful", "ben", "window", 22_050, 1, "flac", "PCM_16"),
    Recording("happy", "anna", "train", 44_100, 2, "ogg", "VORBIS", pan=0.6),
    Recording("happy", "ben", "letter", 11_025, 1, "wav", "PCM_U8"),
    Recording("neutral", "ben", "kettle", 48_000, 1, "flac", "PCM_24"),
    Recording("sad", "anna", "letter", 24_000, 1, "ogg", "VORBIS"),
    Recording("sad", "ben", "window", 12_000, 2, "wav", "PCM_16", pan=0.8),
    Recording("surprised", "anna", "kettle", 16_000, 1, "wav", "PCM_24"),
)


def speak(text: str, voice: str, style: Style) -> tuple[NDArray[np.float64], int]:
    """Words as mono samples ``(n,)`` of peak 1 or less, and their rate in Hz.

    Raises:
        subprocess.CalledProcessError: espeak-ng refused.
    """
    prosody = f'<speak><prosody range="{style.range_percent}%">{text}</prosody></speak>'
    command = [
        "espeak-ng",
        "--stdout",
        "-m",
        "-v",
        voice,
        "-p",
        str(style.pitch),
        "-s",
        str(style.rate_wpm),
        prosody,
    ]
    wav = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout
    # espeak-ng cannot know the length when it writes the header to a pipe; libsndfile reads to the end.
    samples, rate_hz = soundfile.read(io.BytesIO(wav), dtype="float64")
    return samples, rate_hz


def render(recording: Recording) -> NDArray[np.float64]:
    """The clip's samples, ``(n, channels)``, at its own rate, within -1..1."""
    style = STYLES[recording.label]
    spoken, rate_hz = speak(SENTENCES[recording.statement], VOICES[recording.speaker].name, style)
    mono = soxr.resample(spoken, rate_hz, recording.sample_rate_hz)
    mono *= 10.0 ** (style.peak_dbfs / 20.0) / np.abs(mono).max()
    mono = np.pad(mono, round(LEAD_S * recording.sample_rate_hz))
    if recording.channels == 1:
        return mono[:, np.newaxis]
    louder = max(recording.pan, 1.0 - recording.pan)
    return mono[:, np.newaxis] * (np.array([1.0 - recording.pan, recording.pan]) / louder)


def make(folder: Path) -> list[Path]:
    """Write every clip and ``metadata.csv`` into ``folder``; returns the clips in manifest order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for recording in RECORDINGS:
        path = folder / recording.file_name
        soundfile.write(path, render(recording), recording.sample_rate_hz, subtype=recording.subtype)
        paths.append(path)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(_COLUMNS)
        for r in RECORDINGS:
            rows.writerow((r.file_name, r.label, r.speaker, VOICES[r.speaker].sex, r.statement, "synthetic"))
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when every clip is written, 2 without espeak-ng."""
    parser = argparse.ArgumentParser(description="Make the sample clips with espeak-ng.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into (default: samples/)")
    out = parser.parse_args(argv).out
    if shutil.which("espeak-ng") is None:
        parser.error("no program espeak-ng found; install it, for example with: apt-get install espeak-ng")
    for path in make(out):
        info = soundfile.info(path)
        size_kb = path.stat().st_size // 1000
        print(f"{path}  {info.duration:.1f} s  {info.samplerate} Hz  {info.channels} ch  {size_kb} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
