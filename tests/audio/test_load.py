"""Recordings in: every format is read, and a part equals the same part of the whole.

Oracles: soxr and librosa on the whole recording, soundfile on the whole file.
"""

from __future__ import annotations

import io
import math
import re
import sys
from fractions import Fraction
from pathlib import Path

import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile
import soxr
from audio_recordings import FORMATS, ONE_SECOND, Format, Samples, code_of, encoded, every_format, voice
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audio import load as audio
from pipeline.audio.load import Limits, load, load_middle, probe
from pipeline.features.features import FeatureConfig, log_mel
from pipeline.storage import errors
from tests.support.recordings import encode_av, without_length, without_xing

CONFIG = FeatureConfig()
COMPRESSED = [form for form in FORMATS if form.container in ("FLAC", "OGG", "MP3")]


def lag_between(later: Samples, earlier: Samples) -> int:
    """By how many samples `earlier` is to be delayed to fit `later`."""
    return int(np.argmax(scipy.signal.correlate(later, earlier, "full", "fft"))) - len(earlier) + 1


# What is accepted ------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize(("duration_s", "likeness"), [(0.4, 0.97), (0.05, 0.8)])
def test_every_format_gives_what_was_written(form: Format, duration_s: float, likeness: float, tmp_path: Path) -> None:
    samples = voice(duration_s, form.rate_hz, form.channels)
    data = form.encoded(samples)
    path = tmp_path / "recording.bin"  # the name tells nothing
    path.write_bytes(data)
    info, clip = probe(path), load(path, sample_rate_hz=form.rate_hz)
    assert (info.sample_rate_hz, info.channels, info.codec) == (form.rate_hz, form.channels, form.codec)
    assert info.container == form.container.removesuffix("EX")
    assert info.frames == len(samples)
    assert info.duration_s == pytest.approx(len(samples) / form.rate_hz)
    mono = samples.mean(axis=1)
    if form.error is None:
        assert np.corrcoef(clip.samples, mono)[0, 1] > likeness
    else:
        np.testing.assert_allclose(clip.samples, mono, atol=form.error + 1e-7)
    assert np.array_equal(load(data, sample_rate_hz=form.rate_hz).samples, clip.samples), "bytes are as a path"


@pytest.mark.parametrize(
    ("container", "rate_hz", "channels"), [("WAV", 8_000, 1), ("RF64", 48_000, 2), ("W64", 48_000, 8)]
)
def test_ten_hours_are_taken_and_no_second_more(container: str, rate_hz: int, channels: int, tmp_path: Path) -> None:
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


def test_without_pyav_the_error_names_it_and_what_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_av(voice(0.5, 44_100), 44_100, "mp4", "aac")
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
    known = encoded(samples, 16_000, "FLAC")
    data = without_length(known)  # as pipes leave it
    assert soundfile.info(io.BytesIO(data)).frames > 2**60, "libsndfile does not know either"
    unknown = load_middle(data)
    assert unknown.info.frames == len(samples)
    assert np.array_equal(unknown.samples, load_middle(known).samples)
    assert code_of(data, limits=Limits(max_duration_s=2.9)) == "too_long"
    without_frames = data[:42] + bytes(100)  # "fLaC" and STREAMINFO, then nothing that decodes
    for call in (probe, load_middle, audio.content_hash):
        assert code_of(without_frames, call) == "no_samples"


# Windows and resampling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("duration_s", [2.37, 7.013])
def test_the_middle_equals_that_of_the_whole_read_by_librosa(rate_hz: int, duration_s: float) -> None:
    samples = voice(duration_s, rate_hz, 2, seed=rate_hz)
    data = encoded(samples, rate_hz)
    whole, _ = librosa.load(io.BytesIO(data), sr=48_000)
    whole = librosa.util.fix_length(whole, size=math.ceil(Fraction(len(samples) * 48_000, rate_hz)))
    start = (len(whole) - 96_000) // 2
    expected = whole[start : start + 96_000]
    clip = load_middle(data)
    np.testing.assert_allclose(clip.samples, expected, atol=2e-6)
    np.testing.assert_allclose(log_mel(clip.samples, CONFIG), log_mel(expected, CONFIG), atol=1e-3)
    assert clip.start_s == pytest.approx(start / 48_000)
    assert clip.scored_s == 2.0


