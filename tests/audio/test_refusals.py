"""What is refused, and under which code: forged, cut and hostile recordings, odd paths, anything at all.

Headers are built here with struct, apart from the code that reads them.
"""

from __future__ import annotations

import ctypes
import io
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from audio_recordings import FORMATS, ONE_SECOND, Format, code_of, encoded, every_format, fmt, riff, voice
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.audio import decoders, source
from pipeline.audio import load as audio
from pipeline.audio.load import Limits, load, load_middle, probe
from pipeline.features.features import FeatureConfig, log_mel
from pipeline.storage import errors
from tests.support.recordings import encode_av

# What is refused -------------------------------------------------------------------------------------------------


def wav(data: bytes = b"\1\0" * 8000, **fields: Any) -> bytes:
    return riff(fmt(**fields), (b"data", data))


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
    assert probe(wav()).frames == 8000
    assert code_of(wav(**forged)) == code


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(max_duration_s=0.9), "too_long"),
        (Limits(max_decoded_bytes=63_999), "too_large"),
        (Limits(min_rate_hz=16_001), "bad_sample_rate"),
        (Limits(max_rate_hz=15_999), "bad_sample_rate"),
    ],
)
def test_limits_hold_before_decoding(limits: Limits, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(decoders.SndfileDecoder, "blocks", decode)
    for call in (probe, load_middle, load, audio.content_hash):
        assert code_of(ONE_SECOND, call, limits=limits) == code


def test_what_just_keeps_to_the_limits_is_taken_and_senseless_limits_are_not() -> None:
    rates = {"min_rate_hz": 16_000, "max_rate_hz": 16_000}
    limits = Limits(max_duration_s=1.0, max_decoded_bytes=64_000, **rates, max_channels=1)
    assert load_middle(ONE_SECOND, limits=limits).info.frames == 16_000
    for senseless in ({"max_duration_s": 0.0}, {"min_rate_hz": 0}, {"min_rate_hz": 9, "max_rate_hz": 8}):
        with pytest.raises(ValueError, match="limits"):
            Limits(**senseless)


def test_a_forged_rate_does_not_evade_the_limit_on_size() -> None:
    data = bytearray(encoded(np.zeros((48_000 * 30, 1), np.float32), 48_000, "FLAC"))
    data[18:21] = (0x05DC00 << 4 | (data[20] & 0x0F)).to_bytes(3, "big")  # 384 kHz in STREAMINFO's 20 bits
    limits = Limits(max_duration_s=10, max_decoded_bytes=4 * 48_000 * 10)
    assert probe(bytes(data)).duration_s < 10
    assert code_of(bytes(data), limits=limits) == "too_large"


@every_format
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.98])
def test_truncation_is_found_and_named(form: Format, kept: float) -> None:
    data = form.voice(1.0)
    cut = data[: int(len(data) * kept)]
    if form.container == "MP3" and kept == 0.98:
        cut = data[:-3]
    for call in (load_middle, probe, audio.content_hash):
        assert code_of(cut, call) == "truncated"


@pytest.mark.parametrize("codec", ["FLOAT", "DOUBLE"])
def test_values_that_are_not_finite_or_whose_power_would_overflow(codec: str) -> None:
    samples = voice(3.0, 44_100).copy()
    middle = len(samples) // 2
    for value in (np.nan, np.inf, -np.inf):
        samples[middle] = value
        for call in (load_middle, load):
            with pytest.raises(errors.NotFinite, match=r"at 1\.500 s"):
                call(encoded(samples, 44_100, codec=codec))
    samples[middle] = 1e30
    assert code_of(encoded(samples, 44_100, codec=codec)) == "out_of_range"
    samples[middle] = 32_768.0  # integers written as floats are common
    clip = load_middle(encoded(samples, 44_100, codec=codec))
    assert np.isfinite(log_mel(clip.samples, FeatureConfig())).all()


