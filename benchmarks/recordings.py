"""Synthetic recordings in every format, for the fuzz run and the benchmarks: no data needed, the same each time."""

from __future__ import annotations

import importlib.util
import io

import numpy as np
import numpy.typing as npt
import soundfile

Samples = npt.NDArray[np.float32]

# container, codec (soundfile's words), rate in Hz, channels, extension
_SNDFILE = [
    ("WAV", "PCM_U8", 8_000, 1, "wav"),
    ("WAV", "PCM_16", 48_000, 1, "wav"),
    ("WAV", "PCM_24", 44_100, 2, "wav"),
    ("WAV", "PCM_32", 96_000, 1, "wav"),
    ("WAV", "FLOAT", 44_100, 2, "wav"),
    ("WAV", "DOUBLE", 16_000, 1, "wav"),
    ("WAV", "ULAW", 8_000, 1, "wav"),
    ("WAV", "ALAW", 8_000, 2, "wav"),
    ("WAVEX", "PCM_16", 48_000, 6, "wav"),
    ("RF64", "PCM_16", 48_000, 2, "wav"),
    ("W64", "PCM_24", 44_100, 1, "w64"),
    ("AIFF", "PCM_16", 44_100, 2, "aiff"),
    ("AIFF", "FLOAT", 22_050, 1, "aiff"),
    ("CAF", "PCM_16", 48_000, 1, "caf"),
    ("AU", "PCM_16", 11_025, 1, "au"),
    ("AU", "ULAW", 8_000, 1, "au"),
    ("FLAC", "PCM_16", 48_000, 1, "flac"),
    ("FLAC", "PCM_24", 44_100, 2, "flac"),
    ("OGG", "VORBIS", 44_100, 2, "ogg"),
    ("OGG", "VORBIS", 16_000, 1, "oga"),
    ("OGG", "OPUS", 48_000, 1, "opus"),
    ("MP3", "MPEG_LAYER_III", 44_100, 2, "mp3"),
    ("MP3", "MPEG_LAYER_III", 16_000, 1, "mp3"),
]
_AV = [("mp4", "aac", 44_100, "m4a"), ("webm", "libopus", 48_000, "webm"), ("adts", "aac", 16_000, "aac")]


def synthetic_speech(duration_s: float, rate_hz: int, channels: int = 1, *, seed: int = 0) -> Samples:
    """Voiced syllables of a gliding pitch over faint noise, float32 (frames, channels), within +-1."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(duration_s * rate_hz)) / rate_hz
    phase = 2 * np.pi * 140.0 * (time_s + 0.05 * np.sin(2 * np.pi * 0.7 * time_s))
    voiced = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 12))
    syllables = np.clip(np.sin(2 * np.pi * 3.0 * time_s), 0.0, None)
    mono = 0.2 * voiced * syllables + 0.003 * rng.standard_normal(len(time_s))
    return np.stack([mono * 0.9**channel for channel in range(channels)], axis=1).astype(np.float32)


def encode(samples: Samples, rate_hz: int, container: str, codec: str) -> bytes:
    """A file's bytes. Written in parts: libsndfile's Vorbis encoder overflows the stack on large ones."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate_hz, samples.shape[1], codec, format=container) as file:
        for start in range(0, len(samples), 4096):
            file.write(samples[start : start + 4096])
    return buffer.getvalue()


def every_format(duration_s: float = 2.5) -> dict[str, bytes]:
    """File name -> bytes of a recording, one for each container and codec that can be written here."""
    files = {}
    for container, codec, rate_hz, channels, extension in _SNDFILE:
        samples = synthetic_speech(duration_s, rate_hz, channels)
        files[f"{container}_{codec}_{rate_hz}_{channels}.{extension}"] = encode(samples, rate_hz, container, codec)
    silence = np.zeros((60 * 16_000, 1), np.float32)
    files["FLAC_minute_of_silence.flac"] = encode(silence, 16_000, "FLAC", "PCM_16")
    files["MP3_without_Xing.mp3"] = _without_xing(encode(synthetic_speech(3, 44_100), 44_100, "MP3", "MPEG_LAYER_III"))
    files["FLAC_of_unknown_length.flac"] = _without_length(files["FLAC_PCM_16_48000_1.flac"])
    if importlib.util.find_spec("av"):
        for container, codec, rate_hz, extension in _AV:
            name = f"{container}_{codec}_{rate_hz}.{extension}"
            files[name] = _encode_av(synthetic_speech(duration_s, rate_hz), rate_hz, container, codec)
    return files


def _without_xing(mp3: bytes) -> bytes:
    first_frame = mp3.find(b"Info") if b"Info" in mp3[:4096] else mp3.find(b"Xing")
    return mp3[mp3.find(mp3[:2], first_frame) :]


def _without_length(flac: bytes) -> bytes:
    head = bytearray(flac[:26])
    head[21] &= 0xF0  # STREAMINFO ends its 36-bit number of samples here
    head[22:26] = bytes(4)
    return bytes(head) + flac[26:]


def _encode_av(samples: Samples, rate_hz: int, container: str, codec: str) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples.T.copy(), format="fltp", layout="mono")
        frame.sample_rate = rate_hz
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            output.mux(packet)
    return buffer.getvalue()
