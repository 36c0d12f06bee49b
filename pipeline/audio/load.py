"""Loads a recording (path or `bytes`) as float32 mono samples at a given rate, or raises an `AudioError`.

Method: the header is checked first (`headers`), then the limits, and only then are samples decoded. libsndfile seeks to
the needed frames, which are mixed down block by block, so memory does not depend on the recording's length. If the
channels cancel each other in the mix, the loudest one is taken. Resampling is soxr's HQ, librosa's default; reading
starts early enough that a part equals the same part of the whole recording resampled.
Sources: libsndfile, soxr, `librosa.load` and `librosa.resample` (mean of channels, ceil of lengths).
Limits: what libsndfile cannot read (m4a, mp4, webm, AMR ...) is decoded from its start by FFmpeg (PyAV).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import soxr

from pipeline.audio.decoders import Block, Decoder, open_recording
from pipeline.audio.source import EXTENSIONS, AudioSource, Segment, open_source
from pipeline.audio.speech import SpeechSearch
from pipeline.audio.windows import Window, frames_for, placed, resampled_length
from pipeline.storage.errors import (
    DEFAULT_LIMITS,
    ERRORS,
    AudioError,
    Limits,
    NoSamples,
    NoSuchChannel,
    NoSuchSegment,
    NotFinite,
    OutOfRange,
)

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
    "Reading",
    "Segment",
    "content_hash",
    "load",
    "load_middle",
    "load_once",
    "probe",
]

Samples = npt.NDArray[np.float32]
Channel = int | Literal["mix"]

_OVERHANG_S = 0.5  # a segment may end this much past the recording's end: people round, and codecs pad
_CANCELLED = 0.2  # share of the power that unrelated channels keep in the mix; below it they cancel
_INEXACT_SEEKS = ("MPEG", "OPUS")  # codecs of libsndfile whose samples may differ after a seek
_LOUDEST = 1e9  # float recordings hold +-1, some +-32768; the power of 1e9 still fits float32


@dataclass(frozen=True)
class AudioInfo:
    """Facts about a recording."""

    sample_rate_hz: int
    channels: int
    frames: int  # samples per channel
    duration_s: float
    container: str
    codec: str
    notice: str = ""  # a remark for users on how it was read


@dataclass(frozen=True)
class Clip:
    """A part of a recording."""

    samples: Samples  # float32 mono (n,)
    sample_rate_hz: int
    start_s: float  # where in the recording its audio starts
    scored_s: float  # seconds of audio from the recording; the rest is zero padding
    info: AudioInfo


@dataclass(frozen=True)
class Reading:
    """The result of `load_once`."""

    clips: tuple[Clip, ...]  # one for each requested length
    content_hash: str  # or ""


def probe(source: AudioSource, *, limits: Limits = DEFAULT_LIMITS) -> AudioInfo:
    """Facts about `source`, checked against `limits`. Decodes audio only where needed to find its length."""
    with _decoder(source, limits) as decoder:
        return _info(decoder)


def load_middle(
    source: AudioSource,
    *,
    window_s: float = 2.0,
    sample_rate_hz: int = 48_000,
    channel: Channel = "mix",
    window: Window = "middle",
    limits: Limits = DEFAULT_LIMITS,
) -> Clip:
    """The middle of a recording, or its part with most speech; the same samples as from the whole one resampled.

    Args:
        window_s: length in seconds; the clip has exactly round(window_s * sample_rate_hz) samples; a shorter
            recording is centred and padded with zeros.
        channel: "mix" (the mean of all channels), or one channel, counted from 0.
        window: "speech": the part with most speech; this decodes the whole recording.
        limits: recordings beyond them are refused, before decoding where possible.

    Raises:
        AudioError: the recording cannot be used; `code` says why.
    """
    size = _window(window_s, sample_rate_hz)
    with _decoder(source, limits) as decoder:
        centre_s = _most_speech(decoder, window_s, channel)[0] if window == "speech" else None
        return _middle(partial(_mono, decoder, channel), decoder, size, sample_rate_hz, centre_s)


def load_once(
    source: AudioSource,
    *,
    windows_s: Sequence[float],
    sample_rate_hz: int = 48_000,
    window: Window = "middle",
    limits: Limits = DEFAULT_LIMITS,
) -> Reading:
    """The results of `load_middle` for each of `windows_s`, and of `content_hash`, decoding only once where possible.

    Decodes the whole recording and keeps its longest middle in memory. MP3 and Opus are decoded again for each middle,
    because their samples depend on where decoding starts. With `window` "speech", each part is decoded again too.

    Args:
        windows_s: lengths of the middles in seconds, one or more.
        window: "speech": all clips are centred where the clip of the first length has most speech.

    Returns:
        The clips, all channels mixed; the hash is "" if the recording is damaged outside its middles.

    Raises:
        AudioError: as `load_middle`.
    """
    windows = [_window(window_s, sample_rate_hz) for window_s in windows_s]
    digest = ""
    try:
        with _decoder(source, limits) as decoder:
            if window == "speech":
                centre_s, digest = _most_speech(decoder, windows_s[0])
                read = partial(_mono, decoder, "mix")
                clips = [_middle(read, decoder, size, sample_rate_hz, centre_s) for size in windows]
                return Reading(tuple(clips), digest)
            if not decoder.codec.startswith(_INEXACT_SEEKS):
                return _read_once(decoder, windows, sample_rate_hz)
            digest = _hashed(decoder, decoder.blocks(0, decoder.frames))
    except AudioError:
        pass  # if the error affects the middles too, reading them below raises it
    load_part = partial(load_middle, source, sample_rate_hz=sample_rate_hz, window=window, limits=limits)
    clips = [load_part(window_s=length_s) for length_s in windows_s]
    return Reading(tuple(clips), digest)


def load(
    source: AudioSource,
    *,
    sample_rate_hz: int = 48_000,
    start_s: float = 0.0,
    duration_s: float | None = None,
    channel: Channel = "mix",
    limits: Limits = DEFAULT_LIMITS,
) -> Clip:
    """A recording, or the part between given times, resampled and not padded.

    The result needs 4 bytes of memory a sample: load long recordings in parts.

    Args:
        duration_s: length of the part in seconds, shortened at the recording's end; None: up to the end.
        channel: "mix" (the mean of all channels), or one channel, counted from 0.

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
        samples = _resampled(partial(_mono, decoder, channel), _info(decoder), start, count, sample_rate_hz)
        return Clip(samples, sample_rate_hz, start / sample_rate_hz, count / sample_rate_hz, _info(decoder))


