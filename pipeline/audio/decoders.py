"""Decoders behind one face: frames [start, start + count) of a recording as float32 blocks (frames, channels).

Method: `SndfileDecoder` reads through libsndfile from a plain descriptor, or through Python where there is none, and
seeks; `audio_av.AvDecoder` (PyAV) decodes from the start and drops what comes before. Files put end to end are read as
one by `audio_joined`. A block holds at most 2^16 samples over all channels.
Limits: libsndfile 1.2.2 serves MPEG audio from version 1.1 on; what it cannot open becomes `Corrupt`. What its MP3
decoder prints on damaged files is swallowed (`audio_quiet`). Neither's own messages are shown to users.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import soundfile

from pipeline.audio.errors import Corrupt, ExtraNeeded, Limits, NoSamples, Truncated
from pipeline.audio.formats import SNDFILE
from pipeline.audio.headers import Container
from pipeline.audio.lengths import next_flac
from pipeline.audio.quiet import quiet_c_stderr
from pipeline.audio.source import FileView

Block = npt.NDArray[np.float32]
BLOCK_SAMPLES = 2**16
_UNKNOWN_FRAMES = 2**62  # libsndfile says 2^63 - 1 where a header leaves the length open
_INT16_STEP = np.float32(2.0**-15)
_READ_AHEAD_BYTES = 2**17  # libsndfile and libFLAC read no further ahead
_LAP_FRAMES = 8192  # the largest Vorbis block; what a seek yields first can lack its overlap (libsndfile issue 885)


class Decoder(Protocol):
    """An open recording.

    `frames`: its length in samples a channel; `name`: how messages call it; `notice`: what users should know of it, ""
    mostly; `next_at`: where in the file another recording begins, 0 where none does.
    """

    name: str
    container: str
    codec: str
    sample_rate_hz: int
    channels: int
    frames: int
    notice: str
    next_at: int

    def blocks(self, start: int, count: int) -> Iterator[Block]:
        """Frames [start, start + count) in order, float32 (n, channels); `Truncated` if the recording ends before.

        To be called as often as needed, but one at a time.
        """
        ...


@contextmanager
def open_decoder(container: Container, limits: Limits) -> Iterator[Decoder]:
    """The decoder for one recording, its limits checked, at least one frame long."""
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
            remedy = f"pip install av, or convert the file; read without it are {SNDFILE}"
            raise ExtraNeeded(f"{container.file.name}: {problem}. {remedy}.") from error
        yield AvDecoder(container, limits)


class _Sound(soundfile.SoundFile):  # type: ignore[misc]
    """A `SoundFile` that does not seek to where it already is after every read.

    That costs a FLAC one more decoded frame a block, and fails in a stream whose header leaves its length open.
    """

    def seekable(self) -> bool:
        return False


class SndfileDecoder:
    """A recording read by libsndfile. What it opens is closed with `stack`."""

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
        """Set `frames`, which the header leaves open, by decoding everything; stops at the limits."""
        self.frames = 0
        with self._coded():
            while block := len(self._sound.read(self._block_frames, dtype="float32", always_2d=True)):
                self.frames += block
                self._check(limits)

    def _check(self, limits: Limits) -> None:
        limits.check(self.name, rate_hz=self.sample_rate_hz, channels=self.channels, frames=self.frames)

    def _check_end(self) -> None:
        """Read the last frame, `Truncated` when it is not there: of a compressed file the size tells nothing."""
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
        """Go to `start` or before it; how many frames there are to drop."""
        if self._unseekable:  # once read to its end, a stream of open length cannot go back
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
        if self.codec == "PCM_16":  # three times as fast as libsndfile's conversion, and the same
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
        """How far libsndfile has read in the file."""
        if self._view is not None:
            return self._view.tell()
        assert self._file.descriptor is not None
        return os.lseek(self._file.descriptor, 0, os.SEEK_CUR)
