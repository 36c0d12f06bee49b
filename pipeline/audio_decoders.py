"""Decoders behind one face: frames [start, start + count) of a recording as float32 blocks (frames, channels).

Method: `SndfileDecoder` reads through libsndfile from a plain descriptor and seeks; `audio_av.AvDecoder` (extra `av`)
decodes from the start and drops what comes before. A block holds at most 2^16 samples over all channels.
Limits: libsndfile 1.2.2 serves MPEG audio from version 1.1 on; what it cannot open becomes `Corrupt`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import soundfile

from pipeline.audio_errors import Corrupt, ExtraNeeded, Limits, NoSamples, Truncated
from pipeline.audio_guard import Opened
from pipeline.audio_headers import ACCEPTED, Container

Block = npt.NDArray[np.float32]
BLOCK_SAMPLES = 2**16
_LENGTH_IN_HEADER_ONLY = {"FLAC", "OGG", "MP3"}  # compressed: the file's size does not tell whether all is there
_UNKNOWN_FRAMES = 2**62


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
        with _open_sndfile(file, container, limits) as decoder:
            yield decoder
        return
    if importlib.util.find_spec("av") is None:
        remedy = f"Install the extra: pip install 'ser[av]', or convert it. Accepted without it are {ACCEPTED}."
        raise ExtraNeeded(f"{file.name}: {container.name} needs PyAV. {remedy}")
    from pipeline.audio_av import open_av

    with open_av(file, container, limits) as decoder:
        yield decoder


class SndfileDecoder:
    """A recording read by libsndfile."""

    def __init__(self, file: Opened, container: Container, sound: soundfile.SoundFile) -> None:
        self.name, self.container, self.codec = file.name, container.name, str(sound.subtype)
        self.sample_rate_hz, self.channels, self.frames = int(sound.samplerate), int(sound.channels), int(sound.frames)
        self._sound = sound

    def blocks(self, start: int, count: int) -> Iterator[Block]:
        size = max(BLOCK_SAMPLES // self.channels, 1)
        try:
            if self._sound.tell() != start:
                self._sound.seek(start)
            while count:
                block = self._sound.read(min(size, count), dtype="float32", always_2d=True)
                if not len(block):
                    raise self._ends_early(self._sound.tell())
                count -= len(block)
                yield block
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise Corrupt(f"{self.name}: decoding failed ({_reason(error)}). Copy or export it again.") from error

    def check_end(self) -> None:
        """Read the last frame of a compressed recording: `Truncated` when it is not there."""
        try:
            self._sound.seek(self.frames - 1)
            if len(self._sound.read(1, dtype="float32")):
                return
        except (soundfile.SoundFileError, RuntimeError):
            pass
        raise self._ends_early(None)

    def _ends_early(self, position: int | None) -> Truncated:
        where = "before" if position is None else f"at frame {position}, expected"
        return Truncated(f"{self.name}: cut off, ends {where} its frame {self.frames}. Copy or download it again.")


@contextmanager
def _open_sndfile(file: Opened, container: Container, limits: Limits) -> Iterator[SndfileDecoder]:
    file.rewind()
    try:
        sound = soundfile.SoundFile(file.descriptor, closefd=False)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as error:
        remedy = "Copy or export it again."
        raise Corrupt(f"{file.name}: broken {container.name} header ({_reason(error)}). {remedy}") from error
    with sound:
        decoder = SndfileDecoder(file, container, sound)
        if decoder.frames <= 0:
            raise NoSamples(f"{file.name}: a {container.name} header and no samples. Record or export it again.")
        rate_hz, channels = decoder.sample_rate_hz, decoder.channels
        limits.check(file.name, rate_hz=rate_hz, channels=channels, frames=decoder.frames)
        if container.name in _LENGTH_IN_HEADER_ONLY:
            decoder.check_end()
        yield decoder


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")
