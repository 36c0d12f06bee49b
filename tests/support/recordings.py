"""Synthetic recordings in every format, for tests, the fuzz run and benchmarks: no data needed, the same each time."""

from __future__ import annotations

import io

import av
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
    ("WAV", "IMA_ADPCM", 8_000, 1, "wav"),
    ("WAV", "MS_ADPCM", 8_000, 2, "wav"),
    ("WAV", "GSM610", 8_000, 1, "wav"),
    ("NIST", "PCM_16", 16_000, 1, "sph"),
    ("NIST", "ULAW", 8_000, 1, "nist"),
    ("CAF", "ALAC_16", 44_100, 1, "caf"),
    ("VOC", "PCM_16", 16_000, 1, "voc"),
]
# container, codec (FFmpeg's names), rate in Hz, ending, what we call the container
FFMPEG = [
    ("ipod", "aac", 16_000, "m4a", "MP4"),
    ("ipod", "alac", 44_100, "m4a", "MP4"),
    ("mp4", "aac", 48_000, "mp4", "MP4"),
    ("3gp", "aac", 16_000, "3gp", "MP4"),
    ("mov", "pcm_s16le", 44_100, "mov", "MP4"),
    ("mov", "adpcm_ima_qt", 44_100, "qt", "MP4"),
    ("webm", "libopus", 48_000, "webm", "WebM"),
    ("webm", "libopus", 16_000, "weba", "WebM"),
    ("asf", "wmav2", 44_100, "wma", "ASF"),
    ("asf", "wmav1", 22_050, "asf", "ASF"),
    ("avi", "libmp3lame", 44_100, "avi", "AVI"),
    ("avi", "pcm_s16le", 16_000, "avi", "AVI"),
    ("flv", "libmp3lame", 44_100, "flv", "FLV"),
    ("mpegts", "mp2", 44_100, "ts", "MPEG-TS"),
    ("mpeg", "mp2", 48_000, "mpg", "MPEG"),
    ("mp2", "mp2", 44_100, "mp2", "MPEG audio"),
    ("ac3", "ac3", 48_000, "ac3", "AC-3"),
    ("eac3", "eac3", 48_000, "eac3", "AC-3"),
    ("adts", "aac", 16_000, "aac", "AAC"),
    ("wav", "libmp3lame", 44_100, "wav", "WAV"),
    ("wav", "g722", 16_000, "wav", "WAV"),
    ("wav", "g726", 8_000, "wav", "WAV"),
    ("wav", "wmav2", 44_100, "wav", "WAV"),
    ("w64", "adpcm_ima_wav", 8_000, "w64", "W64"),
    ("aiff", "adpcm_ima_qt", 44_100, "aifc", "AIFF"),
    ("caf", "alac", 44_100, "caf", "CAF"),
    ("caf", "adpcm_ima_qt", 44_100, "caf", "CAF"),
    ("wv", "wavpack", 44_100, "wv", "WavPack"),
    ("tta", "tta", 44_100, "tta", "TTA"),
    ("voc", "pcm_u8", 8_000, "voc", "VOC"),
    ("latm", "aac", 16_000, "loas", "AAC"),
    ("rm", "real_144", 8_000, "ra", "RealMedia"),
    ("au", "g726le", 8_000, "au", "AU"),
]


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
    files["MP3_without_Xing.mp3"] = without_xing(encode(synthetic_speech(3, 44_100), 44_100, "MP3", "MPEG_LAYER_III"))
    files["FLAC_of_unknown_length.flac"] = without_length(files["FLAC_PCM_16_48000_1.flac"])
    for container, codec, rate_hz, extension, _ in FFMPEG:
        name = f"{container}_{codec}_{rate_hz}.{extension}"
        files[name] = encode_av(synthetic_speech(duration_s, rate_hz), rate_hz, container, codec)
    files["AMR_of_random_bits.amr"], files["AMR-WB_of_random_bits.awb"] = amr(125), amr(125, wide=True)
    files["bare_GSM.gsm"] = _gsm_frames(files["WAV_GSM610_8000_1.wav"])
    files["joined_OGG.ogg"] = files["OGG_VORBIS_16000_1.oga"] * 2
    files["joined_MP3.mp3"] = files["MP3_MPEG_LAYER_III_16000_1.mp3"] * 2
    files["joined_FLAC.flac"] = files["FLAC_PCM_16_48000_1.flac"] * 2
    files["MP3_behind_zeros.mpga"] = bytes(3000) + files["MP3_MPEG_LAYER_III_16000_1.mp3"]
    return files


def amr(frames: int, *, wide: bool = False) -> bytes:
    """AMR frames of all bit rates in turn, of random bits, 20 ms each: no encoder comes with PyAV."""
    sizes = (17, 23, 32, 36, 40, 46, 50, 58, 60) if wide else (12, 13, 15, 17, 19, 20, 26, 31)
    rng = np.random.default_rng(0)
    body = b"".join(bytes([i % len(sizes) << 3 | 4]) + rng.bytes(sizes[i % len(sizes)]) for i in range(frames))
    return (b"#!AMR-WB\n" if wide else b"#!AMR\n") + body


def _gsm_frames(wav: bytes) -> bytes:
    """As many frames of silence as a GSM WAV has: Microsoft packs two into 65 bytes, telephone systems do not."""
    return (b"\xd8\x20\xa2\xe1\x5a\x50" + b"\0\x49\x24\x92\x49\x24" * 4 + b"\0\x49\x24") * (len(wav) // 33)


def without_xing(mp3: bytes) -> bytes:
    first_frame = mp3.find(b"Info") if b"Info" in mp3[:4096] else mp3.find(b"Xing")
    return mp3[mp3.find(mp3[:2], first_frame) :]


def without_length(flac: bytes) -> bytes:
    head = bytearray(flac[:26])
    head[21] &= 0xF0  # STREAMINFO ends its 36-bit number of samples here
    head[22:26] = bytes(4)
    return bytes(head) + flac[26:]


def encode_av(samples: Samples, rate_hz: int, container: str, codec: str) -> bytes:
    """By FFmpeg, at what sample format and bit rate its encoder likes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate_hz, layout="mono")
        stream.bit_rate = 32_000 if codec.startswith("g726") else 128_000
        stream.codec_context.open()
        formats = stream.codec_context.codec.audio_formats
        resampler = av.AudioResampler(
            formats[0].name if formats else "s16", "mono", rate_hz, stream.codec_context.frame_size or 1024
        )
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="fltp", layout="mono")
        frame.sample_rate = rate_hz
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return buffer.getvalue()
