"""Decodes a recording and computes the features of its input windows: one window, crops, or windows over all of it.

``listen`` returns the window (the middle, or the one with most speech) or the crops; errors are returned in the
Excerpt, not raised. ``walk`` yields the windows of one channel in batches, so that long recordings need little memory.
With ``isolated``, decoding runs in a separate process, as a damaged recording may crash the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.audio import load as audio
from pipeline.audio.source import name_of
from pipeline.audio.speech import speech_share
from pipeline.audio.windows import GivenWindows, SlidingWindow, covered_s, crop_starts
from pipeline.features.features import FeatureConfig, extract
from pipeline.inference.timeline import SILENCE_DBFS
from pipeline.storage.files import source_of

Array = NDArray[np.float32]
LEAST_S = 0.25
"""Least seconds of sound for an answer: about a syllable."""
_LOOKS, _LOOK_HZ, _ALIKE = 8, 8_000, 0.9  # for comparing channels: pieces, sample rate, least correlation
_SPAN_S = 60.0  # windows within this length are cut from one read
_APART_LIMIT_S = 120.0
_FAINTEST = 1e-20  # power of digital silence: -200 dBFS


@dataclass(frozen=True)
class Excerpt:
    """The features of one recording's windows, and what is known about it."""

    features: Array  # (windows, *input_shape); no windows if the recording cannot be used
    duration_s: float = float("nan")
    scored_s: float = 0.0  # seconds that the windows cover
    sample_rate_hz: int = 0
    channels: int = 0
    level_dbfs: float = float("nan")  # RMS level of the loudest window, without zero padding
    notice: str = ""  # what users should know about how it was read
    speech_share: float = float("nan")  # largest share of speech in a window, see audio.speech
    status: str = "ok"  # or the code of an AudioError, or "internal_error"
    error: str | None = None


@dataclass(frozen=True)
class WindowBatch:
    """n consecutive windows: features ``(n, *input_shape)``; start, end, level, sound and speech share ``(n,)``.

    ``notice``: as in Excerpt.
    """

    features: Array
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    level_dbfs: NDArray[np.float64]
    sound_s: NDArray[np.float64]
    speech_share: NDArray[np.float64]
    notice: str


def listen(
    source: audio.AudioSource,
    config: FeatureConfig,
    crops: int = 1,
    channel: audio.Channel = "mix",
    *,
    isolated: bool = False,
    limits: audio.Limits = audio.DEFAULT_LIMITS,
) -> Excerpt:
    """Decode ``crops`` windows of a recording and compute their features, ``(crops, *config.input_shape)``.

    A recording that is not longer than the window gives one zero-padded window. ``source`` may be a ``file://`` path.
    Errors are returned in the Excerpt's ``status`` and ``error``; nothing is raised.
    """
    try:
        recording = _Recording(source, config, channel, isolated, limits)
        return _middle(recording) if crops == 1 else _crops(recording, crops)
    except Exception as error:  # a recording must never end the job: unexpected errors become a row, too
        return failed(config, error)


def failed(config: FeatureConfig, error: Exception) -> Excerpt:
    """The Excerpt of a recording that cannot be used."""
    if isinstance(error, audio.AudioError):
        status, text = error.code, str(error)
    else:
        status, text = "internal_error", f"{type(error).__name__}: {error}"
    text = " ".join(text.encode("utf-8", "backslashreplace").decode("utf-8").split())  # file names may be no valid text
    return Excerpt(np.empty((0, *config.input_shape), np.float32), status=status, error=text)


def describe(
    source: audio.AudioSource, *, isolated: bool = False, limits: audio.Limits = audio.DEFAULT_LIMITS
) -> audio.AudioInfo:
    """Length, sample rate and channels of a recording: ``audio.probe``, or in a separate process if ``isolated``.

    Raises:
        AudioError: it cannot be used.
    """
    if isolated:
        return _decode(audio.load_middle, source, isolated, limits=limits).info
    return audio.probe(_local(source), limits=limits)