@pytest.mark.parametrize(
    ("tag", "code"), [(0, "unsupported_format"), (0x31, "corrupt"), (0x55, "corrupt"), (0x1234, "unsupported_format")]
)
def test_wav_tags_are_checked_before_a_decoder_opens_it(tag: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened by libsndfile")

    monkeypatch.setattr(soundfile.SoundFile, "__init__", opened)
    words = f"0x{tag:04X}.*ffmpeg" if code == "unsupported_format" else "."
    with pytest.raises(audio.AudioError, match=words) as told:
        probe(wav(tag=tag))
    assert told.value.code == code


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"", "empty_file", ""),
        (b"\0", "not_audio", ""),
        (b"speech,label\na.wav,happy\n", "not_audio", "it holds text. Accepted are WAV"),
        (b"%PDF-1.7 ...", "not_audio", "text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not_audio", "its format is not known. Accepted are WAV"),
        (b"MATLAB 5.0 MAT-file" + bytes(200), "not_audio", "its format is not known"),
        (b"PK\3\4" + bytes(100), "not_audio", "ZIP archive. Unpack"),
        (b"\x1f\x8b\x08" + bytes(60), "not_audio", "gzip. Unpack"),
        (b"#EXTM3U\nhttp://example.org/a.mp3\n", "not_audio", "playlist"),
        (b"MThd\0\0\0\6" + bytes(60), "not_audio", "MIDI"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "not_audio", "LFS.*git lfs pull"),
        (b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\r\noid", "not_audio", "git lfs pull"),
        (b"/annex/objects/SHA256E-s1--0.wav\n", "not_audio", "git annex get"),
        (b"\n <!DOCTYPE HTML PUBLIC><title>Sign in", "not_audio", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "not_audio", "XML document"),
        (b'{"message": "Not found"}', "not_audio", "JSON"),
        (b"RIFF\4\0\0\0WAVE", "truncated", ""),
        (b"RIFF\4\0\0\0AVI ", "corrupt", ""),
        (b"fLaC", "corrupt", ""),
        (b"OggS", "truncated", ""),
        (b"ID3", "truncated", ""),
        (b"ID3\4\0\0\0\0\0\1\0", "truncated", ""),
        (b"\xff\xfb", "corrupt", ""),
        (b"\xff\xfd\x90\0" + bytes(100), "corrupt", ""),
        (b".snd" + bytes(8), "truncated", ""),
        (b"caff\0\1\0\0", "truncated", ""),
        (b"FORM\0\0\0\4AIFF", "truncated", ""),
    ],
)
def test_what_is_no_recording_is_told_for_what_it_is(data: bytes, code: str, words: str) -> None:
    with pytest.raises(audio.AudioError, match=words or ".") as caught:
        load_middle(data)
    assert caught.value.code == code
    assert str(caught.value).isprintable()
    assert "b'" not in str(caught.value)


def test_a_start_past_the_end() -> None:
    assert code_of(ONE_SECOND, load, start_s=1.0) == "no_samples"
    with pytest.raises(ValueError, match="start_s"):
        load(ONE_SECOND, start_s=-1.0)
    with pytest.raises(ValueError, match="window_s"):
        load_middle(ONE_SECOND, window_s=0.0)


