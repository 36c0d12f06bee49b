"""All the audio that there is: headers whose length is no promise, containers longer than their sound, joined files.

Oracle: the same samples with a right header, or the parts on their own. Headers are built here with struct.
"""

from __future__ import annotations

import io
import struct

import av
import numpy as np
import pytest
import soundfile
from audio_recordings import Samples, code_of, encoded, fmt, riff, voice

from pipeline.audio import load as audio
from pipeline.audio.load import Limits, load, load_middle, probe
from tests.support.recordings import amr, encode_av, without_length, without_xing

RATE_HZ = 16_000
SAMPLES = voice(1.0, RATE_HZ)
PCM = (SAMPLES[:, 0] * 32767).astype("<i2").tobytes()
NO_PROMISE = [0, len(PCM) + 8, len(PCM) + 36, len(PCM) + 44, 1_500_000_000, 2_000_000_000, 0x7FFF_F000, 0xFFFF_FFFF]
NO_PROMISE += [len(PCM) + 80, 2**30]
DATA = (b"data", PCM)
WHOLE = riff(fmt(), DATA)
EXPECTED = load(WHOLE, sample_rate_hz=RATE_HZ).samples


def with_data_size(declared: int, outer: int | None) -> bytes:
    wav = riff(fmt(), DATA, outer=outer)
    return wav[:40] + struct.pack("<I", declared) + wav[44:]


def assert_whole(data: bytes, expected: Samples = EXPECTED) -> None:
    clip = load(data, sample_rate_hz=RATE_HZ)
    np.testing.assert_array_equal(clip.samples, expected)
    assert clip.info.frames == len(expected)
    middle = load_middle(data, window_s=0.25, sample_rate_hz=RATE_HZ).samples
    start = (len(expected) - 4000) // 2
    np.testing.assert_array_equal(middle, expected[start : start + 4000])


# Headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", NO_PROMISE)
@pytest.mark.parametrize("outer", [None, 0, 0xFFFF_FFFF])
def test_a_wav_whose_length_is_no_promise_is_heard_to_its_end(declared: int, outer: int | None) -> None:
    assert_whole(with_data_size(declared, outer))


