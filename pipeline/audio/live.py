"""Buffers the audio of a live stream and cuts each window out of it as a short recording, read like any other file.

A part holds one window plus the margin that resampling needs, so its samples equal those of the whole stream in one
file. PCM becomes a WAV file, Opus in WebM another WebM file that begins half a second early, because Opus decoding
depends on earlier packets. Browsers' MediaRecorder sends a WebM in pieces of any size, and only the first piece has a
header. So the Opus packets are extracted without decoding.
Sources: RFC 8794 (EBML), RFC 9559 (Matroska), RFC 6716 section 3 (duration of an Opus packet), RFC 7845 (OpusHead).
Limits: only the first audio track is read; it must be Opus of one or two channels, without lacing and compression, as
browsers write it.
"""

from __future__ import annotations

import struct
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass

from pipeline.audio.wav import header_of
from pipeline.audio.windows import SlidingWindow, frames_for
from pipeline.storage.errors import BadChannels, Corrupt, NotAudio, UnsupportedFormat

OPUS_HZ = 48_000
_EBML, _SEGMENT, _CLUSTER, _TRACKS, _TRACK, _AUDIO = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE, 0xE1
_BLOCK_GROUP, _BLOCK, _SIMPLE_BLOCK, _DISCARD = 0xA0, 0xA1, 0xA3, 0x75A2
_NUMBER, _TYPE, _CODEC, _PRIVATE, _DELAY, _ENCODINGS = 0xD7, 0x83, 0x86, 0x63A2, 0x56AA, 0x6D80
_ENTERED = frozenset((_SEGMENT, _CLUSTER, _TRACKS, _TRACK, _AUDIO, _BLOCK_GROUP))
_KEPT = frozenset((_NUMBER, _TYPE, _CODEC, _PRIVATE, _DELAY, _ENCODINGS, _BLOCK, _SIMPLE_BLOCK, _DISCARD))
_MOST_BYTES = 2**16  # of an element that is read; an Opus packet has at most 61,298
_MOST_SKIPPED = 2**20  # bytes of an element that is skipped
_MOST_TRACKS = 8
_LONGEST = 5_760  # samples of an Opus packet at 48 kHz: 120 ms


@dataclass(frozen=True)
class Packet:
    """An Opus packet."""

    data: bytes
    samples: int  # that it decodes to, at 48 kHz