def content_hash(source: AudioSource, *, limits: Limits = DEFAULT_LIMITS) -> str:
    """sha256 (64 hex digits) of the decoded samples, the rate and the number of channels.

    Samples are hashed as little-endian float32, so a WAV and the FLAC made from it have the same hash; names and tags
    do not matter. Raises `AudioError`.
    """
    with _decoder(source, limits) as decoder:
        return _hashed(decoder, decoder.blocks(0, decoder.frames))


@contextmanager
def _decoder(source: AudioSource, limits: Limits) -> Iterator[Decoder]:
    with open_source(source) as file, open_recording(file, limits) as decoder:
        yield _Cut(decoder, source) if isinstance(source, Segment) else decoder


class _Cut:
    """A decoder that reads only the frames of a segment.

    Raises:
        NoSuchSegment: it begins past the recording's end, ends more than `_OVERHANG_S` past it, or is empty.
    """

    next_at = 0

    def __init__(self, decoder: Decoder, segment: Segment) -> None:
        rate_hz, whole_s = decoder.sample_rate_hz, decoder.frames / decoder.sample_rate_hz
        end_s = whole_s if segment.end_s == math.inf else segment.end_s
        self._decoder = decoder
        self.name, self.container, self.codec = decoder.name, decoder.container, decoder.codec
        self.sample_rate_hz, self.channels = rate_hz, decoder.channels
        self._first = round(segment.start_s * rate_hz) if math.isfinite(segment.start_s) else -1
        self.frames = min(round(min(end_s, whole_s) * rate_hz), decoder.frames) - self._first
        if segment.start_s >= whole_s or end_s > whole_s + _OVERHANG_S:
            remedy = "check that the times belong to this recording"
        elif self._first < 0 or not self.frames > 0:
            remedy = "expected 0 <= start < end"
        else:
            return
        raise NoSuchSegment(f"{decoder.name}: no segment {segment} in its {whole_s:.3f} s; {remedy}")

    @property
    def notice(self) -> str:
        return self._decoder.notice

    @notice.setter
    def notice(self, text: str) -> None:
        self._decoder.notice = text

    def blocks(self, start: int, count: int) -> Iterator[Block]:
        return self._decoder.blocks(self._first + start, count)


