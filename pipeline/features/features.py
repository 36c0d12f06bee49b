"""Features of one window of speech: the log-mel spectrogram for 2-D models, the frame vectors for the 1-D model.

Log-mel: ``librosa.feature.melspectrogram`` (Hann window, centred frames, zero padding, power 2, Slaney mel scale and
norm), then ``power_to_db(ref=max, top_db=80)``, then per-clip standardisation ``(x - mean) / (std + 1e-6)``.
Everything here works in float32 on mono samples at ``FeatureConfig.sample_rate_hz``; nothing reads files.

Mel filters: triangles of unit area (Slaney norm), evenly spaced on Slaney's mel scale, as in librosa.
Source of that scale: Malcolm Slaney, "Auditory Toolbox", 1998: linear below 1 kHz (200/3 Hz a mel), logarithmic above.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.audio.windows import Window
from pipeline.storage.errors import SerError

_LINEAR_HZ_PER_MEL = 200.0 / 3.0
_BREAK_HZ = 1000.0
_LOG_STEP = np.log(6.4) / 27.0


def edges_hz(n_mels: int, top_hz: float) -> NDArray[np.float64]:
    """Corners of the filters in Hz, ascending, ``(n_mels + 2,)``: band k rises from corner k to k+1, falls to k+2."""
    return _mel_to_hz(np.linspace(0.0, _hz_to_mel(top_hz), n_mels + 2))


@lru_cache(maxsize=8)
def filters(n_mels: int, top_hz: float, n_fft: int, sample_rate_hz: int) -> Array:
    """Mel filters for a power spectrum, ``(n_mels, 1 + n_fft // 2)``; a row is zero if its band holds no FFT bin."""
    corners_hz = edges_hz(n_mels, top_hz)
    bins_hz = np.fft.rfftfreq(n_fft, 1.0 / sample_rate_hz)
    ramps = corners_hz[:, np.newaxis] - bins_hz[np.newaxis]
    widths = np.diff(corners_hz)[:, np.newaxis]
    rising, falling = -ramps[:-2] / widths[:-1], ramps[2:] / widths[1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    area = 2.0 / (corners_hz[2:] - corners_hz[:-2])
    return (triangles * area[:, np.newaxis]).astype(np.float32)


@lru_cache(maxsize=8)
def filter_groups(
    n_mels: int, top_hz: float, n_fft: int, sample_rate_hz: int
) -> tuple[tuple[slice, slice, Array], ...]:
    """``filters`` in three groups of neighbouring bands, each with only the bins it needs: a quarter of the work.

    A group is its bands, its bins, and its filters ``(bands, bins)``.
    """
    every = filters(n_mels, top_hz, n_fft, sample_rate_hz)
    bands = []
    for first, last in itertools.pairwise((0, n_mels // 2, 3 * n_mels // 4, n_mels)):
        touched = np.flatnonzero(every[first:last].any(axis=0))
        bins = slice(touched[0], touched[-1] + 1) if touched.size else slice(0, 0)
        bands.append((slice(first, last), bins, np.ascontiguousarray(every[first:last, bins])))
    return tuple(bands)


def _hz_to_mel(frequency_hz: float) -> float:
    if frequency_hz < _BREAK_HZ:
        return frequency_hz / _LINEAR_HZ_PER_MEL
    return float(_BREAK_HZ / _LINEAR_HZ_PER_MEL + np.log(frequency_hz / _BREAK_HZ) / _LOG_STEP)


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    break_mel = _BREAK_HZ / _LINEAR_HZ_PER_MEL
    linear = mel * _LINEAR_HZ_PER_MEL
    logarithmic = _BREAK_HZ * np.exp(_LOG_STEP * (mel - break_mel))
    return np.asarray(np.where(mel < break_mel, linear, logarithmic))


Array = NDArray[np.float32]
KINDS = ("log_mel", "frame_features")
_AMIN = 1e-10  # the floor of librosa.power_to_db
_BLOCK_FRAMES = 32
MAX_WINDOW_S = 60.0


class FeatureError(SerError):
    """Samples or features that do not fit a FeatureConfig."""


@dataclass(frozen=True)
class FeatureConfig:
    """Settings of the model's input: window, sample rate and spectral analysis. Its fingerprint is saved with the data.

    Raises:
        FeatureError: a value out of range, fewer mel bands than MFCCs, or a mel band without any FFT bin.
    """

    kind: str = "log_mel"
    sample_rate_hz: int = 48_000
    window_s: float = 2.0
    n_mels: int = 64
    n_fft: int = 2048
    hop_length: int = 512
    top_db: float = 80.0
    n_mfcc: int = 40
    f_max_hz: float | None = None  # top of the highest mel band; None: half the sampling rate
    window: Window = "middle"  # which window of a recording: its middle, or the one with most speech

    def __post_init__(self) -> None:
        if self.window not in get_args(Window):
            raise FeatureError(f"unknown window {self.window!r}; expected one of {', '.join(get_args(Window))}")
        if self.kind not in KINDS:
            raise FeatureError(f"unknown feature kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        window = self.sample_rate_hz, self.window_s, self.n_fft, self.hop_length
        if not all(0 < number < float("inf") for number in (*window, self.n_mels, self.n_mfcc, self.top_db)):
            raise FeatureError(f"every number of a FeatureConfig must be positive and finite, got {self}")
        if self.window_samples < self.hop_length:
            raise FeatureError(f"window_s={self.window_s} is shorter than one hop; use a longer window")
        if self.window_s > MAX_WINDOW_S:
            raise FeatureError(f"window_s={self.window_s}; expected at most {MAX_WINDOW_S:g} s")
        if self.kind == "frame_features" and self.n_mfcc > self.n_mels:
            raise FeatureError(f"n_mfcc={self.n_mfcc} needs as many mel bands, got n_mels={self.n_mels}")
        if self.f_max_hz is not None and not 0 < self.f_max_hz <= self.sample_rate_hz / 2:
            raise FeatureError(
                f"f_max_hz={self.f_max_hz}; expected at most half the sampling rate, {self.sample_rate_hz / 2:g} Hz"
            )
        if self.n_mels > self.n_fft // 2:  # checked before filters of that size are made
            raise FeatureError(f"n_mels={self.n_mels} is too many for n_fft={self.n_fft}; use fewer")
        empty = int((~filters(*_bands(self)).any(axis=1)).sum())
        if empty:
            raise FeatureError(
                f"{empty} of n_mels={self.n_mels} bands hold no frequency bin of n_fft={self.n_fft}; use fewer bands"
            )

    @property
    def window_samples(self) -> int:
        """Samples in a window (96,000 by default)."""
        return round(self.window_s * self.sample_rate_hz)

    @property
    def top_hz(self) -> float:
        """Top of the highest mel band (24,000 Hz by default)."""
        return self.sample_rate_hz / 2.0 if self.f_max_hz is None else self.f_max_hz

    @property
    def n_frames(self) -> int:
        """Frames in a window (188 by default): one centred frame per hop, plus one."""
        return 1 + self.window_samples // self.hop_length

    @property
    def n_dims(self) -> int:
        """Values per frame of ``frame_features``: MFCC with two deltas, log-mel, and six descriptors."""
        return 3 * self.n_mfcc + self.n_mels + 6

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example: ``(1, n_mels, n_frames)``, or ``(n_frames, n_dims)`` for frame features."""
        return (1, self.n_mels, self.n_frames) if self.kind == "log_mel" else (self.n_frames, self.n_dims)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; omits ``f_max_hz`` and ``window`` at their defaults, to keep old fingerprints."""
        later = {"f_max_hz": None, "window": "middle"}
        return {name: value for name, value in asdict(self).items() if later.get(name, ...) != value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeatureConfig:
        """The configuration in ``values``.

        Raises:
            FeatureError: a name that this version does not know, or a value out of range.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise FeatureError(
                f"unknown feature settings {unknown}; update this project, or extract the features again"
            )
        return cls(**values)

    def unlike(self, other: FeatureConfig) -> str:
        """The settings that differ from ``other``, as text: "window speech, not middle"; "" if none does."""
        theirs = asdict(other)
        return ", ".join(f"{n} {value}, not {theirs[n]}" for n, value in asdict(self).items() if value != theirs[n])

    def fingerprint(self) -> str:
        """16 hex digits that change when any setting does."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def extract(samples: Array, config: FeatureConfig) -> Array:
    """The model input, float32 ``config.input_shape``, of one window of float32 mono samples ``(window_samples,)``.

    Raises:
        FeatureError: another number of samples or dimensions.
    """
    if samples.shape != (config.window_samples,):
        raise FeatureError(
            f"expected {config.window_samples} mono samples ({config.window_s} s at {config.sample_rate_hz} Hz), "
            f"got shape {samples.shape}; read the recording with pipeline.audio.load.load_middle"
        )
    return log_mel(samples, config) if config.kind == "log_mel" else frame_features(samples, config)


def log_mel(samples: Array, config: FeatureConfig) -> Array:
    """Standardised log-mel spectrogram, float32 ``(1, n_mels, frames)``, without unit, of mono ``samples (n,)``."""
    return normalise_power(mel_power(samples, config), config)


def mel_power(samples: Array, config: FeatureConfig) -> Array:
    """Mel-band power, float32 ``(n_mels, 1 + n // hop_length)``, of mono ``samples (n,)`` of any length."""
    groups = filter_groups(*_bands(config))
    power = np.empty((config.n_mels, _count_frames(samples, config)), np.float32)
    for first, block in _power_blocks(samples, config):
        for mels, bins, filters in groups:
            np.matmul(filters, block[:, bins].T, out=power[mels, first : first + len(block)])
    return power


def normalise_power(power: Array, config: FeatureConfig) -> Array:
    """Power ``(n_mels, frames)`` -> dB below its maximum, cut at ``top_db``, standardised: ``(1, n_mels, frames)``."""
    decibel = 10.0 * np.log10(np.maximum(power, np.float32(_AMIN)))
    decibel -= decibel.max()
    np.maximum(decibel, np.float32(-config.top_db), out=decibel)
    decibel -= decibel.mean()
    decibel /= decibel.std() + np.float32(1e-6)
    return decibel[np.newaxis].astype(np.float32, copy=False)


def mel_edges_hz(config: FeatureConfig) -> NDArray[np.float64]:
    """``edges_hz`` for this configuration, ``(n_mels + 2,)``."""
    return edges_hz(config.n_mels, config.top_hz)


def _bands(config: FeatureConfig) -> tuple[int, float, int, int]:
    """The arguments of ``filters`` and ``filter_groups``."""
    return config.n_mels, config.top_hz, config.n_fft, config.sample_rate_hz


def frame_features(samples: Array, config: FeatureConfig) -> Array:
    """Frame vectors of the 1-D model, float32 ``(frames, n_dims)``, every column standardised over the window.

    Columns: MFCC, delta, delta-delta (``n_mfcc`` each), log-mel in dB (``n_mels``), then spectral centroid, bandwidth,
    85 % rolloff, flatness, zero-crossing rate and RMS, as librosa defines them, on one hop.
    """
    import librosa
    import scipy.fft

    magnitude = np.sqrt(np.concatenate([block for _, block in _power_blocks(samples, config)]).T)
    power = filters(*_bands(config)) @ (magnitude * magnitude)
    decibel = librosa.power_to_db(power, ref=np.max, top_db=config.top_db)
    mfcc = scipy.fft.dct(decibel, axis=0, type=2, norm="ortho")[: config.n_mfcc]
    hop = {"n_fft": config.n_fft, "hop_length": config.hop_length}
    spectral: dict[str, Any] = {"S": magnitude, "sr": config.sample_rate_hz, **hop}
    frame: dict[str, Any] = {"frame_length": config.n_fft, "hop_length": config.hop_length}
    rows = [
        mfcc,
        librosa.feature.delta(mfcc),
        librosa.feature.delta(mfcc, order=2),
        decibel,
        librosa.feature.spectral_centroid(**spectral),
        librosa.feature.spectral_bandwidth(**spectral),
        librosa.feature.spectral_rolloff(**spectral, roll_percent=0.85),
        librosa.feature.spectral_flatness(S=magnitude),
        librosa.feature.zero_crossing_rate(samples, **frame),
        librosa.feature.rms(S=magnitude, **frame),
    ]
    columns = np.concatenate(rows, axis=0).astype(np.float32)
    columns -= columns.mean(axis=1, keepdims=True)
    columns /= columns.std(axis=1, keepdims=True) + np.float32(1e-6)
    return np.ascontiguousarray(columns.T)


def _power_blocks(samples: Array, config: FeatureConfig) -> Iterator[tuple[int, Array]]:
    """|STFT|^2 as blocks ``(up to 32 frames, 1 + n_fft // 2)``, each with the index of its first frame.

    Hann window, centred frames, zero padding at both ends. A block fits into the CPU cache and its memory is reused:
    twice as fast as one transform of all frames.
    """
    import scipy.fft  # costs half a second of CPU; imported here so that a command's --help is fast

    samples = np.ascontiguousarray(samples, np.float32)
    n_frames = _count_frames(samples, config)
    windowed = np.empty((min(_BLOCK_FRAMES, n_frames), config.n_fft), np.float32)
    for first in range(0, n_frames, _BLOCK_FRAMES):
        frames = _frames(samples, first, min(first + _BLOCK_FRAMES, n_frames), config)
        np.multiply(frames, _hann(config.n_fft), out=windowed[: len(frames)])
        squares = scipy.fft.rfft(windowed[: len(frames)], axis=-1).view(np.float32)
        np.square(squares, out=squares)
        yield first, squares[:, ::2] + squares[:, 1::2]


def _count_frames(samples: Array, config: FeatureConfig) -> int:
    if samples.ndim != 1 or samples.size == 0:
        raise FeatureError(f"expected mono samples (n,) with n > 0, got shape {samples.shape}")
    return 1 + (samples.size + 2 * (config.n_fft // 2) - config.n_fft) // config.hop_length


def _frames(samples: Array, first: int, last: int, config: FeatureConfig) -> Array:
    """Frames [first, last), ``(last - first, n_fft)``, each centred on a multiple of the hop, as overlapping views."""
    start = first * config.hop_length - config.n_fft // 2
    stop = start + (last - first - 1) * config.hop_length + config.n_fft
    part = samples[max(start, 0) : stop]
    if start < 0 or stop > samples.size:
        part = np.pad(part, (max(-start, 0), max(stop - samples.size, 0)))
    strides = (config.hop_length * part.itemsize, part.itemsize)
    return np.ndarray((last - first, config.n_fft), part.dtype, part, strides=strides)


@lru_cache(maxsize=8)
def _hann(n_fft: int) -> Array:
    """Periodic Hann window, ``(n_fft,)``, the variant for STFTs."""
    phase = 2.0 * np.pi * np.arange(n_fft) / n_fft
    return (0.5 - 0.5 * np.cos(phase)).astype(np.float32)