class WebmReader:
    """Extracts the Opus packets of a WebM stream; ``head`` (its OpusHead) and ``delay_ns`` are set with the first one.

    ``discard``: padding samples at the end of the newest packet.
    """

    def __init__(self) -> None:
        self.head, self.delay_ns, self.discard = b"", 0, 0
        self._waiting = bytearray()
        self._skip, self._begun = 0, False
        self._tracks: list[dict[int, bytes]] = []
        self._number: int | None = None

    @property
    def pre_skip(self) -> int:
        """Samples at the start of the stream that a decoder must drop."""
        return int.from_bytes(self.head[10:12], "little")

    def add(self, data: bytes) -> list[Packet]:
        """Take the next bytes; return the packets that are now complete. Raises AudioError if the stream is refused."""
        self._waiting += data
        packets: list[Packet] = []
        at = 0
        while True:
            dropped = min(self._skip, len(self._waiting) - at)
            at, self._skip = at + dropped, self._skip - dropped
            header = None if self._skip else _header(self._waiting, at)
            if header is None:
                break
            name, size, body = header
            if not self._begun and name != _EBML:
                raise NotAudio("this is not WebM; send the data of MediaRecorder, starting with its first chunk")
            self._begun = True
            if name in _ENTERED:
                at = body
                if name == _TRACK:
                    self._tracks.append({})
                    if len(self._tracks) > _MOST_TRACKS:
                        raise _corrupt("it has too many tracks")
            elif size is None or size > (_MOST_BYTES if name in _KEPT else _MOST_SKIPPED):
                raise _corrupt("an element is too large")
            elif name not in _KEPT:
                at, self._skip = body, size
            elif body + size > len(self._waiting):
                break
            else:
                at = body + size
                packets += self._take(name, bytes(self._waiting[body:at]))
        del self._waiting[:at]
        return packets

    def _take(self, name: int, value: bytes) -> list[Packet]:
        if name in (_BLOCK, _SIMPLE_BLOCK):
            return self._packets(value)
        if name == _DISCARD:
            self.discard = min(int.from_bytes(value[:8], "big") * OPUS_HZ // 1_000_000_000, _LONGEST)
        elif self._tracks:
            self._tracks[-1][name] = value
        return []

    def _packets(self, block: bytes) -> list[Packet]:
        if self._number is None:
            self._number = self._chosen()
        number = _number(block, 0, keep_marker=False)
        if number is None or len(block) < number[1] + 4:
            raise _corrupt("a block is empty")
        track, at = number
        if track != self._number:
            return []
        if block[at + 2] & 0x06:
            raise UnsupportedFormat("WebM with lacing is not accepted; send the data of MediaRecorder unchanged")
        packet, self.discard = block[at + 3 :], 0
        return [Packet(packet, _samples(packet))]

    def _chosen(self) -> int:
        """The number of the first audio track. Raises `AudioError` unless it is Opus of one or two channels."""
        track = next((track for track in self._tracks if track.get(_TYPE) == b"\x02"), None)
        if track is None:
            raise NotAudio("a WebM without an audio track; record a stream that has one")
        head, codec = track.get(_PRIVATE, b""), track.get(_CODEC, b"").rstrip(b"\0")
        if codec != b"A_OPUS" or _ENCODINGS in track:
            raise UnsupportedFormat("a WebM must hold Opus; record with mimeType audio/webm;codecs=opus, or send PCM")
        if len(head) != 19 or not head.startswith(b"OpusHead") or head[9] not in (1, 2) or head[18]:
            raise BadChannels("only Opus of one or two channels is accepted; record fewer channels, or send PCM")
        self.head, self.delay_ns = head, int.from_bytes(track.get(_DELAY, b"")[:8], "big")
        return int.from_bytes(track.get(_NUMBER, b"\x01")[:8], "big")


def webm_of(packets: list[Packet], head: bytes, delay_ns: int) -> bytes:
    """A complete WebM file of these packets, at most 30 s of them (block times are 16-bit milliseconds)."""
    delay = _element(_DELAY, delay_ns.to_bytes(8, "big")) if delay_ns else b""
    audio = _element(_AUDIO, _element(0xB5, struct.pack(">d", OPUS_HZ)) + _element(0x9F, head[9:10]))
    track = [(_NUMBER, b"\x01"), (0x73C5, b"\x01"), (_TYPE, b"\x02"), (_CODEC, b"A_OPUS"), (_PRIVATE, head)]
    tracks = _element(_TRACK, b"".join(_element(*pair) for pair in track) + delay + audio)
    blocks, passed = [_element(0xE7, b"\0")], 0
    for packet in packets:
        time_ms = passed * 1000 // OPUS_HZ
        blocks.append(_element(_SIMPLE_BLOCK, b"\x81" + struct.pack(">hB", time_ms, 0x80) + packet.data))
        passed += packet.samples
    info = _element(0x1549A966, _element(0x2AD7B1, (1_000_000).to_bytes(4, "big")))
    segment = _element(_SEGMENT, info + _element(_TRACKS, tracks) + _element(_CLUSTER, b"".join(blocks)))
    return _element(_EBML, _element(0x4282, b"webm")) + segment


def _samples(packet: bytes) -> int:
    """Number of samples at 48 kHz that an Opus packet decodes to."""
    kind, count = packet[0] >> 3, packet[0] & 3
    if kind < 12:
        frame = (480, 960, 1_920, 2_880)[kind % 4]
    else:
        frame = (480, 960)[kind % 2] if kind < 16 else (120, 240, 480, 960)[kind % 4]
    if count == 3 and len(packet) < 2:
        raise _corrupt("an Opus packet is cut off")
    frames = packet[1] & 0x3F if count == 3 else min(count, 1) + 1
    if not 0 < frame * frames <= _LONGEST:
        raise _corrupt("an Opus packet is longer than 120 ms, or empty")
    return frame * frames


def _header(data: bytearray, at: int) -> tuple[int, int | None, int] | None:
    """(id, size or None if unknown, offset of the body) of the element at ``at``; None if more data is needed."""
    name = _number(data, at, keep_marker=True, longest=4)
    size = None if name is None else _number(data, name[1], keep_marker=False)
    if name is None or size is None:
        return None
    length = size[1] - name[1]
    return name[0], None if size[0] == 2 ** (7 * length) - 1 else size[0], size[1]


def _number(data: bytes | bytearray, at: int, *, keep_marker: bool, longest: int = 8) -> tuple[int, int] | None:
    """(value, end offset) of the variable-length number at ``at``; None if it is incomplete."""
    if at >= len(data):
        return None
    length = 9 - data[at].bit_length()
    if length > longest:
        raise _corrupt("it holds an invalid number")
    if at + length > len(data):
        return None
    value = int.from_bytes(data[at : at + length], "big")
    return value if keep_marker else value & (2 ** (7 * length) - 1), at + length


def _element(name: int, body: bytes) -> bytes:
    size = len(body) | 1 << 28  # four bytes
    return name.to_bytes((name.bit_length() + 7) // 8, "big") + size.to_bytes(4, "big") + body


def _corrupt(what: str) -> Corrupt:
    return Corrupt(f"the WebM cannot be read: {what}; start a new recording")


_LEAD = OPUS_HZ // 2  # samples of Opus decoded before a window
SAMPLE_BYTES = {"s16le": 2, "f32le": 4}
_OPUS_BYTES_A_SECOND = 64_000


@dataclass(frozen=True)
class Part:
    """A short recording that holds one window."""

    data: bytes  # an audio file
    start_s: float  # where the window starts in it
    shift_s: float  # where it starts in the stream


class Tape(ABC):
    """The received audio of a stream, for a model with sample rate ``rate_hz``.

    ``frames``: number received so far, at ``from_hz``. ``bytes_a_second``: of raw audio, or at most from encoders.
    """

    def __init__(self, rate_hz: int, from_hz: int, bytes_a_second: int) -> None:
        self._rate_hz, self.from_hz, self.bytes_a_second = rate_hz, from_hz, bytes_a_second
        self.frames = 0
        self.ended = False

    @property
    def received_s(self) -> float:
        """Seconds received so far."""
        return max(self.frames, 0) / self.from_hz

    @abstractmethod
    def add(self, data: bytes) -> None:
        """Append received bytes. Raises AudioError if they cannot be read."""

    def holds(self, start_s: float, window_s: float) -> bool:
        """Whether all audio for the window has been received, or the stream has ended."""
        return self.ended or self.frames >= self._needed(start_s, window_s)[1]

    def part(self, start_s: float, window_s: float) -> Part:
        """A recording with the window; older audio is dropped."""
        sample = round(start_s * self._rate_hz)
        first, last = self._needed(start_s, window_s)
        data, first = self._cut(first, last)
        in_part_s = (sample - first * self._rate_hz // self.from_hz) / self._rate_hz
        return Part(data, in_part_s, start_s - in_part_s)

    def _needed(self, start_s: float, window_s: float) -> tuple[int, int]:
        count = round(window_s * self._rate_hz)
        return frames_for(round(start_s * self._rate_hz), count, sys.maxsize, self.from_hz, self._rate_hz)

    @abstractmethod
    def _cut(self, first: int, last: int) -> tuple[bytes, int]:
        """(file content, its first frame): the frames from ``first`` or earlier up to ``last``."""


class PcmTape(Tape):
    """Raw samples, little-endian, channels interleaved; a received chunk may end within a sample."""

    def __init__(self, rate_hz: int, sample_format: str, from_hz: int, channels: int) -> None:
        self._bytes, self._channels = SAMPLE_BYTES[sample_format], channels
        self._frame = self._bytes * self._channels
        super().__init__(rate_hz, from_hz, from_hz * self._frame)
        self._kept, self._kept_from = bytearray(), 0

    def add(self, data: bytes) -> None:
        """See Tape."""
        self._kept += data
        self.frames = self._kept_from + len(self._kept) // self._frame

    def _cut(self, first: int, last: int) -> tuple[bytes, int]:
        del self._kept[: (first - self._kept_from) * self._frame]
        self._kept_from = first
        sound = bytes(self._kept[: (min(last, self.frames) - first) * self._frame])
        tag, bits = (3 if self._bytes == 4 else 1), 8 * self._bytes  # float or PCM
        byte_rate = self.from_hz * self._frame
        form = struct.pack("<HHIIHH", tag, self._channels, self.from_hz, byte_rate, self._frame, bits)
        return header_of(form, len(sound)) + sound, first


class WebmTape(Tape):
    """Opus in WebM, as MediaRecorder produces it."""

    def __init__(self, rate_hz: int) -> None:
        super().__init__(rate_hz, OPUS_HZ, _OPUS_BYTES_A_SECOND)
        self._reader = WebmReader()
        self._kept: list[Packet] = []
        self._kept_from = self._samples = 0

    def add(self, data: bytes) -> None:
        """See Tape."""
        packets = self._reader.add(data)
        self._kept += packets
        self._samples += sum(packet.samples for packet in packets)
        self.frames = self._samples - self._reader.pre_skip - self._reader.discard

    def _cut(self, first: int, last: int) -> tuple[bytes, int]:
        while self._kept_from + self._kept[0].samples <= first - _LEAD:
            self._kept_from += self._kept.pop(0).samples
        taken, reached = [], self._kept_from - self._reader.pre_skip
        for packet in self._kept:
            if reached >= last:
                break
            taken.append(packet)
            reached += packet.samples
        return webm_of(taken, self._reader.head, self._reader.delay_ns), self._kept_from


def ends(received_s: float, window_s: float, hop_s: float, done: int) -> list[float]:
    """Start times of the remaining windows when a stream ends, after ``done`` windows were analysed."""
    return SlidingWindow(window_s, hop_s).starts(received_s)[done:]
