"""The sound of a stream, as it comes, and parts of it as short recordings, which workers hear like any other.

A part holds one window and what resampling needs around it: its samples are those that the window would have in a
file of the whole stream. Of a stream only what the next window needs is kept. PCM becomes a WAV, the Opus of a WebM
another WebM, which begins half a second early, for Opus remembers what was before.
"""

from __future__ import annotations

import math
import struct
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass

from pipeline.audio.windows import frames_for
from serve.schema import StreamOptions
from serve.webm import OPUS_HZ, Packet, WebmReader, webm_of

_LEAD = OPUS_HZ // 2  # samples of Opus before a window
_SAMPLE_BYTES = {"s16le": 2, "f32le": 4}
_OPUS_BYTES_A_SECOND = 64_000


@dataclass(frozen=True)
class Part:
    """A recording with one window.

    Attributes:
        data: a file's content.
        start_s: where the window starts in it; ``shift_s``: where it starts in the stream, less that.
    """

    data: bytes
    start_s: float
    shift_s: float


class Tape(ABC):
    """The sound of a stream.

    Args:
        rate_hz: of the model.

    Attributes:
        frames: that have come, at ``from_hz``.
        bytes_a_second: of raw sound; of packed sound the most that encoders give.
    """

    def __init__(self, rate_hz: int, from_hz: int, bytes_a_second: int) -> None:
        self._rate_hz, self.from_hz, self.bytes_a_second = rate_hz, from_hz, bytes_a_second
        self.frames = 0
        self.ended = False

    @property
    def received_s(self) -> float:
        """How much has come."""
        return max(self.frames, 0) / self.from_hz

    @abstractmethod
    def add(self, data: bytes) -> None:
        """Take what has come.

        Raises:
            ServiceError: it cannot be read.
        """

    def holds(self, start_s: float, window_s: float) -> bool:
        """Whether all that the window needs has come, or no more will."""
        return self.ended or self.frames >= self._needed(start_s, window_s)[1]

    def part(self, start_s: float, window_s: float) -> Part:
        """A recording with the window; what came before it is forgotten."""
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
        """A recording of frames up to ``last``, from ``first`` or before, and where it begins."""


class PcmTape(Tape):
    """Raw samples, little-endian, channels interleaved; a piece may end within one."""

    def __init__(self, options: StreamOptions, rate_hz: int) -> None:
        assert options.sample_rate_hz is not None
        self._bytes, self._channels = _SAMPLE_BYTES[options.format], options.channels
        self._frame = self._bytes * self._channels
        super().__init__(rate_hz, options.sample_rate_hz, options.sample_rate_hz * self._frame)
        self._kept, self._kept_from = bytearray(), 0

    def add(self, data: bytes) -> None:
        """See Tape."""
        self._kept += data
        self.frames = self._kept_from + len(self._kept) // self._frame

    def _cut(self, first: int, last: int) -> tuple[bytes, int]:
        del self._kept[: (first - self._kept_from) * self._frame]
        self._kept_from = first
        sound = bytes(self._kept[: (min(last, self.frames) - first) * self._frame])
        return self._header(len(sound)) + sound, first

    def _header(self, size: int) -> bytes:
        """A WAV's, for ``size`` bytes of samples."""
        tag, bits = (3 if self._bytes == 4 else 1), 8 * self._bytes
        rates = self.from_hz, self.from_hz * self._frame, self._frame, bits
        form = struct.pack("<4sIHHIIHH", b"fmt ", 16, tag, self._channels, *rates)
        return struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE") + form + struct.pack("<4sI", b"data", size)


class WebmTape(Tape):
    """Opus in WebM, as MediaRecorder gives it."""

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


def tape_for(options: StreamOptions, rate_hz: int) -> Tape:
    """What takes the sound of a stream for a model that hears ``rate_hz``."""
    if options.format == "webm":
        return WebmTape(rate_hz)
    return PcmTape(options, rate_hz)


def ends(received_s: float, window_s: float, hop_s: float, heard: int) -> list[float]:
    """Where the windows start that are left when a stream ends, after ``heard`` of them."""
    last_s = received_s - window_s
    if last_s <= 0:
        return [0.0] if not heard else []
    starts = [index * hop_s for index in range(heard, math.floor(last_s / hop_s + 1e-9) + 1)]
    reached_s = starts[-1] if starts else (heard - 1) * hop_s
    return starts if last_s - reached_s <= 0.001 else [*starts, last_s]