def _info(decoder: Decoder) -> AudioInfo:
    rate_hz, frames = decoder.sample_rate_hz, decoder.frames
    return AudioInfo(
        rate_hz, decoder.channels, frames, frames / rate_hz, decoder.container, decoder.codec, decoder.notice
    )


def _hashed(decoder: Decoder, blocks: Iterator[Block]) -> str:
    digest = hashlib.sha256(f"{decoder.sample_rate_hz} Hz, {decoder.channels} channels\n".encode())
    for block in blocks:
        digest.update(block.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _window(window_s: float, rate_hz: int) -> int:
    window = round(window_s * rate_hz)
    if window < 1:
        raise ValueError(f"window_s {window_s} at {rate_hz} Hz is {window} samples; expected 1 or more")
    return window


def _most_speech(decoder: Decoder, window_s: float, channel: Channel = "mix") -> tuple[float | None, str]:
    """(centre in seconds of the window with most speech, or None for the recording's middle; hash), in one pass."""
    _check_channel(decoder, channel)
    search = SpeechSearch(decoder.sample_rate_hz)

    def passing() -> Iterator[Block]:
        for block in decoder.blocks(0, decoder.frames):
            sound = np.where(np.abs(block) <= _LOUDEST, block, np.float32(0))
            samples = _mixed(sound) if channel == "mix" else sound[:, channel]
            if channel == "mix" and decoder.channels > 1 and _cancels(samples, powers := _powers(sound)):
                samples = sound[:, int(powers.argmax())]
            search.add(np.ascontiguousarray(samples))
            yield block

    digest, duration_s = _hashed(decoder, passing()), decoder.frames / decoder.sample_rate_hz
    start_s = search.start_s(window_s, duration_s) if duration_s > window_s else None
    return None if start_s is None else start_s + window_s / 2, digest


def _read_once(decoder: Decoder, windows: Sequence[int], rate_hz: int) -> Reading:
    """The middles of `windows` samples, and the hash, in one pass; keeps the frames of the longest middle in memory."""
    info, notice = _info(decoder), decoder.notice
    total = resampled_length(info.frames, info.sample_rate_hz, rate_hz)
    first, last = frames_for(*placed(max(windows), total, rate_hz), info.frames, info.sample_rate_hz, rate_hz)
    held = np.empty((last - first, decoder.channels), np.float32)

    def passing() -> Iterator[Block]:
        position = 0
        for block in decoder.blocks(0, decoder.frames):
            part = block[max(first - position, 0) : max(last - position, 0)]
            if len(part):
                at = max(position - first, 0)
                held[at : at + len(part)] = part
            position += len(block)
            yield block

    digest = _hashed(decoder, passing())

    def read(start: int, count: int) -> Samples:
        decoder.notice = notice
        part = held[start - first : start - first + count]
        samples = _mixed(part).copy()
        _check_values(samples, start, decoder)
        if decoder.channels > 1 and _cancels(samples, powers := _powers(part)):
            return part[:, _loudest(decoder, powers)].copy()
        return samples

    _check_values(_mixed(held), first, decoder)
    return Reading(tuple(_middle(read, decoder, window, rate_hz) for window in windows), digest)


def _middle(
    read: Callable[[int, int], Samples], decoder: Decoder, window: int, rate_hz: int, centre_s: float | None = None
) -> Clip:
    """`window` samples around `centre_s` (None: the middle of the recording). `read` as for `_resampled`.

    At an end of the recording the window is moved inwards; a recording shorter than it is padded with zeros.
    """
    info = _info(decoder)
    start, count = placed(window, resampled_length(info.frames, info.sample_rate_hz, rate_hz), rate_hz, centre_s)
    samples = _resampled(read, info, start, count, rate_hz)
    if count < window:
        before = (window - count) // 2
        samples = np.pad(samples, (before, window - count - before))
    return Clip(samples, rate_hz, start / rate_hz, count / rate_hz, _info(decoder))  # again: reading may set the notice


def _resampled(read: Callable[[int, int], Samples], info: AudioInfo, start: int, count: int, rate_hz: int) -> Samples:
    """Samples [start, start + count) of the recording resampled to `rate_hz`; reads only these plus a margin.

    `read(first, count)` returns frames of one channel at the recording's own rate, (count,).
    """
    first, last = frames_for(start, count, info.frames, info.sample_rate_hz, rate_hz)
    frames = read(first, last - first)
    if info.sample_rate_hz == rate_hz:
        return frames
    resampled = soxr.resample(frames, info.sample_rate_hz, rate_hz, quality="HQ")
    skipped = start - first * rate_hz // info.sample_rate_hz  # without remainder: the grids meet there
    samples = np.zeros(count, np.float32)
    part = resampled[skipped : skipped + count]  # at the recording's end soxr may return one sample less
    samples[: len(part)] = part
    return samples


def _mono(decoder: Decoder, channel: Channel, start: int, count: int) -> Samples:
    """Frames [start, start + count) as one channel, (count,) at the recording's own rate; finite."""
    _check_channel(decoder, channel)
    samples = np.empty(count, np.float32)
    several = channel == "mix" and decoder.channels > 1
    powers, filled = np.zeros(decoder.channels), 0
    for block in decoder.blocks(start, count):
        samples[filled : filled + len(block)] = _mixed(block) if channel == "mix" else block[:, channel]
        filled += len(block)
        if several:
            powers += _powers(block)
    _check_values(samples, start, decoder)
    if several and _cancels(samples, powers):
        return _mono(decoder, _loudest(decoder, powers), start, count)
    return samples


def _check_channel(decoder: Decoder, channel: Channel) -> None:
    if channel != "mix" and not 0 <= channel < decoder.channels:
        expected = f"0 to {decoder.channels - 1} or 'mix'"
        raise NoSuchChannel(f"{decoder.name}: no channel {channel!r}; expected {expected}.")


def _powers(block: Block) -> npt.NDArray[np.float64]:
    """Sum of squares of each channel of a block (n, channels): (channels,)."""
    with np.errstate(invalid="ignore", over="ignore"):  # `_check_values` reports values that are not finite
        return np.asarray(np.einsum("nc,nc->c", block, block), dtype=np.float64)


def _loudest(decoder: Decoder, powers: npt.NDArray[np.float64]) -> int:
    """The channel to use if the channels cancel in their mean; also sets the decoder's notice."""
    loudest = int((powers >= 0.999 * powers.max()).argmax())  # the first of equals
    decoder.notice = f"its channels cancel each other when mixed: only channel {loudest}, the loudest, was used"
    return loudest


def _cancels(mix: Samples, powers: npt.NDArray[np.float64]) -> bool:
    """Whether channels of these powers (sums of squares) cancel in their mean.

    Let P be the power of the loudest channel, divided by the squared number of channels. If one channel has all the
    sound, or the channels are unrelated, the mean keeps at least P. A mean 7 dB below P has lost its content.
    """
    return float(mix @ mix) < _CANCELLED * float(powers.max()) / len(powers) ** 2


def _mixed(block: Block) -> Samples:
    """The mean of the channels of a block (n, channels): (n,); a matrix product would depend on block and processor."""
    channels = block.shape[1]
    if channels == 1:
        return block[:, 0]
    with np.errstate(invalid="ignore", over="ignore"):  # `_check_values` reports values that are not finite
        shares = block * np.float32(1.0 / channels)
        return sum((shares[:, channel] for channel in range(1, channels)), start=shares[:, 0])


def _check_values(samples: Samples, start: int, decoder: Decoder) -> None:
    peak = float(max(samples.max(), -samples.min()))  # NaN passes through both
    if peak <= _LOUDEST:
        return
    frame = int(np.argmax(~(np.abs(samples) <= _LOUDEST)))
    where = f"{decoder.name}: sample {samples[frame]} at {(start + frame) / decoder.sample_rate_hz:.3f} s"
    if math.isfinite(peak):
        raise OutOfRange(f"{where}; expected values within +-{_LOUDEST:g}. Export it again.")
    raise NotFinite(f"{where}; expected finite values. Export it again.")
