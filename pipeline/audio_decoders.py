"""Decoders behind one face: frames [start, start + count) of a recording as float32 blocks (frames, channels).

Method: `SndfileDecoder` reads through libsndfile from a plain descriptor and seeks; `audio_av.AvDecoder` (extra `av`)
decodes from the start and drops what comes before. A block holds at most 2^16 samples over all channels.
Limits: libsndfile 1.2.2 serves MPEG audio from version 1.1 on; what it cannot open becomes `Corrupt`. What its MP3
decoder prints on damaged files is swallowed (`audio_quiet`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import numpy as np
import numpy.typing as npt
import soundfile

from pipeline.audio_errors import Corrupt, ExtraNeeded, Limits, NoSamples, Truncated
from pipeline.audio_guard import FileView, Opened
from pipeline.audio_headers import ACCEPTED, Container
from pipeline.audio_quiet import quiet_c_stderr

Block = npt.NDArray[np.float32]
BLOCK_SAMPLES = 2**16
_UNKNOWN_FRAMES = 2**62  # libsndfile says 2^63 - 1 where a header leaves the length open
_INT16_STEP = np.float32(2.0**-15)
_LAP_FRAMES = 8192  # the largest Vorbis block; what a seek yields first can lack its overlap (libsndfile issue 885)


class Decoder(Protocol):
    """An open recording. `frames` is its length in samples a channel; `name` is how messages call it."""

    name: str
    container: str
    codec: str
    sample_rate_hz: int
    channels: int
    frames: int

    def blocks(self, start: int, count: int) -> Iterator[Block]:
        """Frames [start, start + count) in order, float32 (n, channels); `Truncated` if the recording ends before."""
        ...


@contextmanager
def open_decoder(file: Opened, container: Container, limits: Limits) -> Iterator[Decoder]:
    """The decoder for `file`, its limits checked, at least one frame long."""
    if container.demuxer is None:
        with (
            quiet_c_stderr() if container.name == "MP3" else nullcontext(),
            _open_sndfile(file, container, limits) as decoder,
        ):
            yield decoder
        return
    if importlib.util.find_spec("av") is None:
        remedy = "Install it with pip install 'speech-emotion-ray[av]', or convert the file"
        problem = f"{container.name} needs the extra 'av' (PyAV)"
        raise ExtraNeeded(f"{file.name}: {problem}. {remedy}; accepted without it are {ACCEPTED}.")
    from pipeline.audio_av import open_av

    with open_av(file, container, limits) as decoder:
        yield decoder


class _Sound(soundfile.SoundFile):  # type: ignore[misc]
    """A `SoundFile` that does not seek to where it already is after every read.

    That costs a FLAC one more decoded frame a block, and fails in a stream whose header leaves its length open.
    """

    def seekable(self) -> bool:
        return False


class SndfileDecoder:
    """A recording read by libsndfile."""

    def __init__(self, file: Opened, container: Container, sound: _Sound, counted_frames: int | None = None) -> None:
        self.name, self.container, self.codec = file.name, container.name, str(sound.subtype)
        self.sample_rate_hz, self.channels = int(sound.samplerate), int(sound.channels)
        self.frames = int(sound.frames) if counted_frames is None else counted_frames
        self._sound = sound
        self._lap, self._last_seek = 0, self.frames
        if counted_frames is not None:
            self._last_seek = 0
        elif self.codec == "VORBIS":
            self._lap, self._last_seek = _LAP_FRAMES, self.frames - container.last_page_frames - _LAP_FRAMES

    def blocks(self, start: int, count: int) -> Iterator[Block]:
        with self._coded():
            skipped = self._seek(start)
            while skipped:
                skipped -= len(self._read(min(skipped, self._block_frames)))
            while count:
                block = self._read(min(count, self._block_frames))
                count -= len(block)
                yield block

    def count_frames(self, limits: Limits) -> None:
        """Set `frames`, which the header leaves open, by decoding everything; stops at the limits."""
        self.frames = 0
        with self._coded():
            while block := len(self._sound.read(self._block_frames, dtype="float32", always_2d=True)):
                self.frames += block
                self.check(limits)

    def check(self, limits: Limits) -> None:
        limits.check(self.name, rate_hz=self.sample_rate_hz, channels=self.channels, frames=self.frames)

    def check_end(self) -> None:
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
        target = max(min(start - self._lap, self._last_seek), 0)
        if self._sound.tell() != target:
            self._sound.seek(target)
        return start - target

    @contextmanager
    def _coded(self) -> Iterator[None]:
        try:
            yield
        except soundfile.SoundFileError as error:
            raise Corrupt(f"{self.name}: decoding failed ({_reason(error)}). Export it again.") from error

    def _read(self, count: int) -> Block:
        block: Block
        if self.codec == "PCM_16":  # three times as fast as libsndfile's conversion, and the same
            block = np.multiply(self._sound.read(count, dtype="int16", always_2d=True), _INT16_STEP, dtype=np.float32)
        else:
            block = self._sound.read(count, dtype="float32", always_2d=True)
        if not len(block):
            at = f"{self._sound.tell()} of its {self.frames} frames"
            raise Truncated(f"{self.name}: cut off, ends after {at}. Copy or download it again.")
        return block


@contextmanager
def _open_sndfile(file: Opened, container: Container, limits: Limits) -> Iterator[SndfileDecoder]:
    counted_frames = None
    with _sound(file, container) as sound:
        decoder = SndfileDecoder(file, container, sound)
        if decoder.frames >= _UNKNOWN_FRAMES:
            decoder.count_frames(limits)
            counted_frames = decoder.frames
        if decoder.frames <= 0:
            raise NoSamples(f"{file.name}: a {container.name} header and no samples. Record or export it again.")
        decoder.check(limits)
        if counted_frames is None:
            if container.name in ("FLAC", "MP3"):
                decoder.check_end()
            yield decoder
            return
    with _sound(file, container) as sound:  # once read to its end, a stream of open length cannot go back
        yield SndfileDecoder(file, container, sound, counted_frames)


def _sound(file: Opened, container: Container) -> _Sound:
    try:
        if file.descriptor is None or container.splice:
            return _Sound(FileView(file, container.splice))
        os.lseek(file.descriptor, 0, os.SEEK_SET)
        return _Sound(file.descriptor, closefd=False)
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        problem = f"broken {container.name} header ({_reason(error)})"
        raise Corrupt(f"{file.name}: {problem}. Copy or export it again.") from error


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")
