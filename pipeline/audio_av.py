"""m4a, mp4, webm, aac and amr through PyAV (FFmpeg), the optional extra `av`.

Method: the demuxer is named by our own look at the file and the codec must be on a list, so that FFmpeg neither guesses
nor follows playlists; the first audio track is decoded twice from its start, once to count its samples, once to hand
out the frames asked for; what comes before them is dropped as it passes. Encoder delay is trimmed as FFmpeg does it.
Limits: no seeking, so the middle of a long recording costs the decoding of all of it, and little memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
import numpy as np

from pipeline.audio_decoders import Block
from pipeline.audio_errors import Corrupt, Limits, NoSamples, NotAudio, Truncated, UnsupportedFormat
from pipeline.audio_guard import FileView, Opened
from pipeline.audio_headers import Container

_CODECS = {"aac", "mp3", "mp3float", "opus", "vorbis", "flac", "alac", "speex", "amrnb", "amrwb", "amr_nb", "amr_wb"}
_LENGTH_TOLERANCE_S = 0.5  # containers round, and count what decoders trim


class AvDecoder:
    """The first audio track of a container, read by FFmpeg."""

    def __init__(self, file: Opened, container: Container, limits: Limits) -> None:
        self.name, self.container, self.codec = file.name, container.name, ""
        self.sample_rate_hz, self.channels, self.frames = 0, 0, 0
        self._file, self._demuxer, self._limits = file, container.demuxer, limits
        declared_s = 0.0
        for block, rate_hz, declared_s in self._decoded():
            if not self.frames:
                self.sample_rate_hz, self.channels = rate_hz, block.shape[1]
                self._check(round(declared_s * rate_hz))
            self.frames += len(block)
            self._check(self.frames)
        if not self.frames:
            raise NoSamples(f"{self.name}: an audio track of 0 samples. Record or export it again.")
        length_s = self.frames / self.sample_rate_hz
        if length_s < declared_s - _LENGTH_TOLERANCE_S:
            found = f"{length_s:.2f} of {declared_s:.2f} s are there"
            raise Truncated(f"{self.name}: cut off, {found}. Copy or download it again.")

    def blocks(self, start: int, count: int) -> Iterator[Block]:
        position = 0
        for block, _, _ in self._decoded():
            part = block[max(start - position, 0) : start + count - position]
            position += len(block)
            if len(part):
                yield part
            if position >= start + count:
                return
        raise Truncated(f"{self.name}: cut off, ends after {position} frames. Copy or download it again.")

    def _check(self, frames: int) -> None:
        self._limits.check(self.name, rate_hz=self.sample_rate_hz, channels=self.channels, frames=frames)

    def _decoded(self) -> Iterator[tuple[Block, int, float]]:
        """All blocks from the start, each with its rate in Hz and the length in seconds that the container declares."""
        try:
            with av.open(FileView(self._file), "r", format=self._demuxer, metadata_errors="ignore") as opened:
                stream = self._track(opened)
                base = stream.time_base
                declared_s = float(stream.duration * base) if stream.duration and base else 0.0
                if not declared_s and opened.duration:
                    declared_s = opened.duration / av.time_base
                planar = av.AudioResampler(format="fltp")
                for frame in opened.decode(stream):
                    for converted in planar.resample(frame):
                        yield self._block(converted), converted.sample_rate, declared_s
        except (av.FFmpegError, ValueError) as error:
            problem = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise Corrupt(f"{self.name}: decoding {self.container} failed ({problem}). Export it again.") from error

    def _track(self, opened: Any) -> Any:
        if not opened.streams.audio:
            raise NotAudio(f"{self.name}: {self.container} without an audio track. Give the recording itself.")
        stream = opened.streams.audio[0]
        self.codec = stream.codec_context.name
        if self.codec not in _CODECS and not self.codec.startswith("pcm_"):
            remedy = "Convert it, for example: ffmpeg -i IN -c:a pcm_s16le OUT.wav"
            raise UnsupportedFormat(f"{self.name}: {self.container} with {self.codec} is not accepted. {remedy}")
        return stream

    def _block(self, frame: Any) -> Block:
        block: Block = np.ascontiguousarray(frame.to_ndarray().T, np.float32)
        if self.frames and (frame.sample_rate != self.sample_rate_hz or block.shape[1] != self.channels):
            got = f"{frame.sample_rate} Hz and {block.shape[1]} channels"
            raise Corrupt(f"{self.name}: changes to {got} on its way. Export it again.")
        return block


@contextmanager
def open_av(file: Opened, container: Container, limits: Limits) -> Iterator[AvDecoder]:
    """The decoder for `file`; counts its samples first."""
    yield AvDecoder(file, container, limits)
