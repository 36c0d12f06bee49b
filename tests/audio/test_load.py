"""Recordings in: every format is read, and a part equals the same part of the whole.

Oracles: soxr and librosa on the whole recording, soundfile on the whole file.
"""

from __future__ import annotations

import io
import math
import re
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile
import soxr
from audio_recordings import AV_FORMATS, FORMATS, ONE_SECOND, Samples, code_of, encoded, encoded_av, voice
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audio import load as audio
from pipeline.audio.load import Limits, load, load_middle, probe
from pipeline.features.features import FeatureConfig, log_mel
from pipeline.storage import errors
from tests.support.recordings import without_xing

CONFIG = FeatureConfig()
CONTAINER_NAMES = {"WAVEX": "WAV"}
COMPRESSED = [row for row in FORMATS if row[0] in ("FLAC", "OGG", "MP3")]


def lag_between(later: Samples, earlier: Samples) -> int:
    """By how many samples `earlier` is to be delayed to fit `later`."""
    return int(np.argmax(scipy.signal.correlate(later, earlier, "full", "fft"))) - len(earlier) + 1


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


@pytest.mark.parametrize(("container", "codec", "rate_hz", "channels", "error"), FORMATS)
def test_fifty_milliseconds_of_every_format_are_centred_in_silence(
    container: str, codec: str, rate_hz: int, channels: int, error: float | None
) -> None:
    samples = voice(0.05, rate_hz, channels)
    clip = load_middle(encoded(samples, rate_hz, container, codec), sample_rate_hz=rate_hz)
    start = (2 * rate_hz - len(samples)) // 2
    assert clip.info.frames == len(samples)
    assert clip.scored_s == pytest.approx(0.05, abs=1 / rate_hz)
    assert not clip.samples[:start].any()
    assert not clip.samples[start + len(samples) :].any()
    assert np.corrcoef(clip.samples[start : start + len(samples)], samples.mean(axis=1))[0, 1] > 0.8


@pytest.mark.parametrize(
    ("container", "rate_hz", "channels"), [("WAV", 8_000, 1), ("RF64", 48_000, 2), ("W64", 48_000, 8)]
)
def test_ten_hours_are_taken_and_a_second_more_is_not(
    container: str, rate_hz: int, channels: int, tmp_path: Path
) -> None:
    """Mostly holes: RF64 and W64 of 7 and 28 GB take no room on the disk."""
    short = encoded(np.zeros((1, channels), np.float32), rate_hz, container)
    path, frame_bytes = tmp_path / "long.wav", 2 * channels
    for duration_s in (36_000, 36_001):
        size = duration_s * rate_hz * frame_bytes
        head = bytearray(short[: len(short) - frame_bytes])  # the data comes last
        if container == "WAV":
            head[-4:] = size.to_bytes(4, "little")
        elif container == "RF64":
            ds64 = head.index(b"ds64") + 8
            head[ds64 + 8 : ds64 + 24] = size.to_bytes(8, "little") + (size // frame_bytes).to_bytes(8, "little")
            head[-4:] = b"\xff" * 4
        else:
            head[-8:] = (size + 24).to_bytes(8, "little")
        with path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + size)
            file.seek(len(head) + size // 2)
            file.write(b"\0\x40" * channels)  # 0.5 in the middle
        if duration_s > 36_000:
            assert code_of(path) == "too_long"
        else:
            clip = load_middle(path, sample_rate_hz=rate_hz)
            assert clip.info.duration_s == 36_000
            assert np.flatnonzero(clip.samples).tolist() == [rate_hz]
            assert clip.samples[rate_hz] == 0.5


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_an_ogg_without_end_of_stream_flag_is_taken_as_it_is(codec: str) -> None:
    """Android's recorders never set it, so that it cannot tell a whole recording from a cut one."""
    data = encoded(voice(4.0, 48_000), 48_000, "OGG", codec)
    whole = load(data).samples
    pages = [match.start() for match in re.finditer(b"OggS\0", data)]
    assert data[pages[-1] + 5] & 4, "the last page has the flag"
    for end in pages[4:]:
        assert not data[data.rindex(b"OggS\0", 0, end) + 5] & 4
        part = load(data[:end]).samples
        assert 0.2 * 48_000 < len(part) < len(whole)
        np.testing.assert_allclose(part, whole[: len(part)], atol=1e-6)


def test_a_video_without_sound_has_no_audio() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            output.mux(packet)
    assert code_of(buffer.getvalue()) == "not_audio"


def test_without_pyav_the_error_names_it_and_what_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    container, codec, rate_hz, _ = AV_FORMATS[0]
    data = encoded_av(voice(0.5, rate_hz), rate_hz, container, codec)
    monkeypatch.setitem(sys.modules, "pipeline.audio.pyav", None)  # as where PyAV has no wheel
    with pytest.raises(errors.ExtraNeeded, match=r"PyAV.*pip install av.*WAV.*FLAC.*MP3"):
        load_middle(data)


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
    without_frames = bytes(data[:42]) + bytes(100)  # "fLaC" and STREAMINFO, then nothing that decodes
    for call in (probe, load_middle, audio.content_hash):
        assert code_of(without_frames, call) == "no_samples"


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