def channels_differ(
    source: audio.AudioSource,
    info: audio.AudioInfo,
    *,
    isolated: bool = False,
    limits: audio.Limits = audio.DEFAULT_LIMITS,
) -> bool:
    """Whether a recording's channels hold different sound, such as the two speakers of a call.

    In eight pieces of 1 s at 8 kHz, a channel that is not silent must correlate with the first such one by 0.9 or more.
    ``info`` is the recording's, from ``describe``.

    Raises:
        AudioError: it cannot be used.
    """
    starts = crop_starts(info.duration_s, 1.0, _LOOKS)

    def sampled(channel: int) -> NDArray[np.float64]:
        part = {"duration_s": 1.0, "sample_rate_hz": _LOOK_HZ, "channel": channel, "limits": limits}
        pieces = [_decode(audio.load, source, isolated, start_s=start, **part).samples for start in starts]
        return np.concatenate([piece - piece.mean() for piece in pieces]).astype(np.float64)

    channels = map(sampled, range(info.channels if info.channels > 1 else 0))
    sound = [one for one in channels if _level_dbfs(one.astype(np.float32)) >= SILENCE_DBFS]
    return any(sound[0] @ one < _ALIKE * np.sqrt((sound[0] @ sound[0]) * (one @ one)) for one in sound[1:])


def walk(
    source: audio.AudioSource,
    config: FeatureConfig,
    steps: SlidingWindow | GivenWindows,
    duration_s: float,
    channel: audio.Channel = "mix",
    *,
    at_once: int = 16,
    silence_dbfs: float = float("-inf"),
    isolated: bool = False,
    limits: audio.Limits = audio.DEFAULT_LIMITS,
) -> Iterator[WindowBatch]:
    """Yield the windows of a recording, ``at_once`` in a WindowBatch, with at most a minute of audio in memory.

    Args:
        duration_s: length of the recording, from ``describe``.
        silence_dbfs: the features of windows below this level are not computed: they are zeros.

    Raises:
        AudioError: the recording cannot be used; it may be raised after some batches.
    """
    recording = _Recording(source, config, channel, isolated, limits)
    starts = steps.starts(duration_s)
    for part in _parts(starts, steps.window_s):
        cut = recording.reader(part, steps.window_s)
        for begin in range(0, len(part), at_once):
            start_s = np.array(part[begin : begin + at_once])
            pieces = [cut(start) for start in start_s]
            level_dbfs = np.array([_level_dbfs(piece) for piece in pieces])
            features = np.zeros((len(pieces), *config.input_shape), np.float32)
            for number in np.flatnonzero(level_dbfs >= silence_dbfs):
                features[number] = extract(_centred(pieces[number], config.window_samples), config)
            yield WindowBatch(
                features,
                start_s,
                np.minimum(start_s + steps.window_s, duration_s),
                level_dbfs,
                np.array([_sound_s(piece, config.sample_rate_hz) for piece in pieces]),
                np.array([speech_share(piece, config.sample_rate_hz) for piece in pieces]),
                recording.notice,
            )


def check_sound(source: audio.AudioSource, duration_s: float, level_dbfs: float, sound_s: float) -> None:
    """Check that a recording has enough sound for an answer, or is silent throughout, which is an answer, too.

    ``level_dbfs`` is the level of its loudest window, ``sound_s`` the most seconds of sound in a window.

    Raises:
        TooShort: there is some sound, but less than ``LEAST_S``, or the recording is shorter than that.
    """
    length_s = sound_s if duration_s >= LEAST_S else duration_s
    if length_s < LEAST_S and (duration_s < LEAST_S or level_dbfs >= SILENCE_DBFS):
        what = "long" if duration_s < LEAST_S else "of sound, the rest is silence"
        error = f"{name_of(source)}: {1000 * length_s:.3g} ms {what}; {LEAST_S:g} s of sound are needed. Record longer."
        raise audio.ERRORS["too_short"](error)


@dataclass
class _Recording:
    """Decodes one channel of a recording; ``notice``: the first notice of what was decoded so far."""

    source: audio.AudioSource
    config: FeatureConfig
    channel: audio.Channel
    isolated: bool
    limits: audio.Limits
    notice: str = ""

    def reader(self, starts: Sequence[float], window_s: float) -> Callable[[float], Array]:
        """Decode the windows at ``starts`` in one read; returns a function from a start to its samples, ``(n,)``.

        At the recording's end a window is shorter.
        """
        rate_hz = self.config.sample_rate_hz
        size = round(window_s * rate_hz)
        span = self.decoded(audio.load, start_s=starts[0], duration_s=starts[-1] - starts[0] + window_s).samples

        def cut(start_s: float) -> Array:
            first = round(start_s * rate_hz) - round(starts[0] * rate_hz)
            return span[first : first + size]

        return cut

    def decoded(self, load: Callable[..., audio.Clip], **part: float | str) -> audio.Clip:
        how = {"sample_rate_hz": self.config.sample_rate_hz, "channel": self.channel, "limits": self.limits}
        clip = _decode(load, self.source, self.isolated, **how, **part)
        self.notice = self.notice or clip.info.notice
        return clip


