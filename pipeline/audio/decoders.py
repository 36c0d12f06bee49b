"""Decoders with one interface: frames [start, start + count) of a recording as float32 blocks (frames, channels).

Method: `SndfileDecoder` (libsndfile) seeks. `pyav.AvDecoder` (FFmpeg) decodes from the start and drops the frames
before `start`. Files that a library cannot open raise `Corrupt`, without the library's own message.

libmpg123 prints warnings on damaged MP3 files. So C's ``stderr`` stream is pointed at /dev/null while an MP3 is open;
Python's ``sys.stderr`` and faulthandler still work. Limits: GNU libc only, whose ``stderr`` is a variable.

Recordings put end to end in one file (chained Ogg streams, files joined by ``cat``) are read as one. Each is opened to
find its length, and again to read its frames. Those with another rate or number of channels than the first are left
out, with a notice. (FFmpeg itself reads joined MP3 and AAC streams.) Limits: in FLAC files above 8 MiB, only the part
after the first recording's last frame is searched for another; one of exactly the same length may be missed.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import soundfile

from pipeline.audio.headers import Container, inspect
from pipeline.audio.lengths import next_flac
from pipeline.audio.source import SNDFILE, FileView, Opened
from pipeline.storage.errors import Corrupt, ExtraNeeded, Limits, NoSamples, Truncated

_lock = threading.Lock()
_open = 0  # number of callers inside `quiet_c_stderr`


@contextmanager
def quiet_c_stderr() -> Iterator[None]:
    """Within this context, output of C code to its ``stderr`` is discarded."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(step: int) -> None:
    """Change the number of callers by ``step``; redirect the stream while there are any."""
    global _open
    with _lock:
        _open += step
        if (streams := _streams()) is not None:
            variable, loud, silent = streams
            variable.value = silent if _open else loud


@lru_cache(maxsize=1)
def _streams() -> tuple[ctypes.c_void_p, int | None, int] | None:
    """(C's variable ``stderr``, its stream, a stream to /dev/null); None without GNU libc."""
    try:
        library = ctypes.CDLL(None)
    except TypeError:  # Windows requires a name
        return None
    if not hasattr(library, "gnu_get_libc_version"):
        return None
    library.fopen.restype = ctypes.c_void_p
    silent = library.fopen(b"/dev/null", b"we")
    variable = ctypes.c_void_p.in_dll(library, "stderr")
    return (variable, variable.value, silent) if silent else None


Block = npt.NDArray[np.float32]
BLOCK_SAMPLES = 2**16  # at most in one block of `SndfileDecoder`, over all channels
_UNKNOWN_FRAMES = 2**62  # libsndfile reports 2^63 - 1 if a header leaves the length open
_INT16_STEP = np.float32(2.0**-15)
_READ_AHEAD_BYTES = 2**17  # libsndfile and libFLAC read no further ahead
_LAP_FRAMES = 8192  # the largest Vorbis block; the first one after a seek can lack its overlap (libsndfile issue 885)


class Decoder(Protocol):
    """An open recording."""

    name: str  # in messages
    container: str
    codec: str
    sample_rate_hz: int
    channels: int
    frames: int  # samples per channel
    notice: str  # a remark for users, usually ""
    next_at: int  # offset in the file where another recording begins, or 0

    def blocks(self, start: int, count: int) -> Iterator[Block]:
        """Frames [start, start + count) in order, float32 (n, channels). `Truncated` if the recording ends earlier.

        May be called repeatedly, but not while another iteration is running.
        """
        ...


@contextmanager
def open_decoder(container: Container, limits: Limits) -> Iterator[Decoder]:
    """The decoder of one recording; its limits are checked, and it has at least one frame."""
    with ExitStack() as stack:
        if container.demuxer is None:
            if container.name == "MP3":
                stack.enter_context(quiet_c_stderr())
            yield SndfileDecoder(container, limits, stack)
            return
        try:
            from pipeline.audio.pyav import AvDecoder
        except ImportError as error:
            problem = f"{container.name} needs PyAV, which is not installed, or not for this system"
            remedy = f"pip install av, or convert the file; formats read without it: {SNDFILE}"
            raise ExtraNeeded(f"{container.file.name}: {problem}. {remedy}.") from error
        yield AvDecoder(container, limits)


