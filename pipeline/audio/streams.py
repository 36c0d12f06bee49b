"""The real length of an Ogg, MP3, AMR or AAC stream, from its pages and frame headers.

Ogg: the headers of all pages are read, and the last page must be complete. A page that begins a new stream after the
first streams have had data starts another recording. The samples on the last page are counted, because libsndfile
1.2.2 seeks wrongly into the last page of a Vorbis stream (off by the samples trimmed at its end).
MP3: without a Xing, Info or VBRI frame, libsndfile estimates the length from the first frame, which can be wrong by
half, and stops there. So all frames are counted, and a Xing frame with the count is put in front. Frames beyond the
length in a Xing frame, or frames of another rate, mean that several files were joined.
Sources: RFC 3533 (Ogg), ISO/IEC 11172-3 and 13818-3 (MPEG audio), the Xing header as LAME writes it, RFC 4867 (AMR),
ISO/IEC 13818-7 (ADTS).
Limits: a recording cut exactly between two Ogg pages, or two frames of an MP3 without Xing frame, passes as complete.
Ogg's end-of-stream flag does not help: Android's writer (AOSP `OggWriter`) and Telegram's voice messages never set it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from pipeline.audio.lengths import cut_off, find
from pipeline.audio.source import REMEDY, Opened, Splice
from pipeline.storage.errors import Corrupt, UnsupportedFormat

_SCAN_BYTES = 2**20
_JUNK_BYTES = 2**16  # searched for an MP3 frame, before the first one or between two
_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # MPEG-1 layer III
_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # MPEG-2 and 2.5
_RATES_HZ = (44_100, 48_000, 32_000)
_XING_BITRATE = 9  # index of a bit rate whose frames have room for a Xing header at every sample rate
_MAX_TAGS = 8  # between two files put end to end
_CHAIN = 4  # frames in a row; fewer may be chance
_OGG_AUDIO = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")
_AMR_NB_BYTES = (12, 13, 15, 17, 19, 20, 26, 31, 5, 6, 5, 5, 0, 0, 0, 0)  # of a frame, after its first byte
_AMR_WB_BYTES = (17, 23, 32, 36, 40, 46, 50, 58, 60, 5, 0, 0, 0, 0, 0, 0)
_BEGINS_STREAM = 2  # an Ogg page's flag


class Link(NamedTuple):
    """An Ogg recording: first bytes of each stream, samples on the last page, byte offset where the recording ends."""

    packets: tuple[bytes, ...]
    last_page_frames: int
    end: int


def ogg_link(file: Opened) -> Link:
    """The first recording in an Ogg file. Raises `Truncated` when its last page is incomplete."""
    packets: list[bytes] = []
    position, granule, before, data_seen = 0, 0, 0, False
    while True:
        head = file.bytes_at(position, 27 + 255 + 8)
        if head[:4] != b"OggS":
            if head and b"OggS".startswith(head[:4]):
                raise cut_off(file, "an Ogg page")
            position = find(file, b"OggS\0", position)
            if position < 0:  # only a tag or other appended data is left
                return _link(file, packets, granule - before, file.size_bytes)
            continue
        body = position + 27 + (head[26] if len(head) > 26 else 255)
        end = body + sum(head[27 : body - position])
        if end > file.size_bytes or len(head) < body - position:
            raise cut_off(file, "an Ogg page")
        if head[5] & _BEGINS_STREAM:
            if data_seen:
                return _link(file, packets, granule - before, position)
            packets.append(head[body - position :][:8])
        else:
            data_seen = True
        before, granule = granule, max(int.from_bytes(head[6:14], "little", signed=True), 0)
        position = end
        if position >= file.size_bytes:
            return _link(file, packets, granule - before, position)


def _link(file: Opened, packets: list[bytes], last_page_frames: int, end: int) -> Link:
    if not any(packet.startswith(_OGG_AUDIO) for packet in packets):
        codec = packets[0] if packets else b""
        raise UnsupportedFormat(f"{file.name}: OGG with codec {codec!r} is not accepted. {REMEDY}")
    return Link(tuple(packets), max(last_page_frames, 0), end)


def amr_end(file: Opened, head: bytes) -> int:
    """Offset of another AMR file after this one, or 0. Raises `Truncated` for a cut last frame."""
    wide = head.startswith(b"#!AMR-WB")
    sizes = _AMR_WB_BYTES if wide else _AMR_NB_BYTES
    position = head.find(b"\n") + 1
    while first := file.bytes_at(position, 1):
        if first == b"#" and file.bytes_at(position, 5) == b"#!AMR":
            return position
        position += 1 + sizes[first[0] >> 3 & 15]
    if position > file.size_bytes:
        raise cut_off(file, "its last frame")
    return 0


def check_adts(file: Opened) -> None:
    """Raise `Truncated` if the last frame of an AAC stream is cut; FFmpeg would silently drop it."""
    position = 0
    while len(head := file.bytes_at(position, 7)) == 7 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        if size < 7:
            return
        position += size
    if position > file.size_bytes or (head and head[0] == 0xFF and len(head) < 7):
        raise cut_off(file, "its last frame")


class Xing(NamedTuple):
    """`splice`: the Xing frame to put into an MP3 without one; `joined`: several MP3 files were put end to end."""

    splice: Splice | None
    joined: bool


def mpeg_start(file: Opened) -> int | None:
    """Offset of the first MPEG frame: 0, or the first place where `_CHAIN` frames follow each other; None without."""
    head = file.bytes_at(0, 4)
    if len(head) >= 2 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2:
        return 0
    data = file.bytes_at(0, _JUNK_BYTES)
    at = data.find(b"\xff")
    while at >= 0:
        if _chained(file, at):
            return at
        at = data.find(b"\xff", at + 1)
    return None


def mp3_length(file: Opened, start: int) -> Xing:
    """Count the frames of an MP3 that begins at `start` or soon after, where it does not state its own length.

    Raises `Corrupt` if there is no frame, `Truncated` if the last frame is cut.
    """
    first = _next_frame(file, start)
    if first is None:
        raise Corrupt(f"{file.name}: no MP3 frame where its audio should start. Export it again.")
    head = file.bytes_at(first, 64)
    size = _told_bytes(head)
    if size is not None:
        end = _next_frame(file, _behind_tags(file, first + size)) if 0 < size < file.size_bytes - first else None
        return Xing(None, joined=end is not None and _chained(file, end))
    count, stopped = _count_frames(file, first)
    other = _next_frame(file, stopped) if stopped < file.size_bytes else None
    joined = other is not None and _chained(file, other)
    return Xing(None if joined else Splice(first, 0, _xing_frame(head, count)), joined)


def _behind_tags(file: Opened, position: int) -> int:
    """Offset after the ID3 and APE tags at `position`; such tags lie between files put end to end."""
    for _ in range(_MAX_TAGS):
        head = file.bytes_at(position, 32)
        if head[:3] == b"TAG":
            position += 128
        elif head[:3] == b"ID3" and len(head) >= 10:
            position += id3_bytes(head)
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            header = 32 if head[23] & 0x20 else 0
            position += header + (int.from_bytes(head[12:16], "little") if header else 32)
        else:
            break
    return min(position, file.size_bytes)


def id3_bytes(head: bytes) -> int:
    """Bytes of the ID3v2 tag with this header of 10 bytes or more."""
    size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    return int(10 + size + (10 if head[5] & 0x10 else 0))  # the flag: a footer follows


def _told_bytes(head: bytes) -> int | None:
    """Stream length in bytes, from its Xing, Info or VBRI frame; 0 if that omits it; None without such a frame."""
    if (at := head.find(b"VBRI")) >= 0:
        return int.from_bytes(head[at + 10 : at + 14], "big")
    at = max(head.find(b"Xing"), head.find(b"Info"))
    if at < 0:
        return None
    flags = int.from_bytes(head[at + 4 : at + 8], "big")
    at += 8 + (4 if flags & 1 else 0)
    return int.from_bytes(head[at : at + 4], "big") if flags & 2 else 0


def _chained(file: Opened, at: int) -> bool:
    """Whether `_CHAIN` frames of one stream follow each other, starting at `at`."""
    stream = None
    for _ in range(_CHAIN):
        frame = _frame(file.bytes_at(at, 4))
        if frame is None or stream not in (None, frame.stream):
            return False
        stream, at = frame.stream, at + frame.size_bytes
    return True


class _Frame(NamedTuple):
    stream: int  # version and rate, the same in all frames of a stream
    size_bytes: int
    side_bytes: int  # side information; a Xing header follows it


def _frame(header: bytes) -> _Frame | None:
    """The layer III frame with this 4-byte header, or None."""
    return _parse_frame(int.from_bytes(header, "big") & 0xFFFE_FEC0) if len(header) == 4 else None


@lru_cache(maxsize=4096)
def _parse_frame(header: int) -> _Frame | None:
    version, layer, bitrate, rate = header >> 19 & 3, header >> 17 & 3, header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
        return None
    mpeg_1, mono = version == 3, header >> 6 & 3 == 3
    rate_hz = _RATES_HZ[rate] // {3: 1, 2: 2, 0: 4}[version]
    samples, kbps = (1152, _KBPS_1[bitrate]) if mpeg_1 else (576, _KBPS_2[bitrate])
    size_bytes = samples * kbps * 125 // rate_hz + (header >> 9 & 1)
    return _Frame(version << 2 | rate, size_bytes, (17 if mono else 32) if mpeg_1 else (9 if mono else 17))


def _next_frame(file: Opened, start: int, stream: int | None = None) -> int | None:
    """Offset of the first frame at or after `start` that is followed by another of its stream, a tag or the end."""
    data = file.bytes_at(start, _JUNK_BYTES)
    at = data.find(b"\xff")
    while at >= 0:
        frame = _frame(data[at : at + 4])
        if frame and stream in (None, frame.stream):
            following = file.bytes_at(start + at + frame.size_bytes, 4)
            after = _frame(following)
            if not following or following[:3] == b"TAG" or (after and after.stream == frame.stream):
                return start + at
        at = data.find(b"\xff", at + 1)
    return None


def _count_frames(file: Opened, first: int) -> tuple[int, int]:
    """(number of whole frames from `first` to the end of the stream, offset of that end); junk between is skipped."""
    stream = (_frame(file.bytes_at(first, 4)) or _Frame(0, 0, 0)).stream
    count, position, base, data = 0, first, first, b""
    while True:
        at = position - base
        if at + 4 > len(data):
            base, data, at = position, file.bytes_at(position, _SCAN_BYTES), 0
        frame = _frame(data[at : at + 4])
        if frame and frame.stream == stream:
            position += frame.size_bytes
            count += 1
            continue
        if position > file.size_bytes:
            raise cut_off(file, "its last MP3 frame")
        if len(data) - at < 4:
            return count, position
        position = _behind_tags(file, position)  # a tag with a picture can be longer than `_JUNK_BYTES`
        resumed = _next_frame(file, position, stream)
        if resumed is None:
            return count, position
        position = resumed


def _xing_frame(head: bytes, frames: int) -> bytes:
    header = bytes([head[0], head[1] | 1, _XING_BITRATE << 4 | head[2] & 0x0C, head[3]])
    frame = _frame(header)
    assert frame is not None
    body = b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return (header + bytes(frame.side_bytes) + body).ljust(frame.size_bytes, b"\0")
