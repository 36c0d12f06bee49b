"""What a recording's header says, checked before a decoder sees a byte.

Method: the container is told from its first bytes, never from the file's name; its chunks are walked; codec tags are
compared with an allow-list, and the audio data's declared length with what the file holds.
Sources: RIFF/WAVE (Microsoft, mmreg.h), EBU Tech 3306 (RF64), Sony Wave64, Apple AIFF-C and CAF specifications, Sun
AU, RFC 9639 (FLAC), RFC 3533 and 7845 (Ogg, Opus), ISO/IEC 11172-3 (MPEG audio), ID3v2.4.
Limits: a streaming placeholder for a length is taken as "up to the end of the file" (not in W64, where libsndfile
refuses it); a length of 0 is taken at its word.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pipeline.audio_errors import Corrupt, NotAudio, Truncated, UnsupportedFormat
from pipeline.audio_guard import Opened, Splice
from pipeline.audio_streams import mp3_length, ogg_last_page_frames

ACCEPTED = "WAV, RF64, W64, AIFF, CAF, AU, FLAC, OGG (Vorbis, Opus) and MP3"
_WAV_CODECS = {1: "PCM", 3: "float", 6: "A-law", 7: "mu-law"}
_WAV_REFUSED = {2: "MS ADPCM", 0x11: "IMA ADPCM", 0x31: "GSM 6.10", 0x50: "MPEG", 0x55: "MP3", 0xFF: "AAC"}
_AIFF_CODECS = set(b"NONE sowt twos fl32 FL32 fl64 FL64 ulaw ULAW alaw ALAW in24 in32".split()) | {b"raw "}
_CAF_CODECS = {b"lpcm", b"ulaw", b"alaw"}
_AU_CODECS = {1: "mu-law", 2: "PCM", 3: "PCM", 4: "PCM", 5: "PCM", 6: "float", 7: "double", 27: "A-law"}
_OGG_CODECS = (b"\x01vorbis", b"OpusHead")
_OGG_CODECS_AV = (b"\x7fFLAC", b"Speex   ")
_W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # ends every chunk's GUID; the 4 bytes before name the chunk
_W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
_STREAMED = 0x7FFF_F000  # sox, arecord and ffmpeg write such a length or more when they cannot know it
_MAX_CHUNKS = 4096


@dataclass(frozen=True)
class Container:
    """What the first bytes tell.

    `demuxer`: the PyAV demuxer to read it with, None where libsndfile reads it. `splice`: a repair that libsndfile
    needs. `last_page_frames`: samples a channel on the last Ogg page.
    """

    name: str
    demuxer: str | None = None
    splice: Splice | None = None
    last_page_frames: int = 0


def inspect(file: Opened) -> Container:
    """Tell the container and check its header; `AudioError` for what no decoder should be given."""
    head = file.bytes_at(0, 64)
    tag, kind = head[:4], head[8:12]
    if tag in (b"RIFF", b"RIFX", b"RF64") and kind == b"WAVE":
        _check_wav(file, order=">" if tag == b"RIFX" else "<")
        return Container("RF64" if tag == b"RF64" else "WAV")
    if head[:16] == _W64_RIFF:
        _check_w64(file)
        return Container("W64")
    if tag == b"FORM" and kind in (b"AIFF", b"AIFC"):
        _check_aiff(file)
        return Container("AIFF")
    if tag == b"caff":
        return Container("CAF", splice=_check_caf(file))
    if tag in (b".snd", b"dns."):
        _check_au(file, head, order=">" if tag == b".snd" else "<")
        return Container("AU")
    if tag == b"OggS":
        return Container("OGG", _check_ogg(file), last_page_frames=ogg_last_page_frames(file))
    return _tell_compressed(file, head)


def _tell_compressed(file: Opened, head: bytes) -> Container:
    if head[4:8] == b"ftyp":
        return Container("MP4", "mov")
    if head[:4] == b"\x1aE\xdf\xa3":
        return Container("WebM", "matroska")
    if head[:5] == b"#!AMR":
        return Container("AMR", "amr")
    start, tagged = 0, head[:3] == b"ID3"
    if tagged:
        start = _id3_end(file, head)
        head = file.bytes_at(start, 64)
    if head[:4] == b"fLaC":
        return Container("FLAC")
    if len(head) >= 2 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return Container("AAC", "aac")
    if len(head) >= 2 and head[0] == 0xFF and head[1] & 0xE6 in (0xE4, 0xE6):
        raise _refused(file, "MPEG audio", f"layer {'II' if head[1] & 2 == 0 else 'I'}")
    if tagged or (len(head) >= 2 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):
        return Container("MP3", splice=mp3_length(file, start))
    raise NotAudio(f"{file.name}: not an audio file (it starts with {head[:8]!r}). Accepted are {ACCEPTED}.")


def _id3_end(file: Opened, head: bytes) -> int:
    if len(head) < 10:
        raise Truncated(f"{file.name}: {len(head)} bytes of an ID3 tag. Copy or download it again.")
    size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    end = 10 + size + (10 if head[5] & 0x10 else 0)
    if end >= file.size_bytes:
        raise Truncated(f"{file.name}: nothing follows its ID3 tag. Copy or download it again.")
    return end


def _check_wav(file: Opened, order: str) -> None:
    position, frame_bytes, data_bytes_64 = 12, 0, None
    for _ in range(_MAX_CHUNKS):
        header = file.bytes_at(position, 8)
        if len(header) < 8:
            break
        name, size = header[:4], int.from_bytes(header[4:], "little" if order == "<" else "big")
        body = position + 8
        if name == b"fmt ":
            frame_bytes = _check_wav_format(file, file.bytes_at(body, min(size, 40)), order)
        elif name == b"ds64":
            data_bytes_64 = int.from_bytes(file.bytes_at(body + 8, 8), "little")
        elif name == b"data":
            if not frame_bytes:
                raise Corrupt(f"{file.name}: its data comes before its format. Export it again.")
            if size == 0xFFFF_FFFF and data_bytes_64 is not None:
                return _check_length(file, body, data_bytes_64, frame_bytes, streamed=2**63)
            return _check_length(file, body, size, frame_bytes)
        position = body + size + size % 2
    raise _no_audio_data(file)


def _check_wav_format(file: Opened, body: bytes, order: str) -> int:
    """Bytes of one frame, by the `fmt ` chunk; raises for a codec outside the allow-list."""
    if len(body) < 16:
        raise Truncated(f"{file.name}: its format chunk is {len(body)} bytes, expected 16 or more. Export it again.")
    tag, channels, rate_hz, _, frame_bytes, bits = struct.unpack(order + "HHIIHH", body[:16])
    if tag == 0xFFFE and len(body) >= 26:
        (tag,) = struct.unpack(order + "H", body[24:26])  # the sub-format's GUID starts with the codec's tag
    if tag not in _WAV_CODECS:
        raise _refused(file, "WAV", _WAV_REFUSED.get(tag, f"codec 0x{tag:04X}"))
    if not channels or not rate_hz or bits not in (8, 12, 16, 20, 24, 32, 64):
        raise Corrupt(f"{file.name}: header with {channels} channels, {rate_hz} Hz, {bits} bits. Export it again.")
    if frame_bytes != channels * -(-bits // 8):
        raise Corrupt(f"{file.name}: {frame_bytes} bytes a frame for {channels} x {bits} bits. Export it again.")
    return int(frame_bytes)


def _check_w64(file: Opened) -> None:
    position, frame_bytes = 40, 0
    for _ in range(_MAX_CHUNKS):
        header = file.bytes_at(position, 24)
        if len(header) < 24:
            break
        name, size = header[:4], int.from_bytes(header[16:], "little")
        if header[4:16] == _W64_TAIL and name == b"fmt ":
            frame_bytes = _check_wav_format(file, file.bytes_at(position + 24, 40), "<")
        elif header[4:16] == _W64_TAIL and name == b"data":
            if not frame_bytes:
                raise Corrupt(f"{file.name}: its data comes before its format. Export it again.")
            return _check_length(file, position + 24, max(size - 24, 0), frame_bytes, streamed=2**62)
        position += max(size + -size % 8, 24)
    raise _no_audio_data(file)


def _check_aiff(file: Opened) -> None:
    position, frame_bytes = 12, 0
    for _ in range(_MAX_CHUNKS):
        header = file.bytes_at(position, 8)
        if len(header) < 8:
            break
        name, size = header[:4], int.from_bytes(header[4:], "big")
        if name == b"COMM":
            body = file.bytes_at(position + 8, min(size, 22))
            if len(body) < 18:
                raise Truncated(f"{file.name}: its COMM chunk is cut off. Export it again.")
            channels, _, bits = struct.unpack(">HIH", body[:8])
            if file.bytes_at(8, 4) == b"AIFC" and body[18:22] not in _AIFF_CODECS:
                raise _refused(file, "AIFF", f"codec {body[18:22]!r}")
            frame_bytes = max(channels * -(-bits // 8), 1)
        elif name == b"SSND":
            return _check_length(file, position + 16, max(size - 8, 0), max(frame_bytes, 1))
        position += 8 + size + size % 2
    raise _no_audio_data(file)


def _check_caf(file: Opened) -> Splice | None:
    """The repair of a length that the recorder did not write (-1), which libsndfile refuses."""
    position = 8
    for _ in range(_MAX_CHUNKS):
        header = file.bytes_at(position, 12)
        if len(header) < 12:
            break
        name, size = header[:4], int.from_bytes(header[4:], "big", signed=True)
        if name == b"desc":
            codec = file.bytes_at(position + 20, 4)
            if codec not in _CAF_CODECS:
                raise _refused(file, "CAF", f"codec {codec!r}")
        elif name == b"data" and size == -1:
            return Splice(position + 4, 8, max(file.size_bytes - position - 12, 0).to_bytes(8, "big"))
        elif name == b"data":
            _check_length(file, position + 12, size, 1, streamed=2**63)
            return None
        if size < 0:
            break
        position += 12 + size
    raise _no_audio_data(file)


def _check_au(file: Opened, head: bytes, order: str) -> None:
    if len(head) < 24:
        raise Truncated(f"{file.name}: {len(head)} bytes of an AU header of 24. Copy or download it again.")
    offset, size, encoding = struct.unpack(order + "III", head[4:16])
    if encoding not in _AU_CODECS:
        raise _refused(file, "AU", f"encoding {encoding}")
    _check_length(file, offset, size, 1)


def _check_ogg(file: Opened) -> str | None:
    """The PyAV demuxer for the codecs that libsndfile does not read in Ogg."""
    first = file.bytes_at(0, 27 + 255 + 8)
    if len(first) < 28 or len(first) < 27 + first[26] + 8:
        raise Truncated(f"{file.name}: {len(first)} bytes of an Ogg page. Copy or download it again.")
    packet = first[27 + first[26] :]
    if not packet.startswith(_OGG_CODECS + _OGG_CODECS_AV):
        raise _refused(file, "OGG", f"codec {packet[:8]!r}")
    return "ogg" if packet.startswith(_OGG_CODECS_AV) else None


def _check_length(file: Opened, start: int, declared: int, frame_bytes: int, streamed: int = _STREAMED) -> None:
    """Raise `Truncated` where `declared` bytes of audio from `start` reach past the file's end by a frame or more."""
    present = max(file.size_bytes - start, 0)
    if 0 < declared < streamed and declared - present >= frame_bytes:
        share = f"{present} of {declared} bytes of audio"
        raise Truncated(f"{file.name}: cut off, {share} are there. Copy or download it again.")


def _refused(file: Opened, container: str, codec: str) -> UnsupportedFormat:
    remedy = "Convert it, for example: ffmpeg -i IN -c:a pcm_s16le OUT.wav"
    return UnsupportedFormat(f"{file.name}: {container} with {codec} is not accepted. {remedy}")


def _no_audio_data(file: Opened) -> Truncated:
    return Truncated(f"{file.name}: ends before its audio data starts. Copy or download it again.")
