"""Decodes what libsndfile cannot read, through PyAV (FFmpeg): m4a, mp4, webm, AMR, AAC, WMA and more.

Method: `headers` names the demuxer and the codec must be on a list, so FFmpeg neither guesses nor follows playlists.
The first audio track is decoded from its start to count its samples, and again for each request of frames. Short
recordings are kept in memory after the first pass. All audio present is joined; the length that the container
states and gaps between packets are ignored. Encoder delay is trimmed as FFmpeg does it. If rate or channels change
within the track, the rest is converted to those of the beginning.
Limits: no seeking, so reading the middle of a long recording decodes everything before it, in little memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import Flags2
from av.stream import Discard

from pipeline.audio.headers import Container
from pipeline.audio.lengths import cut_off
from pipeline.audio.source import CODECS, REMEDY, FileView, is_accepted
from pipeline.storage.errors import Corrupt, Limits, NoSamples, NotAudio, Truncated, UnsupportedFormat

Block = npt.NDArray[np.float32]
_KEPT_BYTES = 2**25
_LARGEST_ALLOCATION = 2**27  # the index of ten hours of AAC takes half of it
_BAD_PACKETS, _BAD_SHARE = 8, 0.02  # damaged packets tolerated: 8 plus 2 % of those read
_LOST_SHARE = 0.1  # tolerated in the whole recording; matters in short ones, where 8 packets are many
_BLOCK_SAMPLES = 2**14
_SCALES = {  # sample format: (factor to +-1, value of silence)
    **dict.fromkeys(("flt", "fltp", "dbl", "dblp"), (1.0, 0.0)),
    **dict.fromkeys(("s16", "s16p"), (2.0**-15, 0.0)),
    **dict.fromkeys(("s32", "s32p"), (2.0**-31, 0.0)),
    **dict.fromkeys(("u8", "u8p"), (2.0**-7, 128.0)),
}
_OPTIONS = {"codec_whitelist": ",".join(sorted(CODECS))}  # no other decoder is opened, above all none for pictures


class AvDecoder:
    """The first audio track of a container, read by FFmpeg."""

    def __init__(self, container: Container, limits: Limits) -> None:
        self.name, self.container, self.codec = container.file.name, container.name, ""
        self.sample_rate_hz, self.channels, self.frames = 0, 0, 0
        self.notice, self.next_at = "", container.length
        self._file, self._demuxer, self._splice = container.file, container.demuxer, container.splice
        _limit_allocations()
        kept: list[Block] | None = []
        for block in self._decoded():
            if not self.channels:
                self.channels = block.shape[1]
            self.frames += len(block)
            limits.check(self.name, rate_hz=self.sample_rate_hz, channels=self.channels, frames=self.frames)
            if kept is not None and self.frames * self.channels * 4 <= _KEPT_BYTES:
                kept.append(block)
            else:
                kept = None
        self._kept = kept
        if not self.frames:
            raise NoSamples(f"{self.name}: an audio track of 0 samples. Record or export it again.")

    def blocks(self, start: int, count: int) -> Iterator[Block]:
        position = 0
        for block in self._decoded() if self._kept is None else self._kept:
            part = block[max(start - position, 0) : max(start + count - position, 0)]
            position += len(block)
            if len(part):
                yield part
            if position >= start + count:
                return
        raise Truncated(f"{self.name}: cut off, ends after {position} frames. Copy or download it again.")

    def _decoded(self) -> Iterator[Block]:
        """All blocks from the start."""
        view = FileView(self._file, self._splice)
        try:
            opened = av.open(view, "r", format=self._demuxer, metadata_errors="ignore", options=_OPTIONS)
        except (av.FFmpegError, ValueError, OverflowError) as error:
            raise self.broken("its header") from error
        with opened:
            converter, held, size = _Converter(self), list[Block](), 0
            for frame in self._frames(opened, self._track(opened), view):
                for block in converter.blocks(frame):
                    held.append(block)
                    size += block.size
                    if size >= _BLOCK_SAMPLES:
                        yield np.concatenate(held)
                        held, size = [], 0
            held += converter.rest()
            if held:
                yield np.concatenate(held)

    def _frames(self, opened: Any, stream: Any, view: FileView) -> Iterator[Any]:
        packets = bad = 0
        cut = False
        try:
            for packet in opened.demux(stream):
                if packet.size:
                    packets, cut = packets + 1, packet.is_corrupt
                try:
                    frames = packet.decode()
                except (av.FFmpegError, ValueError) as error:
                    bad, frames = bad + 1, []
                    if bad > _BAD_PACKETS + _BAD_SHARE * packets:
                        raise self.broken("its audio") from error
                yield from frames
        except (av.FFmpegError, OverflowError, IndexError) as error:  # IndexError: a stream that appears on the way
            if view.tell() >= self._file.size_bytes:
                raise cut_off(self._file, "its last packet") from error
            raise self.broken("its packets") from error
        if cut:
            raise cut_off(self._file, "its last packet")
        if bad and (bad == packets or bad > max(1, _LOST_SHARE * packets)):
            raise self.broken("its audio")
        if bad:
            self.notice = f"{bad} of its {packets} packets are damaged and were left out"

    def _track(self, opened: Any) -> Any:
        if not opened.streams.audio:
            raise NotAudio(f"{self.name}: {self.container} without an audio track. Give the recording itself.")
        stream = opened.streams.audio[0]
        self.codec = stream.codec_context.name if stream.codec_context else "an unknown codec"
        if not is_accepted(self.codec):
            raise UnsupportedFormat(f"{self.name}: {self.container} with {self.codec} is not accepted. {REMEDY}")
        if self.container == "CAF" and self.codec == "alac":  # its padding is no part of the last packet
            stream.codec_context.flags2 |= Flags2.skip_manual
        for other in opened.streams:
            if other.index != stream.index:
                other.discard = Discard.all
        return stream

    def broken(self, what: str) -> Corrupt:
        return Corrupt(f"{self.name}: {what} cannot be decoded ({self.container}). Export it again.")


@lru_cache(maxsize=1)
def _limit_allocations() -> None:
    """Limit FFmpeg's single allocations, so that a forged header cannot exhaust memory; PyAV has no call for that.

    Limits: has no effect on Windows, where a library's own dependencies cannot be searched for a function.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(av._core.__file__).av_max_alloc(ctypes.c_size_t(_LARGEST_ALLOCATION))


