"""Recordings for the tests of `pipeline.audio.load`: synthetic voices, encoded in every format."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.audio import load as audio
from pipeline.audio.load import Clip, load_middle
from tests.support.recordings import encode

Samples = npt.NDArray[np.float32]


class Format(NamedTuple):
    """A format that libsndfile writes. `error`: the largest one of a sample; None: a lossy codec."""

    container: str
    codec: str
    rate_hz: int
    channels: int
    error: float | None

    def encoded(self, samples: Samples) -> bytes:
        return encoded(samples, self.rate_hz, self.container, self.codec)

    def voice(self, duration_s: float) -> bytes:
        return self.encoded(voice(duration_s, self.rate_hz, self.channels))


_FORMATS = [
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
FORMATS = list(map(Format._make, _FORMATS))
AV_FORMATS = [("mp4", "aac", 44_100), ("webm", "libopus", 48_000), ("adts", "aac", 16_000)]
every_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: "-".join(map(str, form[:4])))


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
    """Of samples ``(n,)`` or ``(n, channels)``."""
    return encode(samples.reshape(len(samples), -1), rate_hz, container, codec)


def code_of(source: audio.AudioSource, call: Callable[..., object] = load_middle, **options: Any) -> str:
    with pytest.raises(audio.AudioError) as caught:
        call(source, **options)
    assert str(caught.value).isprintable(), "one line, nothing that a terminal would obey"
    return caught.value.code


def same_clip(one: Clip, other: Clip) -> bool:
    facts = ((clip.start_s, clip.scored_s, clip.info) for clip in (one, other))
    return len(set(facts)) == 1 and np.array_equal(one.samples, other.samples)


def riff(*chunks: tuple[bytes, bytes], tag: bytes = b"RIFF", pads: bool = True, outer: int | None = None) -> bytes:
    """A WAV of these chunks. `pads`: with a pad byte after odd ones; `outer`: what its header says of its length."""
    order = ">" if tag == b"RIFX" else "<"
    body = b"WAVE"
    for name, data in chunks:
        body += name + struct.pack(order + "I", len(data)) + data + b"\0" * (len(data) % 2 if pads else 0)
    return tag + struct.pack(order + "I", len(body) if outer is None else outer) + body


def fmt(
    *, tag: int = 1, channels: int = 1, rate_hz: int = 16_000, bits: int = 16, frame_bytes: int | None = None
) -> tuple[bytes, bytes]:
    """The format chunk of a WAV, for `riff`."""
    size = channels * bits // 8 if frame_bytes is None else frame_bytes
    return b"fmt ", struct.pack("<HHIIHH", tag, channels, rate_hz, rate_hz * size & 0xFFFF_FFFF, size, bits)


ONE_SECOND = encoded(voice(1.0, 16_000), 16_000)