def test_what_the_mp3_decoder_prints_on_damaged_files_is_not_seen(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(encoded(voice(2.0, 44_100), 44_100, "MP3", "MPEG_LAYER_III"))
    data[len(data) // 2 : len(data) // 2 + 900] = bytes(900)
    soundfile.read(io.BytesIO(data))
    assert "Note:" in capfd.readouterr().err, "libmpg123 remarks on this file"
    c_library = ctypes.CDLL(None)
    c_library.perror(b"before")
    for call in (load_middle, probe, audio.content_hash):
        with suppress(audio.AudioError):
            call(bytes(data))
    print("python", file=sys.stderr)
    c_library.perror(b"after")
    found = [line.split(":")[0] for line in capfd.readouterr().err.splitlines()]
    assert found == ["before", "python", "after"]


# Paths -----------------------------------------------------------------------------------------------------------


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")  # to open it would wait for ever
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "dangling.wav").symlink_to("nowhere.wav")
    (tmp_path / "annexed.wav").symlink_to(".git/annex/objects/zK/SHA256E-s9--0.wav/SHA256E-s9--0.wav")
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
    for name, remedy in (("annexed.wav", "git annex get"), ("dangling.wav", "a link to nowhere.wav")):
        with pytest.raises(audio.AudioError, match=remedy):
            probe(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["a b.wav", "näïve 声.wav", "line\nbreak.wav", "\udcff\udc80.wav", "-rf", "x\x1b[31m.wav"]
)
def test_odd_names(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(ONE_SECOND)
    assert probe(path).frames == probe(str(path)).frames == 16_000
    path.write_bytes(b"not audio")
    assert code_of(path, probe) == "not_audio"


@pytest.mark.parametrize(
    ("call", "error", "code"),
    [
        ("open", PermissionError(13, "Permission denied"), "permission_denied"),
        ("pread", OSError(5, "Input/output error"), "unreadable"),
    ],
)
def test_no_permission_and_a_disk_that_fails(
    call: str, error: OSError, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    (tmp_path / "a.wav").write_bytes(ONE_SECOND)
    monkeypatch.setattr(source.os, call, fail)  # the tests may run as root, who may read everything
    assert code_of(tmp_path / "a.wav", probe) == code


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


# Anything at all -------------------------------------------------------------------------------------------------

MAGIC = [
    *(b"", b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0", b"RF64\xff\xff\xff\xffWAVEds64", b".snd\0\0\0\x18"),
    *(b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000"), b"FORM\0\0\xff\xffAIFFCOMM\0\0\0\x12", b"caff\0\1\0\0"),
    *(b"fLaC\0\0\0\x22", b"OggS\0\2", b"\xff\xfb\x90\x64", b"ID3\4\0\0\0\0\0\0", b"\x1aE\xdf\xa3", b"#!AMR\n"),
    b"\0\0\0\x20ftypM4A ",
]
SEEDS = [form.encoded(voice(0.3, form.rate_hz)) for form in FORMATS]
RAW = re.compile("errno|avcodec|avformat|libsndfile|invalid data|lost sync|psf_|error :|unspecified")  # decoders' words


def is_refused(data: bytes) -> bool:
    """Whether a recording gives an `AudioError`, in our own words, and not samples."""
    refused = []
    try:
        clip = load_middle(data, window_s=0.2)
        assert clip.samples.shape == (9600,)
        assert np.isfinite(clip.samples).all()
        audio.content_hash(data)
    except audio.AudioError as error:
        refused.append(error)
    for error in refused:
        assert audio.ERRORS[error.code] is type(error)
        assert str(error).isprintable()
        assert not RAW.search(str(error).lower())
    return bool(refused)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(magic=st.sampled_from(MAGIC), rest=st.binary(max_size=300))
def test_any_bytes_give_samples_or_an_audio_error(magic: bytes, rest: bytes) -> None:
    is_refused(magic + rest)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8),
    kept=st.floats(0.0, 1.0),
)
def test_any_change_gives_samples_or_an_audio_error(seed: bytes, changes: list[tuple[int, int]], kept: float) -> None:
    data = bytearray(seed)
    for position, value in changes:
        data[position % len(data)] = value
    is_refused(bytes(data[: round(len(data) * max(kept, 0.5))]))


def test_much_damage_gives_samples_or_an_audio_error() -> None:
    rng, short = np.random.default_rng(0), voice(0.5, 44_100)
    whole = [encode_av(short, 44_100, *kind) for kind in (("mp4", "aac"), ("asf", "wmav2"), ("wv", "wavpack"))]
    whole += [encoded(short, 44_100, *kind) for kind in (("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("CAF", "ALAC_16"))]
    refused = 0
    for data in whole:
        for _ in range(12):
            broken = bytearray(data)
            for at in rng.integers(8, len(data), 40):
                broken[at] ^= 0x5A
            refused += is_refused(bytes(broken))
    assert refused > 20


def test_every_error_has_a_code_of_its_own() -> None:
    ours = {error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, audio.AudioError)}
    assert set(audio.ERRORS.values()) == ours
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in audio.ERRORS)