@pytest.mark.parametrize("form", COMPRESSED, ids=str)
def test_any_part_equals_that_part_of_the_whole(form: Format) -> None:
    data, rate_hz = form.voice(5.0), form.rate_hz
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
    before, start = (window - scored) // 2, (total - scored) // 2
    expected = np.pad(whole[start : start + scored], (before, window - scored - before))  # silence around it
    assert clip.samples.shape == (window,)
    assert clip.samples.dtype == np.float32
    assert clip.scored_s == pytest.approx(scored / to_hz)
    assert clip.start_s == pytest.approx(start / to_hz)
    np.testing.assert_allclose(clip.samples, expected, atol=2e-6)
    assert not clip.samples[:before].any()
    assert not clip.samples[before + scored :].any()


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 0.999), st.one_of(st.none(), st.floats(0.0005, 2)), st.sampled_from([8_000, 48_000]))
def test_a_part_has_the_length_asked_for_up_to_the_end(start: float, duration: float | None, to_hz: int) -> None:
    clip = load(ONE_SECOND, sample_rate_hz=to_hz, start_s=start, duration_s=duration)
    first = round(start * to_hz)
    left = to_hz - first
    asked = left if duration is None else max(round(duration * to_hz), 1)
    assert len(clip.samples) == min(asked, left)
    assert clip.start_s == pytest.approx(first / to_hz)
    assert clip.scored_s == pytest.approx(len(clip.samples) / to_hz)


def test_a_click_stays_in_the_middle_silence_silence_and_a_constant_a_constant() -> None:
    for rate_hz in (8_000, 44_100, 96_000):
        samples = np.zeros((rate_hz * 6, 1), np.float32)
        samples[rate_hz * 3] = 1.0
        clip = load_middle(encoded(samples, rate_hz, codec="FLOAT"))
        assert abs(int(np.argmax(np.abs(clip.samples))) - 48_000) <= 1
    assert not load_middle(encoded(np.zeros((99_999, 2), np.float32), 44_100)).samples.any()
    clip = load_middle(encoded(np.full((200_000, 1), 0.5, np.float32), 44_100, codec="FLOAT"))
    np.testing.assert_allclose(clip.samples, 0.5, atol=1e-4)


def test_only_the_window_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    noise = np.random.default_rng(0).integers(-3000, 3000, (2 * 60 * 44_100, 2), dtype=np.int16)
    soundfile.write(path, noise, 44_100)

    def bytes_read() -> int:
        return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])

    load_middle(path)  # imports done, tables filled
    before = bytes_read()
    clip = load_middle(path)
    assert clip.info.duration_s == 120.0
    assert bytes_read() - before < 1.5 * 2.1 * 44_100 * 4, "little more than 2 s of 16-bit stereo"


# Channels --------------------------------------------------------------------------------------------------------


def test_channels_are_mixed_or_chosen_and_one_that_is_not_finite_does_not_spoil_another() -> None:
    samples = voice(0.2, 16_000, 3).copy()
    data = encoded(samples, 16_000, codec="FLOAT")
    mixed = load(data, sample_rate_hz=16_000).samples
    np.testing.assert_allclose(mixed, librosa.to_mono(samples.T), atol=1e-6)
    for channel in range(3):
        np.testing.assert_array_equal(load(data, sample_rate_hz=16_000, channel=channel).samples, samples[:, channel])
    for channel in (3, -1):
        assert code_of(data, channel=channel) == "no_such_channel"
    samples[100, 1] = np.nan
    broken = encoded(samples, 16_000, codec="FLOAT")
    assert load(broken, channel=0).samples.any()
    assert code_of(broken, channel=1) == code_of(broken) == "not_finite"


# Hash ------------------------------------------------------------------------------------------------------------


def test_the_hash_is_of_the_sound() -> None:
    samples = (voice(1.0, 16_000, 2) * 20_000).astype(np.int16)
    wav = encoded(samples, 16_000)
    same = [encoded(samples, 16_000, container) for container in ("RF64", "W64", "AIFF", "CAF", "AU", "FLAC")]
    same.append(encoded(samples, 16_000, codec="PCM_24"))
    assert {audio.content_hash(data) for data in same} == {audio.content_hash(wav)}
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
