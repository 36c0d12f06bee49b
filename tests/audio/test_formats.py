"""Every format that a decoder here reads, whatever the file is called.

Each is written by libsndfile or FFmpeg; the oracle is what was written.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
from audio_recordings import Samples, code_of, encoded, voice

from pipeline.audio import load as audio
from pipeline.audio.load import load, load_middle, probe
from pipeline.storage.files import scan
from tests.support.recordings import FFMPEG, encode_av

SNDFILE = [("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("WAV", "GSM610"), ("CAF", "ALAC_16"), ("VOC", "PCM_16")]
SNDFILE += [("NIST", "PCM_16"), ("NIST", "PCM_24"), ("NIST", "ULAW"), ("NIST", "ALAW"), ("MP3", "MPEG_LAYER_III")]
SNDFILE += [("FLAC", "PCM_16")]
APE = b"APETAGEX" + struct.pack("<III", 2000, 40, 1) + bytes(12) + bytes(8) + b"APETAGEX" + bytes(24)


def likeness(heard: Samples, said: Samples) -> float:
    """Largest normalised correlation of the middle of what was said with what is heard."""
    part = said[len(said) // 4 : -len(said) // 4]
    products = scipy.signal.correlate(heard, part, "valid", "fft")
    powers = scipy.signal.correlate(heard**2, np.ones_like(part), "valid", "fft")
    return float((products / np.sqrt(np.maximum(powers * (part @ part), 1e-9))).max())


@pytest.mark.parametrize(("container", "codec", "rate_hz", "ending", "name"), FFMPEG)
def test_what_ffmpeg_wrote(container: str, codec: str, rate_hz: int, ending: str, name: str, tmp_path: Path) -> None:
    said = voice(3.0, rate_hz)
    path = tmp_path / f"a.{ending}"
    path.write_bytes(encode_av(said, rate_hz, container, codec))
    info = probe(path)
    assert (info.container, info.notice) == (name, "")
    assert info.sample_rate_hz == (48_000 if codec == "libopus" else rate_hz)
    assert info.duration_s == pytest.approx(3.0, abs=0.12)  # encoders pad
    whole, middle = (read(path, sample_rate_hz=rate_hz).samples for read in (load, load_middle))
    assert likeness(whole, said[:, 0]) > 0.9
    np.testing.assert_allclose(middle, whole[(len(whole) - 2 * rate_hz) // 2 :][: 2 * rate_hz], atol=1e-6)
    assert np.array_equal(load_middle(path).samples, load_middle(path.read_bytes()).samples)
    assert len(audio.content_hash(path)) == 64
    assert scan(tmp_path, audio.EXTENSIONS).files == (str(path),)


@pytest.mark.parametrize(("container", "codec"), SNDFILE)
@pytest.mark.parametrize("before", [b"", bytes(4_999), b"ID3\4\0\0\0\0\0\x14" + bytes(20), APE])
def test_what_libsndfile_wrote_behind_tags_and_zeros(container: str, codec: str, before: bytes) -> None:
    said = voice(3.0, 8_000)
    data = encoded(said, 8_000, container, codec)
    clip = load(before + data, sample_rate_hz=8_000)
    assert clip.info.duration_s == pytest.approx(3.0, abs=0.05)
    assert likeness(clip.samples, said[:, 0]) > 0.9
    part = load(before + data, sample_rate_hz=8_000, start_s=1.3, duration_s=0.2).samples
    np.testing.assert_allclose(part, clip.samples[10_400:12_000], atol=1e-6)


def sphere(samples: Samples, *, big: bool = False, **fields: str) -> bytes:
    """As the LDC's tools write it, or with other fields."""
    given = {
        "sample_count": f"-i {len(samples)}",
        "sample_rate": "-i 16000",
        "channel_count": f"-i {samples.shape[1]}",
        "sample_n_bytes": "-i 2",
        "sample_byte_format": f"-s2 {'10' if big else '01'}",
        "sample_coding": "-s3 pcm",
    } | fields
    lines = ["NIST_1A", "   1024", *(f"{name} {value}" for name, value in given.items() if value), "end_head", ""]
    values = (samples * 32767).astype(">i2" if big else "<i2")
    return "\n".join(lines).encode().ljust(1024) + values.tobytes()


def test_sphere_headers() -> None:
    said = voice(1.0, 16_000, 2)
    for data in (
        sphere(said),
        sphere(said, big=True),
        sphere(said, sample_rate="-r 16000.000", sample_coding="-s3 pcm"),
        sphere(said, sample_coding=""),
        sphere(said, sample_count="-i 0"),
    ):
        np.testing.assert_allclose(load(data, sample_rate_hz=16_000).samples, said.mean(axis=1), atol=1e-4)
    assert code_of(sphere(said)[:-9_000]) == "truncated"
    assert code_of(sphere(said, sample_rate="")) == "corrupt"
    shortened = sphere(said, sample_coding="-s26 pcm,embedded-shorten-v2.00")
    with pytest.raises(audio.AudioError, match=r"shorten.*sph2pipe") as caught:
        probe(shortened)
    assert caught.value.code == "unsupported_format"
    for coding in (b"\x1b[31m\0\x9f", bytes(range(33, 255)) * 20):  # anything is told in one short line
        changed = encoded(voice(0.3, 8_000), 8_000, "NIST", "ULAW").replace(b"-s4 ulaw", b"-s4 " + coding)
        with pytest.raises(audio.AudioError) as caught:
            probe(changed)
        assert caught.value.code in ("unsupported_format", "corrupt")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 250


def test_a_mov_without_file_type_box() -> None:
    data = encode_av(voice(2.0, 44_100), 44_100, "mov", "pcm_s16le")
    size = int.from_bytes(data[:4], "big")
    assert data[4:8] == b"ftyp"
    rest = struct.pack(">I4s", size, b"wide") + bytes(size - 8) + data[size:]  # its index counts from the beginning
    np.testing.assert_array_equal(load(rest).samples, load(data).samples)


def test_an_mp3_that_begins_within_a_frame_as_radio_streams_are_kept() -> None:
    said = voice(3.0, 44_100)
    data = encoded(said, 44_100, "MP3", "MPEG_LAYER_III")
    assert likeness(load(data[1_300:], sample_rate_hz=44_100).samples, said[22_050:, 0]) > 0.9


def test_bare_gsm_frames_of_asterisk_without_any_header() -> None:
    frame = bytes([0xD0]) + bytes(32)
    assert probe(frame * 100).duration_s == pytest.approx(2.0)
    assert code_of(frame * 100 + bytes(33)) == "not_audio"