def test_a_wav_that_was_cut_is_told_from_one_whose_header_is_wrong() -> None:
    for cut in (WHOLE[: len(WHOLE) // 2], WHOLE[:44], with_data_size(len(PCM) + 5_000, outer=36 + len(PCM) + 5_000)):
        assert code_of(cut) == "truncated"
    assert_whole(with_data_size(len(PCM) + 5_000, outer=None))  # the outer chunk ends where the file does
    for behind in ((), ((b"LIST", b"INFOISFT\4\0\0\0abcd"),), ((b"id3 ", b"odd"), (b"JUNK", bytes(10)))):
        assert code_of(riff(fmt(), (b"data", b""), *behind)) == "no_samples"


@pytest.mark.parametrize("name", [b"LIST", b"zzzz"])
def test_chunks_whose_pad_byte_is_missing_or_one_too_many(name: bytes) -> None:
    odd = (name, b"INFOISFT\5\0\0\0abcde")
    assert_whole(riff(fmt(), odd, DATA))
    assert_whole(riff(fmt(), odd, DATA, pads=False))
    assert_whole(riff(odd, fmt(), odd, DATA, pads=False))
    padded = riff(fmt(), (name, bytes(4)), DATA)
    assert_whole(padded[:48] + b"\0" + padded[48:])
    too_long = bytearray(riff(fmt(), (name, bytes(8)), DATA))
    too_long[40:44] = struct.pack("<I", 10_000)  # its length hides the audio
    assert_whole(bytes(too_long))


def extensible(bits: int, frame_bytes: int, mask: int = 0, *, tag: int = 1, channels: int = 1) -> tuple[bytes, bytes]:
    """A format chunk that tells its real `tag` at its end."""
    name, head = fmt(tag=0xFFFE, channels=channels, bits=bits, frame_bytes=frame_bytes)
    guid = struct.pack("<H", tag) + bytes.fromhex("000000001000800000aa00389b71")
    return name, head + struct.pack("<HHI", 22, bits, mask) + guid


@pytest.mark.parametrize(("bits", "size"), [(24, 4), (20, 4), (16, 4), (16, 3), (12, 3)])
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_in_more_bytes_than_they_need(bits: int, size: int, upper: bool, channels: int) -> None:
    values = np.round(voice(1.0, RATE_HZ, channels).ravel() * 2 ** (bits - 1)).astype(np.int64)
    stored = (values << (8 * size - bits) if upper else values).astype("<i8").tobytes()
    data = b"".join(stored[i : i + size] for i in range(0, len(stored), 8))
    expected = (values / 2.0 ** (bits - 1)).reshape(-1, channels).mean(axis=1)
    forms = [fmt(channels=channels, bits=bits, frame_bytes=size * channels)]
    if upper or any(data[::size]):  # else nothing tells where they stand
        forms.append(extensible(bits, size * channels, channels=channels))
    for form in forms:
        clip = load(riff(form, (b"data", data)), sample_rate_hz=RATE_HZ)
        np.testing.assert_allclose(clip.samples, expected, atol=1e-6)


@pytest.mark.parametrize("upper", [True, False])
def test_where_such_samples_stand_is_told_behind_silence(upper: bool) -> None:
    values = np.concatenate([np.zeros(3 * RATE_HZ), np.round(SAMPLES[:, 0] * 2**23), np.zeros(RATE_HZ)]).astype("<i4")
    data = (values << 8 if upper else values).astype("<i4").tobytes()
    clip = load(riff(fmt(bits=24, frame_bytes=4), (b"data", data)), sample_rate_hz=RATE_HZ)
    np.testing.assert_allclose(clip.samples, values / 2**23, atol=1e-6)


@pytest.mark.parametrize("codec", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize("container", ["RF64", "BW64", "W64", "AIFF", "AU", "CAF"])
def test_other_containers_whose_length_is_no_promise(container: str, codec: str) -> None:
    data = bytearray(encoded(SAMPLES, RATE_HZ, container.replace("BW64", "RF64"), codec))
    expected = load(bytes(data), sample_rate_hz=RATE_HZ).samples
    if container == "BW64":  # another name for RF64
        data[:4] = b"BW64"
        assert_whole(bytes(data), expected)
    at, size, order = {
        "RF64": (data.find(b"ds64") + 16, 8, "little"),
        "BW64": (data.find(b"ds64") + 16, 8, "little"),
        "W64": (data.find(b"data") + 16, 8, "little"),
        "AIFF": (data.find(b"SSND") + 4, 4, "big"),
        "AU": (8, 4, "big"),
        "CAF": (data.find(b"data") + 4, 8, "big"),
    }[container]
    right = int.from_bytes(data[at : at + size], order)  # type: ignore[arg-type]
    for declared in (0, right + 36, 2**62 + 1 if size == 8 else 0xFFFF_FFFF):
        data[at : at + size] = declared.to_bytes(size, order)  # type: ignore[arg-type]
        assert_whole(bytes(data), expected)


def test_a_w64_as_ffmpeg_writes_it_holds_floats() -> None:
    """Its format is extensible; libsndfile takes the samples for integers."""
    guid = bytes.fromhex("f3acd3118cd100c04f8edb8a")
    _, form = extensible(32, 4, 4, tag=3)
    data = SAMPLES.astype("<f4").tobytes()
    chunks = b"fmt " + guid + struct.pack("<Q", 24 + len(form)) + form
    chunks += b"data" + guid + struct.pack("<Q", 24 + len(data)) + data
    head = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000") + struct.pack("<Q", 40 + len(chunks)) + b"wave" + guid
    assert_whole(head + chunks, SAMPLES[:, 0])


# Streams and containers ------------------------------------------------------------------------------------------


def test_amr_and_aac_streams_have_the_length_of_their_frames() -> None:
    """FFmpeg estimates that of AAC by the bit rate of the first frames, which silence has few of."""
    quiet = np.concatenate([np.zeros((3 * RATE_HZ, 1), np.float32), voice(3.0, RATE_HZ)])
    aac = encode_av(quiet, RATE_HZ, "adts", "aac")
    for data, length_s in ((amr(150), 3.0), (amr(150, wide=True), 3.0), (aac, 6.0)):
        assert probe(data).duration_s == pytest.approx(length_s, abs=1e-6 if data is not aac else 0.2)
        assert probe(data + data).duration_s == pytest.approx(2 * probe(data).duration_s)
        assert code_of(data[:-1]) == "truncated"
        assert code_of(data, limits=Limits(max_duration_s=length_s - 0.1)) == "too_long"
        assert code_of(data + data, limits=Limits(max_duration_s=2 * length_s - 0.1)) == "too_long"


def muxed(container: str, codec: str, starts_s: list[float]) -> bytes:
    """A second of sound at each of `starts_s`, and nine seconds of a picture, in one container."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        sound = output.add_stream(codec, rate=48_000, layout="mono") if starts_s else None
        picture = output.add_stream("mpeg4" if container != "webm" else "libvpx", rate=10)
        picture.width = picture.height = 32
        for i in range(90):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            frame.pts = i
            output.mux(picture.encode(frame))
        output.mux(picture.encode(None))
        for start_s in starts_s:
            for i in range(0, 48_000, 960):
                part = voice(1.0, 48_000)[i : i + 960].T.copy()
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 48_000, round(start_s * 48_000) + i
                output.mux(sound.encode(frame))
        if sound:
            output.mux(sound.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(("container", "codec"), [("matroska", "aac"), ("webm", "libopus"), ("mp4", "aac")])
def test_a_container_may_be_longer_than_its_sound(container: str, codec: str) -> None:
    for starts_s in ([0.0, 1.0], [6.0, 7.0], [0.0, 7.0]):
        data = muxed(container, codec, starts_s)
        assert probe(data).duration_s == pytest.approx(2.0, abs=0.1)
        assert code_of(data[: len(data) * 9 // 10]) == "truncated"
        assert code_of(data, limits=Limits(max_duration_s=1.5)) == "too_long"
    assert code_of(muxed(container, codec, [])) == "not_audio"


# Joined ----------------------------------------------------------------------------------------------------------

SNDFILE_KINDS = [("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("WAV", "PCM_16")]
SNDFILE_KINDS += [("AIFF", "PCM_16"), ("AU", "ULAW"), ("W64", "PCM_16"), ("RF64", "PCM_24"), ("CAF", "PCM_16")]


@pytest.mark.parametrize(("container", "codec"), SNDFILE_KINDS)
def test_files_put_end_to_end_are_one_recording(container: str, codec: str) -> None:
    parts = [encoded(voice(length, 48_000, seed=i), 48_000, container, codec) for i, length in enumerate((0.7, 0.4, 1))]
    whole = np.concatenate([load(part).samples for part in parts])
    joined = b"".join(parts)
    clip = load(joined)
    np.testing.assert_array_equal(clip.samples, whole)
    assert (clip.info.frames, clip.info.notice) == (len(whole), "")
    for start in (0, 33_000, 33_700, 60_000):  # before, across and behind the seams
        part = load(joined, start_s=start / 48_000, duration_s=0.5).samples
        np.testing.assert_allclose(part, whole[start : start + 24_000], atol=1e-6)
    assert code_of(joined, limits=Limits(max_duration_s=2.0)) == "too_long"
    assert audio.content_hash(joined) != audio.content_hash(parts[0])


def test_flacs_of_open_length_put_end_to_end() -> None:
    parts = [encoded(voice(1.0, RATE_HZ, seed=seed), RATE_HZ, "FLAC") for seed in (0, 1)]
    expected = np.concatenate([load(part, sample_rate_hz=RATE_HZ).samples for part in parts])
    (first, second), (first_open, second_open) = parts, map(without_length, parts)
    for joined in (first_open + second, first + second_open, first_open + second_open):
        np.testing.assert_array_equal(load(joined, sample_rate_hz=RATE_HZ).samples, expected)


@pytest.mark.parametrize("second_hz", [44_100, 22_050])
def test_mp3_files_put_end_to_end(second_hz: int) -> None:
    first = encoded(voice(2.0, 44_100), 44_100, "MP3", "MPEG_LAYER_III")
    second = encoded(voice(2.0, second_hz, seed=1), second_hz, "MP3", "MPEG_LAYER_III")
    bare, bare_second = without_xing(first), without_xing(second)  # without the frame that tells their length
    id3 = b"ID3\4\0\0\0\0\0\x14" + bytes(20)
    cover = b"ID3\4\0\0\0\x0c\0\0" + b"\xff\xd8" * (12 * 2**13)  # a picture of 192 KiB
    two = (first + second, id3 + first + id3 + second, bare + second, bare + bare_second)
    for joined in (*two, first + b"TAG" + bytes(125) + cover + second, bare + cover + second):
        clip = load(joined, sample_rate_hz=44_100)
        assert clip.info.duration_s == pytest.approx(4.0, abs=0.25)  # encoders pad
        last = voice(2.0, 44_100, seed=1)[-44_100:-20_000, 0]
        likeness = np.correlate(clip.samples[-2 * 44_100 :], last, "valid") / np.linalg.norm(last)
        assert likeness.max() > 0.9 * np.linalg.norm(last)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("webm", "libopus"), ("matroska", "aac")])
def test_containers_put_end_to_end(container: str, codec: str) -> None:
    first, second = (encode_av(voice(1.5, 48_000, seed=seed), 48_000, container, codec) for seed in (0, 1))
    whole = np.concatenate([load(first).samples, load(second).samples])
    np.testing.assert_array_equal(load(first + second).samples, whole)


def test_an_mp4_that_was_cut_or_of_which_much_is_damaged_is_not_answered() -> None:
    whole = encode_av(voice(1.0, RATE_HZ), RATE_HZ, "mp4", "aac")
    assert load(whole).info.duration_s == pytest.approx(1.0, abs=0.1)
    assert code_of(whole[: len(whole) // 2]) == "truncated"
    start, end = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    damaged = round((end - start) * 0.3)
    assert code_of(whole[: end - damaged] + b"\xff" * damaged + whole[end:]) == "corrupt"


def test_what_cannot_be_joined_is_named_and_many_can() -> None:
    first = encoded(voice(1.0, 48_000), 48_000, "OGG", "VORBIS")
    other = encoded(voice(1.0, 16_000, 2), 16_000, "OGG", "VORBIS")
    info = probe(first + other + first)
    assert info.duration_s == pytest.approx(2.0)
    assert "1 of 3 recordings" in info.notice
    assert "16000 Hz, 2 channels" in info.notice
    assert code_of(first + other[:-9]) == "truncated"
    tiny = encoded(voice(0.01, 48_000), 48_000, "OGG", "VORBIS")
    assert probe(tiny * 50).frames == 50 * 480
    assert soundfile.info(io.BytesIO(tiny * 50)).frames == 480, "libsndfile stops after the first"


# Channels that cancel --------------------------------------------------------------------------------------------


def one_voice(gains: tuple[float, ...], noise: float = 0.0) -> bytes:
    """One voice in every channel, `gains` strong."""
    base, rng = voice(3.0, RATE_HZ)[:, 0], np.random.default_rng(1)
    channels = [gain * base + noise * rng.standard_normal(len(base)) for gain in gains]
    return encoded(np.stack(channels, axis=1).astype(np.float32), RATE_HZ, "WAV", "FLOAT")


@pytest.mark.parametrize(
    ("gains", "noise", "loudest"),
    [
        ((1, -1), 0.0, {0}),
        ((0.9, -1), 0.0, {1}),
        ((1, -1), 0.005, {0, 1}),
        ((0.5, 0.5, -1.001, 0, 0, 0), 0.0, {2}),
        ((1, -1, 0, 0, 0, 0), 0.0, {0}),
    ],
)
def test_where_channels_cancel_the_loudest_is_heard(gains: tuple[float, ...], noise: float, loudest: set[int]) -> None:
    data = one_voice(gains, noise)
    clip = load_middle(data)
    assert "cancel" in clip.info.notice
    heard = int(clip.info.notice.split("channel ")[1][0])
    assert heard in loudest
    np.testing.assert_array_equal(clip.samples, load_middle(data, channel=heard).samples)


@pytest.mark.parametrize(
    "gains", [(1, 1), (1, 0), (1, -0.5), (0, 0, 0, 0, 1, 0), (1, 0.9, 0.8, -0.3, 0.2, 0.1), (0, 0)]
)
def test_other_channels_are_mixed_as_ever(gains: tuple[float, ...]) -> None:
    data = one_voice(gains)
    clip = load(data, sample_rate_hz=RATE_HZ)
    mixed = soundfile.read(io.BytesIO(data), dtype="float32")[0].mean(axis=1)
    np.testing.assert_allclose(clip.samples, mixed, atol=1e-6)
    assert clip.info.notice == ""
