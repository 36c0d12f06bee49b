"""Recordings in: what is accepted, what is refused and how, and that a part equals the same part of the whole.

Oracles: soxr and librosa on the whole recording, soundfile on the whole file, wave and struct for headers.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
import re
import struct
import subprocess
import sys
import wave
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import numpy.typing as npt
import pytest
import scipy.signal
import soundfile
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import audio, audio_decoders, audio_errors, audio_guard
from pipeline.audio import Limits, load, load_middle, probe
from pipeline.audio_isolated import decode_in_subprocess
from pipeline.features import FeatureConfig, log_mel

Samples = npt.NDArray[np.float32]
CONFIG = FeatureConfig()

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
CONTAINER_NAMES = {"WAVEX": "WAV"}
COMPRESSED = [row for row in FORMATS if row[0] in ("FLAC", "OGG", "MP3")]
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


def lag_between(later: Samples, earlier: Samples) -> int:
    """By how many samples `earlier` is to be delayed to fit `later`."""
    return int(np.argmax(scipy.signal.correlate(later, earlier, "full", "fft"))) - len(earlier) + 1


def encoded(samples: Samples, rate_hz: int, container: str = "WAV", codec: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    samples = samples.reshape(len(samples), -1)
    with soundfile.SoundFile(buffer, "w", rate_hz, samples.shape[1], codec, format=container) as file:
        for start in range(0, len(samples), 4096):  # all at once overflows the stack of the Vorbis encoder
            file.write(samples[start : start + 4096])
    return buffer.getvalue()


def encoded_av(samples: Samples, rate_hz: int, container: str, codec: str) -> bytes:
    av = pytest.importorskip("av")
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


# What is accepted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("container", "codec", "rate_hz", "channels", "error"), FORMATS)
def test_every_format_gives_what_was_written(
    container: str, codec: str, rate_hz: int, channels: int, error: float | None, tmp_path: Path
) -> None:
    samples = voice(0.4, rate_hz, channels)
    data = encoded(samples, rate_hz, container, codec)
    path = tmp_path / "recording.bin"  # the name tells nothing
    path.write_bytes(data)

    info = probe(path)
    clip = load(path, sample_rate_hz=rate_hz)

    assert (info.sample_rate_hz, info.channels) == (rate_hz, channels)
    assert info.container == CONTAINER_NAMES.get(container, container)
    assert info.codec == codec
    assert info.frames == len(samples)
    assert info.duration_s == pytest.approx(len(samples) / rate_hz)
    mono = samples.mean(axis=1)
    if error is None:
        assert np.corrcoef(clip.samples, mono)[0, 1] > 0.97
    else:
        np.testing.assert_allclose(clip.samples, mono, atol=error + 1e-7)
    assert np.array_equal(load(data, sample_rate_hz=rate_hz).samples, clip.samples), "bytes and path are one recording"


@pytest.mark.parametrize(("container", "codec", "rate_hz", "name"), AV_FORMATS)
def test_containers_of_the_extra_are_decoded(container: str, codec: str, rate_hz: int, name: str) -> None:
    samples = voice(3.0, rate_hz)
    data = encoded_av(samples, rate_hz, container, codec)

    clip = load_middle(data, sample_rate_hz=rate_hz)
    whole = load(data, sample_rate_hz=rate_hz)

    assert clip.info.container == name
    assert clip.info.sample_rate_hz == rate_hz
    assert clip.info.duration_s == pytest.approx(3.0, abs=0.15)  # encoders pad
    start = (len(whole.samples) - 2 * rate_hz) // 2
    np.testing.assert_array_equal(clip.samples, whole.samples[start : start + 2 * rate_hz])
    lag = lag_between(whole.samples, samples[:, 0])
    part = whole.samples[lag : lag + len(samples) // 2]
    assert 0 <= lag < 0.1 * rate_hz
    assert np.corrcoef(part, samples[: len(part), 0])[0, 1] > 0.95
    assert len(audio.content_hash(data)) == 64


@pytest.mark.parametrize(("container", "codec", "rate_hz", "name"), AV_FORMATS)
def test_without_the_extra_the_error_names_it_and_what_is_accepted(
    container: str, codec: str, rate_hz: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded_av(voice(0.5, rate_hz), rate_hz, container, codec)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(audio_errors.ExtraNeeded, match=rf"{name} needs .*\[av\].*WAV.*FLAC.*MP3"):
        load_middle(data)


def test_a_video_without_sound_has_no_audio() -> None:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            output.mux(packet)
    assert code_of(buffer.getvalue()) == "not_audio"


def without_xing(mp3: bytes) -> bytes:
    """The frames behind the Info frame that LAME puts first."""
    mark = max(mp3.find(b"Info", 0, 4096), mp3.find(b"Xing", 0, 4096))
    assert mark > 0
    return mp3[mp3.find(mp3[:2], mark) :]


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100])
def test_an_mp3_without_xing_frame_has_its_whole_length(rate_hz: int) -> None:
    loud_end = np.concatenate([np.zeros((5 * rate_hz, 1), np.float32), voice(5.0, rate_hz)])  # a variable bit rate
    data = encoded(loud_end, rate_hz, "MP3", "MPEG_LAYER_III")
    with_frame, without = load(data, sample_rate_hz=rate_hz), load(without_xing(data), sample_rate_hz=rate_hz)

    assert with_frame.info.duration_s == pytest.approx(10.0, abs=0.001)
    assert without.info.duration_s == pytest.approx(10.0, abs=0.2)  # the encoder's delay and padding are not known
    lag = lag_between(without.samples, with_frame.samples)
    both = min(len(without.samples) - lag, len(with_frame.samples))
    assert 0 <= lag < 0.2 * rate_hz
    np.testing.assert_allclose(without.samples[lag:][:both], with_frame.samples[:both], atol=1e-4)


def test_a_flac_of_unknown_length_is_counted_and_read() -> None:
    samples = voice(3.0, 16_000)
    data = bytearray(encoded(samples, 16_000, "FLAC"))
    known = load_middle(bytes(data))
    data[21] &= 0xF0  # the 36-bit number of samples in STREAMINFO; 0 means unknown, as pipes leave it
    data[22:26] = bytes(4)
    assert soundfile.info(io.BytesIO(bytes(data))).frames > 2**60, "libsndfile does not know either"

    unknown = load_middle(bytes(data))

    assert unknown.info.frames == len(samples)
    assert np.array_equal(unknown.samples, known.samples)
    assert code_of(bytes(data), limits=Limits(max_duration_s=2.9)) == "too_long"


def test_lengths_that_streaming_writers_could_not_know() -> None:
    samples = voice(0.5, 16_000)
    wav, caf = bytearray(encoded(samples, 16_000)), bytearray(encoded(samples, 16_000, "CAF"))
    expected = load(bytes(wav)).samples
    for placeholder in (0xFFFF_FFFF, 0x7FFF_FFFF, 0x8000_0000):
        wav[4:8] = wav[40:44] = placeholder.to_bytes(4, "little")
        assert np.array_equal(load(bytes(wav)).samples, expected)
    data_size = caf.index(b"data") + 4
    caf[data_size : data_size + 8] = b"\xff" * 8
    assert np.array_equal(load(bytes(caf)).samples, expected)


def test_flac_behind_an_id3_tag() -> None:
    flac = encoded(voice(0.5, 16_000), 16_000, "FLAC")
    assert np.array_equal(load(b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + flac).samples, load(flac).samples)


# Windows and resampling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("duration_s", [2.37, 7.013])
def test_the_middle_equals_the_middle_of_the_whole_resampled(rate_hz: int, duration_s: float) -> None:
    data = encoded(voice(duration_s, rate_hz, 2, seed=rate_hz), rate_hz)

    clip = load_middle(data)
    mixed = soundfile.read(io.BytesIO(data), dtype="float32")[0].mean(axis=1)
    whole = soxr.resample(mixed, rate_hz, 48_000, quality="HQ")
    whole = librosa.util.fix_length(whole, size=math.ceil(Fraction(len(mixed) * 48_000, rate_hz)))

    start = (len(whole) - 96_000) // 2
    expected = whole[start : start + 96_000]
    np.testing.assert_allclose(clip.samples, expected, atol=2e-6)
    np.testing.assert_allclose(log_mel(clip.samples, CONFIG), log_mel(expected, CONFIG), atol=1e-3)
    assert clip.start_s == pytest.approx(start / 48_000)
    assert clip.scored_s == 2.0


def test_the_middle_equals_that_of_librosa() -> None:
    data = encoded(voice(3.3, 44_100, 2), 44_100)
    whole, _ = librosa.load(io.BytesIO(data), sr=48_000)
    start = (len(whole) - 96_000) // 2
    np.testing.assert_allclose(load_middle(data).samples, whole[start : start + 96_000], atol=2e-6)


@pytest.mark.parametrize(("container", "codec", "rate_hz", "channels", "error"), COMPRESSED)
def test_any_part_equals_that_part_of_the_whole(
    container: str, codec: str, rate_hz: int, channels: int, error: float | None
) -> None:
    data = encoded(voice(5.0, rate_hz, channels), rate_hz, container, codec)
    whole = load(data, sample_rate_hz=rate_hz).samples
    rng = np.random.default_rng(0)
    starts = [1, *rng.integers(0, len(whole), 6), *rng.integers(len(whole) - rate_hz // 2, len(whole), 8)]
    for start in starts:  # most near the end, where libsndfile seeks Vorbis wrongly
        part = load(data, sample_rate_hz=rate_hz, start_s=start / rate_hz, duration_s=0.1).samples
        np.testing.assert_allclose(part, whole[start : start + rate_hz // 10], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 5_000),
    rate_hz=st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 12_345]),
    to_hz=st.sampled_from([8_000, 16_000, 44_100, 48_000]),
    window_s=st.floats(0.001, 0.2),
)
def test_length_arithmetic(frames: int, rate_hz: int, to_hz: int, window_s: float) -> None:
    samples = np.random.default_rng(frames).uniform(-0.5, 0.5, frames).astype(np.float32)
    data = encoded(samples, rate_hz, "WAV", "FLOAT")
    window = max(round(window_s * to_hz), 1)
    clip = load_middle(data, window_s=window / to_hz, sample_rate_hz=to_hz)

    whole = soxr.resample(samples, rate_hz, to_hz) if rate_hz != to_hz else samples
    total = math.ceil(Fraction(frames * to_hz, rate_hz))
    whole = np.pad(whole, (0, max(total - len(whole), 0)))[:total]
    scored = min(window, total)
    before = (window - scored) // 2
    assert clip.samples.shape == (window,)
    assert clip.samples.dtype == np.float32
    assert clip.scored_s == pytest.approx(scored / to_hz)
    assert clip.start_s == pytest.approx((total - scored) // 2 / to_hz)
    assert not clip.samples[:before].any(), "zeros before"
    assert not clip.samples[before + scored :].any(), "zeros after"
    start = (total - scored) // 2
    np.testing.assert_allclose(clip.samples[before : before + scored], whole[start : start + scored], atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    start=st.floats(0, 0.999),
    duration=st.one_of(st.none(), st.floats(0.0005, 2)),
    to_hz=st.sampled_from([8_000, 48_000]),
)
def test_a_part_has_the_length_asked_for_up_to_the_end(start: float, duration: float | None, to_hz: int) -> None:
    clip = load(ONE_SECOND, sample_rate_hz=to_hz, start_s=start, duration_s=duration)
    first = round(start * to_hz)
    left = to_hz - first
    asked = left if duration is None else max(round(duration * to_hz), 1)
    assert len(clip.samples) == min(asked, left)
    assert clip.start_s == pytest.approx(first / to_hz)
    assert clip.scored_s == pytest.approx(len(clip.samples) / to_hz)


ONE_SECOND = encoded(voice(1.0, 16_000), 16_000)


def test_a_click_in_the_middle_stays_in_the_middle() -> None:
    for rate_hz in (8_000, 44_100, 96_000):
        samples = np.zeros((rate_hz * 6, 1), np.float32)
        samples[rate_hz * 3] = 1.0
        clip = load_middle(encoded(samples, rate_hz, codec="FLOAT"))
        assert abs(int(np.argmax(np.abs(clip.samples))) - 48_000) <= 1


def test_silence_stays_silence_and_a_constant_a_constant() -> None:
    assert not load_middle(encoded(np.zeros((99_999, 2), np.float32), 44_100)).samples.any()
    clip = load_middle(encoded(np.full((200_000, 1), 0.5, np.float32), 44_100, codec="FLOAT"))
    np.testing.assert_allclose(clip.samples, 0.5, atol=1e-4)


def test_only_the_window_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    noise = np.random.default_rng(0).integers(-3000, 3000, 44_100 * 2, dtype=np.int16).tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44_100)
        for _ in range(120):
            file.writeframesraw(noise)
    load_middle(path)  # imports done, tables filled
    before = bytes_read()
    clip = load_middle(path)
    assert clip.info.duration_s == 120.0
    assert bytes_read() - before < 1.5 * 2.1 * 44_100 * 4, "little more than 2 s of 16-bit stereo"


def bytes_read() -> int:
    """By this process since its start."""
    text = Path("/proc/self/io").read_text()
    return int(re.search(r"rchar: (\d+)", text)[1])  # type: ignore[index]


# Channels --------------------------------------------------------------------------------------------------------


def test_channels_are_mixed_or_chosen() -> None:
    samples = voice(0.2, 16_000, 3)
    data = encoded(samples, 16_000, codec="FLOAT")
    mixed = load(data, sample_rate_hz=16_000).samples
    np.testing.assert_allclose(mixed, librosa.to_mono(samples.T), atol=1e-6)
    for channel in range(3):
        np.testing.assert_array_equal(load(data, sample_rate_hz=16_000, channel=channel).samples, samples[:, channel])
    for channel in (3, -1):
        assert code_of(data, channel=channel) == "no_such_channel"


def test_a_channel_that_is_not_finite_does_not_spoil_another() -> None:
    samples = voice(0.2, 16_000, 2).copy()
    samples[100, 1] = np.nan
    data = encoded(samples, 16_000, codec="FLOAT")
    assert load(data, channel=0).samples.any()
    assert code_of(data, channel=1) == "not_finite"
    assert code_of(data) == "not_finite"


# What is refused -------------------------------------------------------------------------------------------------


def wav_bytes(
    *,
    tag: int = 1,
    channels: int = 1,
    rate_hz: int = 16_000,
    bits: int = 16,
    frame_bytes: int | None = None,
    data: bytes = b"\1\0" * 8000,
) -> bytes:
    """A WAV header of our own making before `data`."""
    frame_bytes = channels * bits // 8 if frame_bytes is None else frame_bytes
    form = struct.pack("<HHIIHH", tag, channels, rate_hz, rate_hz * frame_bytes & 0xFFFF_FFFF, frame_bytes, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_our_own_header_is_fine_as_such() -> None:
    assert probe(wav_bytes()).frames == 8000


@pytest.mark.parametrize(
    ("forged", "code"),
    [
        ({"rate_hz": 1}, "bad_sample_rate"),
        ({"rate_hz": 2_000_000_000}, "bad_sample_rate"),
        ({"rate_hz": 0}, "corrupt"),
        ({"channels": 9, "data": bytes(18 * 100)}, "bad_channels"),
        ({"channels": 1024, "data": bytes(2048 * 10)}, "bad_channels"),
        ({"channels": 0, "frame_bytes": 2}, "corrupt"),
        ({"frame_bytes": 7}, "corrupt"),
        ({"bits": 13}, "corrupt"),
        ({"data": b""}, "no_samples"),
    ],
)
def test_forged_headers(forged: dict[str, Any], code: str) -> None:
    assert code_of(wav_bytes(**forged)) == code


@pytest.mark.parametrize("call", [probe, load_middle, load, audio.content_hash])
@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(max_duration_s=0.9), "too_long"),
        (Limits(max_decoded_bytes=63_999), "too_large"),
        (Limits(min_rate_hz=16_001), "bad_sample_rate"),
        (Limits(max_rate_hz=15_999), "bad_sample_rate"),
    ],
)
def test_limits_hold_before_decoding(
    call: Callable[..., object], limits: Limits, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(audio_decoders.SndfileDecoder, "blocks", decode)
    assert code_of(ONE_SECOND, call, limits=limits) == code


def test_what_just_keeps_to_the_limits_is_taken() -> None:
    limits = Limits(
        max_duration_s=1.0, max_decoded_bytes=64_000, min_rate_hz=16_000, max_rate_hz=16_000, max_channels=1
    )
    assert load_middle(ONE_SECOND, limits=limits).info.frames == 16_000


def test_a_forged_rate_does_not_evade_the_limit_on_size() -> None:
    samples = np.zeros((48_000 * 30, 1), np.float32)
    data = bytearray(encoded(samples, 48_000, "FLAC"))
    data[18:21] = (0x05DC00 << 4 | (data[20] & 0x0F)).to_bytes(3, "big")  # 384 kHz in STREAMINFO's 20 bits
    limits = Limits(max_duration_s=10, max_decoded_bytes=4 * 48_000 * 10)
    assert probe(bytes(data)).duration_s < 10
    assert code_of(bytes(data), limits=limits) == "too_large"


@pytest.mark.parametrize("values", [{"max_duration_s": 0.0}, {"min_rate_hz": 0}, {"min_rate_hz": 9, "max_rate_hz": 8}])
def test_limits_that_make_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="limits"):
        Limits(**values)


@pytest.mark.parametrize(("container", "codec", "rate_hz", "channels", "error"), FORMATS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.98])
def test_truncation_is_found_and_named(
    container: str, codec: str, rate_hz: int, channels: int, error: float | None, kept: float
) -> None:
    data = encoded(voice(1.0, rate_hz, channels), rate_hz, container, codec)
    cut = data[: int(len(data) * kept)]
    if codec == "MPEG_LAYER_III" and kept == 0.98:
        cut = data[:-3]
    for call in (load_middle, probe, audio.content_hash):
        assert code_of(cut, call) == "truncated"


@pytest.mark.parametrize(("container", "codec", "rate_hz", "name"), AV_FORMATS[:1])
def test_a_cut_mp4_is_refused(container: str, codec: str, rate_hz: int, name: str) -> None:
    data = encoded_av(voice(3.0, rate_hz), rate_hz, container, codec)
    assert code_of(data[: len(data) // 2]) == "corrupt"  # its index stands at the end


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", ["FLOAT", "DOUBLE"])
def test_values_that_are_not_finite(value: float, codec: str) -> None:
    samples = voice(3.0, 44_100).copy()
    samples[44_100 * 3 // 2] = value
    data = encoded(samples, 44_100, codec=codec)
    for call in (load_middle, load):
        with pytest.raises(audio_errors.NotFinite, match=r"at 1\.500 s"):
            call(data)


def test_a_value_whose_power_would_overflow() -> None:
    samples = voice(3.0, 44_100).copy()
    samples[44_100 * 3 // 2] = 1e30
    assert code_of(encoded(samples, 44_100, codec="FLOAT")) == "out_of_range"
    samples[44_100 * 3 // 2] = 32_768.0  # integers written as floats are common
    clip = load_middle(encoded(samples, 44_100, codec="FLOAT"))
    assert np.isfinite(log_mel(clip.samples, CONFIG)).all()


@pytest.mark.parametrize(
    ("tag", "codec"), [(2, "MS ADPCM"), (0x11, "IMA ADPCM"), (0x31, "GSM"), (0x55, "MP3"), (0x1234, "0x1234")]
)
def test_the_wav_format_tag_is_checked_before_libsndfile_opens_it(
    tag: int, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened by libsndfile")

    monkeypatch.setattr(audio_decoders, "_Sound", opened)
    with pytest.raises(audio_errors.UnsupportedFormat, match=f"{codec}.*ffmpeg"):
        probe(wav_bytes(tag=tag))


@pytest.mark.parametrize("codec", ["GSM610", "IMA_ADPCM", "MS_ADPCM"])
def test_codecs_of_wav_that_are_not_accepted(codec: str) -> None:
    assert code_of(encoded(voice(1.0, 8_000), 8_000, "WAV", codec)) == "unsupported_format"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"\0", "not_audio"),
        (b"speech,label\na.wav,happy\n", "not_audio"),
        (b"%PDF-1.7 ...", "not_audio"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not_audio"),
        (b"PK\3\4" + bytes(100), "not_audio"),
        (b"#EXTM3U\nhttp://example.org/a.mp3\n", "not_audio"),
        (b"MATLAB 5.0 MAT-file" + bytes(200), "not_audio"),
        (b"RIFF\4\0\0\0WAVE", "truncated"),
        (b"RIFF\4\0\0\0AVI ", "not_audio"),
        (b"fLaC", "corrupt"),
        (b"OggS", "truncated"),
        (b"ID3", "truncated"),
        (b"ID3\4\0\0\0\0\0\1\0", "truncated"),
        (b"\xff\xfb", "corrupt"),
        (b"\xff\xfd\x90\0" + bytes(100), "unsupported_format"),
        (b".snd" + bytes(8), "truncated"),
        (b"caff\0\1\0\0", "truncated"),
        (b"FORM\0\0\0\4AIFF", "truncated"),
    ],
)
def test_what_is_no_recording(data: bytes, code: str) -> None:
    assert code_of(data) == code


def test_a_start_past_the_end() -> None:
    assert code_of(ONE_SECOND, load, start_s=1.0) == "no_samples"
    with pytest.raises(ValueError, match="start_s"):
        load(ONE_SECOND, start_s=-1.0)
    with pytest.raises(ValueError, match="window_s"):
        load_middle(ONE_SECOND, window_s=0.0)


# Paths -----------------------------------------------------------------------------------------------------------


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")  # to open it would wait for ever
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "dangling.wav").symlink_to("nowhere.wav")
    expected = {
        tmp_path: "not_a_file",
        tmp_path / "pipe.wav": "not_a_file",
        Path("/dev/zero"): "not_a_file",
        tmp_path / "missing.wav": "not_found",
        tmp_path / "dangling.wav": "not_found",
        tmp_path / "loop.wav": "unreadable",
        tmp_path / ("x" * 300 + ".wav"): "unreadable",
        "": "not_found",
        "a\0b.wav": "not_found",
        "/dev/null/a.wav": "not_found",
    }
    assert {path: code_of(path, probe) for path in expected} == expected


@pytest.mark.parametrize(
    "name", ["a b.wav", "näïve 声.wav", "line\nbreak.wav", "\udcff\udc80.wav", "-rf", "x\x1b[31m.wav"]
)
def test_odd_names(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(ONE_SECOND)
    assert probe(path).frames == 16_000
    assert probe(str(path)).frames == 16_000
    path.write_bytes(b"not audio")
    assert code_of(path, probe) == "not_audio"


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.wav"
    path.write_bytes(ONE_SECOND)

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(audio_guard.os, "open", denied)  # the tests may run as root, who may read everything
    assert code_of(path, probe) == "permission_denied"


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(ONE_SECOND)

    def failed(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(audio_guard.os, "pread", failed)
    assert code_of(path, probe) == "unreadable"


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    good.write_bytes(ONE_SECOND)
    bad.write_bytes(ONE_SECOND[:1000])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        load_middle(good)
        load_middle(ONE_SECOND)
        code_of(bad)
        code_of(ONE_SECOND[:1000])
    assert len(os.listdir("/proc/self/fd")) == before


# Hash ------------------------------------------------------------------------------------------------------------


def test_the_hash_is_of_the_sound() -> None:
    samples = (voice(1.0, 16_000, 2) * 20_000).astype(np.int16)
    wav = encoded(samples, 16_000)
    containers = ("WAV", "RF64", "W64", "AIFF", "CAF", "AU", "FLAC")
    same = {audio.content_hash(encoded(samples, 16_000, container)) for container in containers}
    same.add(audio.content_hash(encoded(samples, 16_000, codec="PCM_24")))
    assert same == {audio.content_hash(wav)}
    assert re.fullmatch(r"[0-9a-f]{64}", audio.content_hash(wav))

    other = samples.copy()
    other[-1, 1] += 1
    different = [
        encoded(other, 16_000),
        encoded(samples, 8_000),
        encoded(samples[:-1], 16_000),
        encoded(samples[:, :1], 16_000),
        encoded(samples.reshape(-1, 1), 16_000),  # the same numbers in one channel
    ]
    assert len({audio.content_hash(data) for data in [wav, *different]}) == 6


# Crashes, hangs and memory ---------------------------------------------------------------------------------------


def test_the_subprocess_gives_the_same_clip(tmp_path: Path) -> None:
    path = tmp_path / "\udcffodd\n.flac"
    path.write_bytes(encoded(voice(3.0, 44_100), 44_100, "FLAC"))
    here = load_middle(path, window_s=1.5, limits=Limits(max_duration_s=5))
    there = decode_in_subprocess(path, window_s=1.5, limits=Limits(max_duration_s=5))
    assert np.array_equal(here.samples, there.samples)
    assert (here.info, here.start_s, here.scored_s) == (there.info, there.start_s, there.scored_s)
    part = decode_in_subprocess(path.read_bytes(), decode=load, start_s=1.0, duration_s=0.5, channel=0)
    assert np.array_equal(part.samples, load(path, start_s=1.0, duration_s=0.5).samples)
    assert code_of(ONE_SECOND[:999], decode_in_subprocess) == "truncated"


@pytest.fixture
def hostile_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "hostile_decoders.py").write_text(
        "import os, sys, threading\n"
        "def abort(source, **options):\n    os.abort()\n"
        "def leave(source, **options):\n    os._exit(0)\n"
        "def fail(source, **options):\n    raise MemoryError('no')\n"
        "def hang(source, **options):\n    threading.Event().wait()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import hostile_decoders

    yield hostile_decoders
    del sys.modules["hostile_decoders"]


@pytest.mark.parametrize(
    ("decoder", "code", "message"),
    [
        ("abort", "decoder_crashed", "SIGABRT"),
        ("leave", "decoder_crashed", "status 0"),
        ("fail", "decoder_crashed", "status 1"),
        ("hang", "decode_timeout", "within 1 s"),
    ],
)
def test_a_decoder_that_ends_its_process_costs_one_recording(
    decoder: str, code: str, message: str, hostile_decoders: Any
) -> None:
    timeout_s = 1.0 if decoder == "hang" else 60.0
    with pytest.raises(audio.AudioError, match=message) as caught:
        decode_in_subprocess(b"anything", decode=getattr(hostile_decoders, decoder), timeout_s=timeout_s)
    assert caught.value.code == code


def test_twenty_minutes_of_silence_take_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "silence.flac"
    with soundfile.SoundFile(path, "w", 48_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(20):
            file.write(np.zeros(60 * 48_000, np.int16))
    assert path.stat().st_size < 400_000
    script = (
        "import resource, sys\n"
        "from pipeline.audio import content_hash, load, load_middle, probe\n"
        "def peak():\n    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "long, short = sys.argv[1:]\n"
        "content_hash(short), load_middle(short)\n"
        "before = peak()\n"
        "probe(long), load_middle(long), content_hash(long), load(long, start_s=600, duration_s=2)\n"
        "print(peak() - before)"
    )
    short = tmp_path / "short.wav"
    short.write_bytes(ONE_SECOND)
    root = Path(audio.__file__).parents[1]
    output = subprocess.run(
        [sys.executable, "-c", script, path, short], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert int(output) / 1024 < 64, "MiB"


# Anything at all -------------------------------------------------------------------------------------------------

MAGIC = [
    b"",
    b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0",
    b"fLaC\0\0\0\x22",
    b"OggS\0\2",
    b"\xff\xfb\x90\x64",
    b"caff\0\1\0\0",
]
MAGIC += [
    b"FORM\0\0\xff\xffAIFFCOMM\0\0\0\x12",
    b".snd\0\0\0\x18",
    b"ID3\4\0\0\0\0\0\0",
    b"\x1aE\xdf\xa3",
    b"\0\0\0\x20ftypM4A ",
]
MAGIC += [b"RF64\xff\xff\xff\xffWAVEds64", b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000"), b"#!AMR\n"]
SEEDS = [encoded(voice(0.3, rate), rate, container, codec) for container, codec, rate, _, _ in FORMATS]


def samples_or_coded_error(data: bytes) -> None:
    refused = None
    try:
        clip = load_middle(data, window_s=0.2)
    except audio.AudioError as error:
        refused = error
    if refused:
        assert audio.ERRORS[refused.code] is type(refused)
        assert str(refused).isprintable()
    else:
        assert clip.samples.shape == (9600,)
        assert np.isfinite(clip.samples).all()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(magic=st.sampled_from(MAGIC), rest=st.binary(max_size=300))
def test_any_bytes_give_samples_or_an_audio_error(magic: bytes, rest: bytes) -> None:
    samples_or_coded_error(magic + rest)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8),
    kept=st.floats(0.0, 1.0),
)
def test_any_change_to_a_recording_gives_samples_or_an_audio_error(
    seed: bytes, changes: list[tuple[int, int]], kept: float
) -> None:
    data = bytearray(seed)
    for position, value in changes:
        data[position % len(data)] = value
    samples_or_coded_error(bytes(data[: round(len(data) * max(kept, 0.5))]))


def test_codes_are_stable_and_unlike() -> None:
    def below(error: type[audio.AudioError]) -> set[type[audio.AudioError]]:
        return {error}.union(*(below(child) for child in error.__subclasses__()))

    assert set(audio.ERRORS.values()) == below(audio.AudioError)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in audio.ERRORS)
    documented = set(re.findall(r"[├└]── \w+ +(\w+)", audio_errors.__doc__ or ""))
    assert documented | {"audio_error"} == set(audio.ERRORS) | {"code"}