class _Converter:
    """Converts frames to float32 blocks (n, channels), all with the rate and channels of the first frame."""

    def __init__(self, decoder: AvDecoder) -> None:
        self._decoder = decoder
        self._first: tuple[str, int] | None = None
        self._shape: tuple[str, str, int] | None = None
        self._resampler: Any = None

    def blocks(self, frame: Any) -> list[Block]:
        name, layout, rate_hz = frame.format.name, frame.layout.name, frame.sample_rate
        if self._first is None:
            self._first, self._decoder.sample_rate_hz = (layout, rate_hz), rate_hz
        rest: list[Block] = []
        if self._shape != (name, layout, rate_hz):
            rest, self._shape = self.rest(), (name, layout, rate_hz)
            if (layout, rate_hz) != self._first or name not in _SCALES:
                first_layout, first_hz = self._first
                self._resampler = av.AudioResampler(format="fltp", layout=first_layout, rate=first_hz)
        if self._resampler is not None:
            return rest + self._resampled(frame)
        return [*rest, _block(frame)]

    def rest(self) -> list[Block]:
        """Samples left in the resampler."""
        blocks = [] if self._resampler is None else self._resampled(None)
        self._resampler = None
        return blocks

    def _resampled(self, frame: Any) -> list[Block]:
        try:
            return [_block(converted) for converted in self._resampler.resample(frame)]
        except (av.FFmpegError, ValueError) as error:
            raise self._decoder.broken("its audio") from error


def _block(frame: Any) -> Block:
    """Samples (n, channels) of a frame, planar or interleaved; integers are scaled to +-1."""
    name, samples = frame.format.name, frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    scale, offset = _SCALES[name]
    if name in ("flt", "fltp"):
        return np.ascontiguousarray(samples, np.float32)
    block: Block = np.multiply(samples - np.float32(offset) if offset else samples, np.float32(scale), dtype=np.float32)
    return block
