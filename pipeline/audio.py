"""Recordings in: a path or `bytes` to float32 mono samples at the rate asked for, or an `AudioError`.

Method: the header is checked (`audio_headers`), then the limits, and only then are samples decoded: libsndfile seeks to
the frames needed plus the resampler's margin and reads them in blocks, mixed down as they pass, so that neither length
nor channels of a recording decide how much memory is held. Where channels cancel in the mix, the loudest is taken.
Resampling is soxr's HQ, librosa's default; a part equals that part of the whole recording resampled, for it starts
where the two sample grids meet, with margin for the filter.
Sources: libsndfile, soxr, `librosa.load` and `librosa.resample` for conventions (mean of channels, ceil of lengths).
Limits: what libsndfile does not read (m4a, mp4, webm, AMR ...) is decoded from its start by FFmpeg (PyAV).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import soxr

from pipeline.audio_decoders import Decoder
from pipeline.audio_errors import (
    DEFAULT_LIMITS,
    ERRORS,
    AudioError,
    Limits,
    NoSamples,
    NoSuchChannel,
    NotFinite,
    OutOfRange,
)
from pipeline.audio_formats import EXTENSIONS
from pipeline.audio_guard import AudioSource, open_source
from pipeline.audio_joined import open_recording

__all__ = [
    "DEFAULT_LIMITS",
    "ERRORS",
    "EXTENSIONS",
    "AudioError",
    "AudioInfo",
    "AudioSource",
    "Channel",
    "Clip",
    "Limits",
    "content_hash",
    "load",
    "load_middle",
    "probe",
]

Samples = npt.NDArray[np.float32]
Channel = int | Literal["mix"]

_MARGIN = 512  # frames on either side of a part, at the lower rate; from 256 on the result stays the same
_CANCELLED = 0.1
_LOUDEST = 1e9  # float recordings hold +-1, some +-32768; the power of 1e9 still fits float32


@dataclass(frozen=True)
class AudioInfo:
    """What a recording is: rate in Hz, channels, frames (samples a channel), seconds, container, codec.

    `notice`: what users should know of how it was read, "" mostly.
    """

    sample_rate_hz: int
    channels: int
    frames: int
    duration_s: float
    container: str
    codec: str
    notice: str = ""


@dataclass(frozen=True)
class Clip:
    """A part of a recording.

    `samples`: float32 mono (n,) at `sample_rate_hz`; `start_s`: where in the recording its real audio starts;
    `scored_s`: seconds of real audio in it, the rest is zero padding.
    """

    samples: Samples
    sample_rate_hz: int
    start_s: float
    scored_s: float
    info: AudioInfo


def probe(source: AudioSource, *, limits: Limits = DEFAULT_LIMITS) -> AudioInfo:
    """What `source` is, checked against `limits`. Decodes only where its header does not tell the length."""
    with _decoder(source, limits) as decoder:
        return _info(decoder)


def load_middle(
    source: AudioSource,
    *,
    window_s: float = 2.0,
    sample_rate_hz: int = 48_000,
    channel: Channel = "mix",
    limits: Limits = DEFAULT_LIMITS,
) -> Clip:
    """The middle of a recording, as it would be cut from the whole recording resampled.

    Args:
        source: path or bytes.
        window_s: length in seconds; the clip has exactly round(window_s * sample_rate_hz) samples, centred between
            zeros when the recording is shorter.
        sample_rate_hz: rate of the samples returned.
        channel: "mix" (the mean of all channels), or one channel, counted from 0.
        limits: what is refused before decoding.

    Raises:
        AudioError: the recording cannot be used; `code` says why.
    """
    window = round(window_s * sample_rate_hz)
    if window < 1:
        raise ValueError(f"window_s {window_s} at {sample_rate_hz} Hz is {window} samples; expected 1 or more")
    with _decoder(source, limits) as decoder:
        total = resampled_length(decoder.frames, decoder.sample_rate_hz, sample_rate_hz)
        count = min(window, total)
        start = (total - count) // 2
        samples = _resampled(decoder, start, count, sample_rate_hz, channel)
        if count < window:
            before = (window - count) // 2
            samples = np.pad(samples, (before, window - count - before))
        return Clip(samples, sample_rate_hz, start / sample_rate_hz, count / sample_rate_hz, _info(decoder))


def load(
    source: AudioSource,
    *,
    sample_rate_hz: int = 48_000,
    start_s: float = 0.0,
    duration_s: float | None = None,
    channel: Channel = "mix",
    limits: Limits = DEFAULT_LIMITS,
) -> Clip:
    """A recording or a part of it, resampled, not padded: as `load_middle`, but where the caller says.

    Holds what it returns, 4 bytes a sample: take long recordings in parts.

    Args:
        source: path or bytes.
        sample_rate_hz: rate of the samples returned.
        start_s: start of the part, in seconds.
        duration_s: length of the part, in seconds, shortened at the recording's end; None for all that follows.
        channel: "mix" (the mean of all channels), or one channel, counted from 0.
        limits: what is refused before decoding.

    Raises:
        AudioError: the recording cannot be used; `NoSamples` when `start_s` lies at or past its end.
    """
    if start_s < 0 or (duration_s is not None and duration_s <= 0):
        raise ValueError(f"expected start_s >= 0 and duration_s > 0, got {start_s} and {duration_s}")
    with _decoder(source, limits) as decoder:
        total = resampled_length(decoder.frames, decoder.sample_rate_hz, sample_rate_hz)
        start = round(start_s * sample_rate_hz)
        if start >= total:
            length_s = decoder.frames / decoder.sample_rate_hz
            raise NoSamples(f"{decoder.name}: start {start_s:g} s is past its end at {length_s:g} s. Start earlier.")
        count = total - start
        if duration_s is not None:
            count = min(count, max(round(duration_s * sample_rate_hz), 1))
        samples = _resampled(decoder, start, count, sample_rate_hz, channel)
        return Clip(samples, sample_rate_hz, start / sample_rate_hz, count / sample_rate_hz, _info(decoder))


def content_hash(source: AudioSource, *, limits: Limits = DEFAULT_LIMITS) -> str:
    """sha256 (64 hex digits) of the decoded samples, the rate and the number of channels.

    Samples count as little-endian float32, so a WAV and the FLAC made from it have one hash, whatever their names and
    tags. Raises `AudioError`.
    """
    with _decoder(source, limits) as decoder:
        digest = hashlib.sha256(f"{decoder.sample_rate_hz} Hz, {decoder.channels} channels\n".encode())
        for block in decoder.blocks(0, decoder.frames):
            digest.update(block.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()


def resampled_length(frames: int, from_hz: int, to_hz: int) -> int:
    """Samples that `frames` at `from_hz` become at `to_hz`: the ceiling of the exact ratio."""
    return -(-frames * to_hz // from_hz)


@contextmanager
def _decoder(source: AudioSource, limits: Limits) -> Iterator[Decoder]:
    with open_source(source) as file, open_recording(file, limits) as decoder:
        yield decoder


def _info(decoder: Decoder) -> AudioInfo:
    rate_hz, frames = decoder.sample_rate_hz, decoder.frames
    return AudioInfo(
        rate_hz, decoder.channels, frames, frames / rate_hz, decoder.container, decoder.codec, decoder.notice
    )


def _resampled(decoder: Decoder, start: int, count: int, rate_hz: int, channel: Channel) -> Samples:
    """Samples [start, start + count) of the whole recording resampled to `rate_hz`, reading little more than them."""
    from_hz = decoder.sample_rate_hz
    if from_hz == rate_hz:
        return _mono(decoder, start, count, channel)
    divisor = math.gcd(from_hz, rate_hz)
    up, down = rate_hz // divisor, from_hz // divisor  # every `down` frames the two grids meet, `up` samples on
    margin = _MARGIN * max(1, -(-from_hz // rate_hz))
    periods = max(start * down // up - margin, 0) // down
    first = periods * down
    last = min(resampled_length(start + count, rate_hz, from_hz) + margin, decoder.frames)
    resampled = soxr.resample(_mono(decoder, first, last - first, channel), from_hz, rate_hz, quality="HQ")
    skipped = start - periods * up
    samples = np.zeros(count, np.float32)
    part = resampled[skipped : skipped + count]  # at the recording's end soxr may round down: a zero follows
    samples[: len(part)] = part
    return samples


def _mono(decoder: Decoder, start: int, count: int, channel: Channel) -> Samples:
    """Frames [start, start + count) as one channel, (count,) at the recording's own rate; finite."""
    if channel != "mix" and not 0 <= channel < decoder.channels:
        expected = f"0 to {decoder.channels - 1} or 'mix'"
        raise NoSuchChannel(f"{decoder.name}: channel {channel!r} asked for; it has {expected}.")
    samples = np.empty(count, np.float32)
    mix = channel == "mix" and decoder.channels > 1
    powers, filled = np.zeros(decoder.channels), 0
    for block in decoder.blocks(start, count):
        part = samples[filled : filled + len(block)]
        filled += len(block)
        if mix:
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is found below
                part[:] = block @ np.full(decoder.channels, 1.0 / decoder.channels, np.float32)
                powers += np.einsum("nc,nc->c", block, block)
        else:
            part[:] = block[:, 0 if channel == "mix" else channel]
    _check_values(samples, start, decoder)
    if mix and _cancels(samples, powers):
        loudest = int(powers.argmax())
        decoder.notice = f"its channels cancel each other when mixed: channel {loudest}, the loudest, was heard alone"
        return _mono(decoder, start, count, loudest)
    return samples


def _cancels(mix: Samples, powers: npt.NDArray[np.float64]) -> bool:
    """Whether channels of these powers (sums of squares) cancel in their mean.

    One channel that sounds alone, or several that have nothing in common, keep the power of the loudest over the number
    of channels squared, or more; a mean that lies 10 dB below that has lost what it should tell.
    """
    return float(mix @ mix) < _CANCELLED * float(powers.max()) / len(powers) ** 2


def _check_values(samples: Samples, start: int, decoder: Decoder) -> None:
    peak = float(max(samples.max(), -samples.min()))  # NaN passes through both
    if peak <= _LOUDEST:
        return
    frame = int(np.argmax(~(np.abs(samples) <= _LOUDEST)))
    where = f"{decoder.name}: sample {samples[frame]} at {(start + frame) / decoder.sample_rate_hz:.3f} s"
    if math.isfinite(peak):
        raise OutOfRange(f"{where}; expected values within +-{_LOUDEST:g}. Export it again.")
    raise NotFinite(f"{where}; expected finite values. Export it again.")
