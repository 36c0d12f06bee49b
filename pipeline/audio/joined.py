"""Recordings put end to end in one file, read as one: chained Ogg streams, and files joined by ``cat``.

Method: each is opened in turn to learn its length, and again when its frames are asked for, so that a thousand of them
hold no more memory than one. Those at another rate, or with another number of channels, than the first are left out,
and a notice says so. (FFmpeg reads MP3 and AAC streams that are joined by itself, see ``audio_av``.)
Limits: of FLAC files above 8 MiB only the part behind the last frame of the first is searched for another; one that is
as long as the first, to the sample, may not be found there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from pipeline.audio.decoders import Block, Decoder, open_decoder
from pipeline.audio.errors import Corrupt, Limits
from pipeline.audio.headers import Container, inspect
from pipeline.audio.source import Opened

_MOST = 10_000


@dataclass(frozen=True)
class _Part:
    container: Container
    frames: int


class JoinedDecoder:
    """Several recordings in a row; rate, channels, container and codec are those of the first."""

    next_at = 0

    def __init__(self, first: Decoder, parts: list[_Part], left_out: list[str], limits: Limits) -> None:
        self.name, self.container, self.codec = first.name, first.container, first.codec
        self.sample_rate_hz, self.channels = first.sample_rate_hz, first.channels
        self.frames = sum(part.frames for part in parts)
        self._parts, self._limits = parts, limits
        self.notice = ""
        if left_out:
            total = len(parts) + len(left_out)
            these = f"{len(left_out)} of {total} recordings in this file were left out ({left_out[0]}"
            self.notice = f"{these}; the first has {self.sample_rate_hz} Hz and {self.channels} channels)"

    def blocks(self, start: int, count: int) -> Iterator[Block]:
        for part in self._parts:
            if start < part.frames and count:
                here = min(count, part.frames - start)
                with open_decoder(part.container, self._limits) as decoder:
                    yield from decoder.blocks(start, here)
                start, count = 0, count - here
            else:
                start -= part.frames


def _part(container: Container, decoder: Decoder) -> _Part:
    return _Part(replace(container, length=decoder.next_at), decoder.frames)


@contextmanager
def open_recording(file: Opened, limits: Limits) -> Iterator[Decoder]:
    """The decoder for all that `file` holds, its limits checked, at least one frame long."""
    container = inspect(file)
    with open_decoder(container, limits) as first:
        if not first.next_at:
            yield first
            return
        parts, left_out = [_part(container, first)], list[str]()
        rest, place = container.whole, first.next_at
    while place:
        if len(parts) + len(left_out) >= _MOST:
            raise Corrupt(f"{file.name}: more than {_MOST} recordings in one file. Split it.")
        rest = rest.part(place, rest.size_bytes)
        container = inspect(rest)
        with open_decoder(container, limits) as decoder:
            if (decoder.sample_rate_hz, decoder.channels) == (first.sample_rate_hz, first.channels):
                parts.append(_part(container, decoder))
                frames = sum(part.frames for part in parts)
                limits.check(file.name, rate_hz=first.sample_rate_hz, channels=first.channels, frames=frames)
            else:
                left_out.append(f"{decoder.sample_rate_hz} Hz, {decoder.channels} channels")
            rest, place = container.whole, decoder.next_at
    yield JoinedDecoder(first, parts, left_out, limits)
