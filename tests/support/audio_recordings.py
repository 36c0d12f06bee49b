"""Recordings for the tests of `pipeline.audio.load`: synthetic voices, encoded in every format."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from pipeline.audio import load as audio
from pipeline.audio.load import load_middle

Samples = npt.NDArray[np.float32]

# container, codec, rate in Hz, channels, largest error of a sample (None: a lossy codec)
FORMATS = [
    ("WAV", "PCM_U8", 8_000, 1, 1 / 127),
    ("WAV", "PCM_16", 44_100, 2, 1 / 32767),
    ("WAV", "PCM_24", 48_000, 3, 1 / 2**22),
    ("WAV", "PCM_32", 96_000, 1, 1 / 2**22),
    ("WAV", "FLOAT", 22_050, 1, 0.0),
    ("WAV", "DOUBLE", 11_025, 2, 0.0),
    ("WAV", "ULAW", 8_000, 1, 0.02),
    ("WAV", "ALAW", 8_000, 2, 0.02),
    ("WAVEX", "PCM_16", 48_000, 8, 1 / 32767),
    ("WAVEX", "FLOAT", 192_000, 2, 0.0),
    ("RF64", "PCM_16", 48_000, 2, 1 / 32767),
    ("W64", "PCM_24", 44_100, 2, 1 / 2**22),
    ("AIFF", "PCM_16", 44_100, 1, 1 / 32767),
    ("AIFF", "FLOAT", 44_100, 2, 0.0),
    ("CAF", "PCM_16", 48_000, 1, 1 / 32767),
    ("CAF", "ALAW", 8_000, 1, 0.02),
    ("AU", "PCM_16", 16_000, 1, 1 / 32767),
    ("AU", "ULAW", 8_000, 1, 0.02),
    ("FLAC", "PCM_16", 48_000, 1, 1 / 32767),
    ("FLAC", "PCM_24", 96_000, 2, 1 / 2**22),
    ("OGG", "VORBIS", 44_100, 2, None),
    ("OGG", "OPUS", 48_000, 1, None),
    ("MP3", "MPEG_LAYER_III", 44_100, 2, None),
    ("MP3", "MPEG_LAYER_III", 16_000, 1, None),
]
AV_FORMATS = [("mp4", "aac", 44_100, "MP4"), ("webm", "libopus", 48_000, "WebM"), ("adts", "aac", 16_000, "AAC")]


@lru_cache(maxsize=64)
def voice(duration_s: float, rate_hz: int, channels: int = 1, seed: int = 0) -> Samples:
    """(frames, channels): a gliding tone with overtones, rising and falling, in noise; each channel another."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(duration_s * rate_hz)) / rate_hz
    loudness = 0.05 + 0.3 * np.sin(2.0 * np.pi * time_s) ** 2
    columns = []
    for channel in range(channels):
        phase = 2 * np.pi * (150 + 20 * channel) * (time_s + 0.02 * np.sin(4 * time_s))
        tones = np.sin(phase) + np.sin(3 * phase + 1) / 2 + np.sin(8 * phase + 2) / 4
        columns.append(loudness * (tones + 0.1 * rng.standard_normal(len(time_s))))
    samples = np.stack(columns, axis=1).astype(np.float32)
    samples.flags.writeable = False
    return samples


def encoded(samples: Samples, rate_hz: int, container: str = "WAV", codec: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    samples = samples.reshape(len(samples), -1)
    with soundfile.SoundFile(buffer, "w", rate_hz, samples.shape[1], codec, format=container) as file:
        for start in range(0, len(samples), 4096):  # all at once overflows the stack of the Vorbis encoder
            file.write(samples[start : start + 4096])
    return buffer.getvalue()


def encoded_av(samples: Samples, rate_hz: int, container: str, codec: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="fltp", layout="mono")
        frame.sample_rate = rate_hz
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            output.mux(packet)
    return buffer.getvalue()


def code_of(source: audio.AudioSource, call: Callable[..., object] = load_middle, **options: Any) -> str:
    with pytest.raises(audio.AudioError) as caught:
        call(source, **options)
    assert str(caught.value).isprintable(), "one line, nothing that a terminal would obey"
    return caught.value.code


ONE_SECOND = encoded(voice(1.0, 16_000), 16_000)