def _decode(
    load: Callable[..., audio.Clip], source: audio.AudioSource, isolated: bool, **options: object
) -> audio.Clip:
    if not isolated:
        return load(_local(source), **options)
    from pipeline.audio.isolated import decode_in_subprocess

    return decode_in_subprocess(_local(source), decode=load, timeout_s=_APART_LIMIT_S, **options)


def _local(source: audio.AudioSource) -> audio.AudioSource:
    """A source that ``audio`` can open: a path for a ``file://`` URI, the bytes of an object in a store."""
    if isinstance(source, audio.Segment) and isinstance(source.recording, str):
        return replace(source, recording=source_of(source.recording))
    return source_of(source) if isinstance(source, str) else source


def _middle(recording: _Recording) -> Excerpt:
    clip = recording.decoded(audio.load_middle, window_s=recording.config.window_s, window=recording.config.window)
    real = round(clip.scored_s * clip.sample_rate_hz)
    before = (len(clip.samples) - real) // 2
    samples = clip.samples[before : before + real]
    features = extract(clip.samples, recording.config)[np.newaxis]
    return _excerpt(recording, features, clip.info, clip.scored_s, [samples])


def _crops(recording: _Recording, crops: int) -> Excerpt:
    config = recording.config
    info = describe(recording.source, isolated=recording.isolated, limits=recording.limits)
    starts = crop_starts(info.duration_s, config.window_s, crops)
    if len(starts) == 1:
        return _middle(recording)
    pieces: list[Array] = []
    for part in _parts(starts, config.window_s):
        cut = recording.reader(part, config.window_s)
        pieces += [_centred(cut(start), config.window_samples) for start in part]
    features = np.stack([extract(piece, config) for piece in pieces])
    scored_s = covered_s(starts, info.duration_s, config.window_s)
    return _excerpt(recording, features, info, scored_s, pieces)


def _parts(starts: Sequence[float], window_s: float) -> Iterator[list[float]]:
    """Groups of consecutive starts whose windows lie within ``_SPAN_S``, to be cut from one read."""
    part: list[float] = []
    for start in starts:
        if part and start + window_s - part[0] > _SPAN_S:
            yield part
            part = []
        part.append(start)
    yield part


def _centred(samples: Array, size: int) -> Array:
    """The samples with zeros on both sides, ``size`` in all."""
    missing = size - len(samples)
    return np.pad(samples, (missing // 2, missing - missing // 2)) if missing else samples


def _level_dbfs(samples: Array) -> float:
    """RMS level in dBFS without the constant offset, which many microphones have when they are mute."""
    count = max(len(samples), 1)
    power = float(samples @ samples) / count - (float(samples.sum(dtype=np.float64)) / count) ** 2
    return float(10 * np.log10(max(power, _FAINTEST)))


def _sound_s(samples: Array, rate_hz: int) -> float:
    """Seconds that are not silent, in steps of 10 ms; a step's constant offset does not count as sound."""
    step = max(rate_hz // 100, 1)
    power = samples[: len(samples) // step * step].reshape(-1, step).var(axis=1)
    return float((power >= 10 ** (SILENCE_DBFS / 10)).sum() * step / rate_hz)


def _excerpt(
    recording: _Recording, features: Array, info: audio.AudioInfo, scored_s: float, pieces: Sequence[Array]
) -> Excerpt:
    level_dbfs = max(map(_level_dbfs, pieces))
    sound_s = max(_sound_s(piece, recording.config.sample_rate_hz) for piece in pieces)
    check_sound(recording.source, info.duration_s, level_dbfs, sound_s)
    share = float(np.fmax.reduce([speech_share(piece, recording.config.sample_rate_hz) for piece in pieces]))
    return Excerpt(
        features, info.duration_s, scored_s, info.sample_rate_hz, info.channels, level_dbfs, recording.notice, share
    )