class _Sound(soundfile.SoundFile):  # type: ignore[misc]
    """A `SoundFile` without the extra seek to its current position that follows every read.

    That seek decodes one more FLAC frame per block, and fails in a stream whose header leaves its length open.
    """

    def seekable(self) -> bool:
        return False


class SndfileDecoder:
    """A recording read by libsndfile. Its files are closed with `stack`."""

    def __init__(self, container: Container, limits: Limits, stack: ExitStack) -> None:
        self._file, self._container = container.file, container
        self._view: FileView | None = None
        self._sound = self._opened()
        stack.callback(lambda: self._sound.close())
        self.name, self.container, self.codec = container.file.name, container.name, str(self._sound.subtype)
        self.sample_rate_hz, self.channels = int(self._sound.samplerate), int(self._sound.channels)
        self.frames, self.notice, self.next_at = int(self._sound.frames), "", container.length
        self._gain = np.float32(container.gain)
        self._unseekable = self.frames >= _UNKNOWN_FRAMES
        self._lap, self._last_seek = 0, self.frames
        if self._unseekable:
            self._count_frames(limits)
            self._last_seek = 0
        elif self.codec == "VORBIS":
            self._lap, self._last_seek = _LAP_FRAMES, self.frames - container.last_page_frames - _LAP_FRAMES
        if self.frames <= 0:
            raise NoSamples(f"{self.name}: a {container.name} header and no samples. Record or export it again.")
        self._check(limits)
        if container.name in ("FLAC", "MP3") and not self._unseekable:
            self._check_end()
        if container.name == "FLAC" and not self._unseekable and not self.next_at:
            self.next_at = next_flac(self._file, max(self._position() - _READ_AHEAD_BYTES, 4))

    def blocks(self, start: int, count: int) -> Iterator[Block]:
        with self._coded():
            skipped = self._seek(start)
            while skipped:
                skipped -= len(self._read(min(skipped, self._block_frames)))
            while count:
                block = self._read(min(count, self._block_frames))
                count -= len(block)
                yield block

    def _count_frames(self, limits: Limits) -> None:
        """Decode everything to set `frames`, which the header leaves open. Raises where a limit is exceeded."""
        self.frames = 0
        with self._coded():
            while block := len(self._sound.read(self._block_frames, dtype="float32", always_2d=True)):
                self.frames += block
                self._check(limits)

    def _check(self, limits: Limits) -> None:
        limits.check(self.name, rate_hz=self.sample_rate_hz, channels=self.channels, frames=self.frames)

    def _check_end(self) -> None:
        """Read the last frame; `Truncated` if it is missing. The size of a compressed file does not show that."""
        try:
            self._sound.seek(self.frames - 1)
            if len(self._sound.read(1, dtype="float32")):
                return
        except soundfile.SoundFileError:
            pass
        raise Truncated(f"{self.name}: cut off before its frame {self.frames}. Copy or download it again.")

    @property
    def _block_frames(self) -> int:
        return max(BLOCK_SAMPLES // self.channels, 1)

    def _seek(self, start: int) -> int:
        """Seek to `start` or before it; return the number of frames to drop."""
        if self._unseekable:  # a stream of open length cannot seek back after it was read to its end
            self._sound.close()
            self._sound = self._opened()
        target = max(min(start - self._lap, self._last_seek), 0)
        if self._sound.tell() != target:
            self._sound.seek(target)
        return start - target

    @contextmanager
    def _coded(self) -> Iterator[None]:
        try:
            yield
        except soundfile.SoundFileError as error:
            raise Corrupt(f"{self.name}: its {self._container.name} audio is damaged. Export it again.") from error

    def _read(self, count: int) -> Block:
        block: Block
        if self.codec == "PCM_16":  # three times as fast as libsndfile's conversion, same values
            block = np.multiply(self._sound.read(count, dtype="int16", always_2d=True), _INT16_STEP, dtype=np.float32)
        else:
            block = self._sound.read(count, dtype="float32", always_2d=True)
        if self._gain != 1:
            block = block * self._gain
        if not len(block):
            at = f"{self._sound.tell()} of its {self.frames} frames"
            raise Truncated(f"{self.name}: cut off, ends after {at}. Copy or download it again.")
        return block

    def _opened(self) -> _Sound:
        """The file, from its start."""
        file, splice = self._file, self._container.splice
        try:
            if file.descriptor is None or splice:
                self._view = FileView(file, splice)
                return _Sound(self._view)
            os.lseek(file.descriptor, 0, os.SEEK_SET)
            return _Sound(file.descriptor, closefd=False)
        except (soundfile.SoundFileError, ValueError, TypeError) as error:
            problem = f"its {self._container.name} header cannot be read"
            raise Corrupt(f"{file.name}: {problem}. Copy or export it again.") from error

    def _position(self) -> int:
        """Offset in the file up to which libsndfile has read."""
        if self._view is not None:
            return self._view.tell()
        assert self._file.descriptor is not None
        return os.lseek(self._file.descriptor, 0, os.SEEK_CUR)


_MOST = 10_000  # recordings in one file


_Parts = list[tuple[Container, int]]  # with their numbers of frames


class JoinedDecoder:
    """Several recordings read as one; rate, channels, container and codec are those of the first."""

    next_at = 0

    def __init__(self, first: Decoder, parts: _Parts, left_out: list[str], limits: Limits) -> None:
        self.name, self.container, self.codec = first.name, first.container, first.codec
        self.sample_rate_hz, self.channels = first.sample_rate_hz, first.channels
        self.frames = sum(frames for _, frames in parts)
        self._parts, self._limits = parts, limits
        self.notice = ""
        if left_out:
            total = len(parts) + len(left_out)
            these = f"{len(left_out)} of {total} recordings in this file were left out ({left_out[0]}"
            self.notice = f"{these}; the first has {self.sample_rate_hz} Hz and {self.channels} channels)"

    def blocks(self, start: int, count: int) -> Iterator[Block]:
        for container, frames in self._parts:
            if start < frames and count:
                here = min(count, frames - start)
                with open_decoder(container, self._limits) as decoder:
                    yield from decoder.blocks(start, here)
                start, count = 0, count - here
            else:
                start -= frames


@contextmanager
def open_recording(file: Opened, limits: Limits) -> Iterator[Decoder]:
    """The decoder of all recordings in `file` together; its limits are checked, and it has at least one frame."""
    container = inspect(file)
    with open_decoder(container, limits) as first:
        if not first.next_at:
            yield first
            return
        parts, left_out = [(replace(container, length=first.next_at), first.frames)], list[str]()
        rest, place = container.whole, first.next_at
    while place:
        if len(parts) + len(left_out) >= _MOST:
            raise Corrupt(f"{file.name}: more than {_MOST} recordings in one file. Split it.")
        rest = rest.part(place, rest.size_bytes)
        container = inspect(rest)
        with open_decoder(container, limits) as decoder:
            if (decoder.sample_rate_hz, decoder.channels) == (first.sample_rate_hz, first.channels):
                parts.append((replace(container, length=decoder.next_at), decoder.frames))
                frames = sum(frames for _, frames in parts)
                limits.check(file.name, rate_hz=first.sample_rate_hz, channels=first.channels, frames=frames)
            else:
                left_out.append(f"{decoder.sample_rate_hz} Hz, {decoder.channels} channels")
            rest, place = container.whole, decoder.next_at
    yield JoinedDecoder(first, parts, left_out, limits)
