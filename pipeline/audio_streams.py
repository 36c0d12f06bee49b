"""How long an Ogg or MP3 stream really is, from its pages and frame headers, where libsndfile would be wrong.

Method, Ogg: the last page must lie whole in the file; how much it holds is told, because libsndfile 1.2.2 seeks wrongly
into the last page of a Vorbis stream (off by the samples trimmed at its end).
Method, MP3: without a Xing, Info or VBRI frame the length is estimated from the first frame, wrong by half for variable
bit rates, and reading stops there; so the frame headers are counted and a Xing frame with that count is put in front.
Sources: RFC 3533 (Ogg), ISO/IEC 11172-3 and 13818-3 (MPEG audio), the Xing header as LAME writes it.
Limits: a recording cut between two frames of an MP3 without Xing frame, or between two Ogg pages, is taken for a whole
one. Ogg's end-of-stream flag would tell, but Android's own writer (AOSP `OggWriter`) and Telegram's voice messages
never set it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from pipeline.audio_errors import Corrupt, Truncated
from pipeline.audio_guard import Opened, Splice

_OGG_TAIL_BYTES = 2**17  # two pages of the largest size, 65,307 bytes
_SCAN_BYTES = 2**20
_JUNK_BYTES = 2**16  # what may stand before the first MP3 frame, or between two
_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # MPEG-1 layer III
_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # MPEG-2 and 2.5
_RATES_HZ = (44_100, 48_000, 32_000)
_XING_BITRATE = 9  # index of a bit rate whose frames have room for a Xing header at every sample rate


def ogg_last_page_frames(file: Opened) -> int:
    """Samples a channel on the last page. Raises `Truncated` when that page is not all there."""
    tail = file.bytes_at(max(file.size_bytes - _OGG_TAIL_BYTES, 0), _OGG_TAIL_BYTES)
    last = tail.rfind(b"OggS\0")
    end = _ogg_page_end(tail, last)
    rest = tail[end : end + 4]
    if last < 0 or end > len(tail) or (rest and b"OggS".startswith(rest)):
        raise Truncated(f"{file.name}: cut off within an Ogg page. Copy or download it again.")
    before = tail.rfind(b"OggS\0", 0, last)
    return max(_granule(tail, last) - (_granule(tail, before) if before >= 0 else 0), 0)


def _ogg_page_end(data: bytes, page: int) -> int:
    """Where the page that starts at `page` ends; past the end of `data` when even its header is cut."""
    segments = data[page + 26] if page + 26 < len(data) else 255
    table = data[page + 27 : page + 27 + segments]
    return page + 27 + segments + sum(table) if len(table) == segments else len(data) + 1


def _granule(data: bytes, page: int) -> int:
    return max(int.from_bytes(data[page + 6 : page + 14], "little", signed=True), 0)


def mp3_length(file: Opened, start: int) -> Splice | None:
    """The Xing frame to put into an MP3 that has none; `start`: where its ID3 tag ends. None where it has one.

    Raises `Corrupt` without any frame, `Truncated` when the last frame is cut.
    """
    first = _next_frame(file, start)
    if first is None:
        raise Corrupt(f"{file.name}: no MP3 frame where its audio should start. Export it again.")
    head = file.bytes_at(first, 64)
    if any(mark in head for mark in (b"Xing", b"Info", b"VBRI")):
        return None
    return Splice(first, 0, _xing_frame(head, _count_frames(file, first)))


class _Frame(NamedTuple):
    stream: int  # version and rate, the same in all frames of a stream
    size_bytes: int
    side_bytes: int  # side information, which a Xing header stands behind


def _frame(header: bytes) -> _Frame | None:
    """The layer III frame that these 4 bytes start, or None."""
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
    """Position of the first frame from `start` on that another of its stream follows (or the end of the file)."""
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


def _count_frames(file: Opened, first: int) -> int:
    """Whole frames from `first` to the end of the stream, junk between them skipped."""
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
            raise Truncated(f"{file.name}: cut off within its last MP3 frame. Copy or download it again.")
        if len(data) - at < 4 or data[at : at + 3] == b"TAG":  # ID3v1 ends the file
            return count
        resumed = _next_frame(file, position, stream)
        if resumed is None:
            return count
        position = resumed


def _xing_frame(head: bytes, frames: int) -> bytes:
    header = bytes([head[0], head[1] | 1, _XING_BITRATE << 4 | head[2] & 0x0C, head[3]])
    frame = _frame(header)
    assert frame is not None
    body = b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return (header + bytes(frame.side_bytes) + body).ljust(frame.size_bytes, b"\0")
